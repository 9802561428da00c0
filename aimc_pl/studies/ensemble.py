"""This module trains many copies of a small network at once, each with its own device and learning rate.

The copies pass through one pipeline side by side, independently of each other. A sweep over devices, learning rates
and seeds therefore takes one run. A ``Number`` is one value for all copies, or a tensor ``(copies, 1, 1)`` with
one value per copy.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from aimc_pl.devices.mean_field.response import Number
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.pipeline import Pipeline
from aimc_pl.schedule import Duplex, Schedule
from aimc_pl.stage import Stage

_OUT_NOISE = 0.06
"""The noise of a product, relative to an input of 1. This number and the next two are aihwkit's defaults."""

_OUT_BOUND = 12.0
_MORE_OUT_BITS = 2


class Crossbars(nn.Module):
    """One soft-bounds crossbar per copy: ``(copies, batch, in)`` to ``(copies, batch, out)``, without bias.

    Args:
        weight: the initial weights ``(copies, out, in)``, in float32.
        generator: draws all noise.
        tau: τ, the dynamic range: weights stay in [−τ, τ].
        step: Δw_min, the step at weight 0. The numbers of pulses up and down are drawn from Poisson distributions with
            means α(S∓G)/(2Δw_min), where G = Σδᵀx and S = Σ|δ|ᵀ|x| over a batch of inputs x and errors δ. If ``None``,
            weights follow the paper's expected motion dw = −αG − (α/τ)S⊙w, without granularity.
        cycle_to_cycle: standard deviation of a step, relative to the step.
        write_noise: standard deviation of the noise that an update adds to the visible weight, in units of Δw_min.
        io_bits: bits of the converters before the crossbar. The converters behind it have two more bits, a bound of 12
            and noise of 0.06, relative to inputs scaled to 1. If ``None``, products are exact.

    Raises:
        ValueError: if τ is not positive, or a step would cross the range.
    """

    def __init__(
        self,
        weight: Tensor,
        generator: Generator,
        tau: Number = 1.0,
        step: Number | None = None,
        cycle_to_cycle: Number = 0.0,
        write_noise: Number = 0.0,
        io_bits: Number | None = None,
    ) -> None:
        super().__init__()
        self._bound = torch.as_tensor(tau)
        if not (self._bound > 0).all():
            raise ValueError(f"tau must be positive, got {tau}")
        if step is not None and not ((torch.as_tensor(step) > 0) & (torch.as_tensor(step) < self._bound)).all():
            raise ValueError(f"step must lie between 0 and tau={tau}, got {step}")
        self.weight = nn.Parameter(weight.clone())
        self.tau = tau
        self.step = step
        self.cycle_to_cycle = cycle_to_cycle
        self.write_noise = write_noise
        self.io_bits = io_bits
        self._generator = generator
        self._programmed = weight.clone()
        self.pending: list[tuple[Tensor, Tensor]] = []
        """The inputs and errors since the last update."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the products ``(copies, batch, out)`` with inputs ``(copies, batch, in)``."""
        return _Product.apply(x, self.weight, self)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``x @ weight`` after the converters."""
        if self.io_bits is None:
            return x @ weight
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        y = _rounded(x / scale, 2.0, self.io_bits) @ weight
        y += _OUT_NOISE * self._gaussian(y)
        return _rounded(y.clamp_(-_OUT_BOUND, _OUT_BOUND), 2 * _OUT_BOUND, self.io_bits + _MORE_OUT_BITS) * scale

    def update(self, learning_rate: Number) -> None:
        """Update the weights with the inputs and errors since the last update."""
        x, error = (torch.cat(values, 1) for values in zip(*self.pending, strict=True))
        self.pending.clear()
        net = error.mT @ x * -learning_rate
        total = error.abs().mT @ x.abs() * learning_rate
        weight = self.weight.data
        if self.step is None:
            weight += net - total / self.tau * weight
            return
        up, down = (
            torch.poisson(((total + sign * net) / (2 * self.step)).clamp_min_(0), self._generator) for sign in (1, -1)
        )
        hidden, pulses = self._programmed, up + down
        # n steps up move a weight by a share 1 − (1 − Δw_min/τ)ⁿ of the way to τ, and n steps down of the way to −τ.
        share = 1 - (1 - self.step / self.tau) ** pulses
        sizes = up * (1 - hidden / self.tau) ** 2 + down * (1 + hidden / self.tau) ** 2
        spread = self.cycle_to_cycle * self.step * sizes.sqrt_()
        hidden += (self.tau * (up - down) / pulses.clamp_min(1) - hidden) * share + spread * self._gaussian(hidden)
        hidden.clamp_(-self._bound, self._bound)
        weight.copy_(hidden + self.write_noise * self.step * self._gaussian(hidden))

    def note(self, x: Tensor, error: Tensor) -> None:
        """Store inputs and errors for the next update."""
        self.pending.append((x.detach(), error))

    def _gaussian(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator)


class _Product(torch.autograd.Function):
    """A product whose forward and backward each use the weights at the time when they run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, crossbars: Crossbars) -> Tensor:
        ctx.save_for_backward(x)
        ctx.crossbars = crossbars
        return crossbars.multiply(x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        ctx.crossbars.note(x, error)
        return ctx.crossbars.multiply(error, ctx.crossbars.weight.detach()), None, None


class EnsemblePipeline:
    """An asynchronous pipeline that all copies pass through side by side.

    Args:
        modules: the network's modules in order, which contain :class:`Crossbars`. Their number must be a multiple of
            ``num_stages``.
        num_stages: number of stages M.
        learning_rate: learning rate of the crossbars.
        duplex: see :class:`aimc_pl.schedule.Schedule`.
    """

    def __init__(
        self, modules: Sequence[nn.Module], num_stages: int, learning_rate: Number, duplex: Duplex = "half"
    ) -> None:
        if len(modules) % num_stages:
            raise ValueError(f"{len(modules)} modules cannot be divided evenly into {num_stages} stages")
        self._network = nn.Sequential(*modules)
        self._learning_rate = learning_rate
        each = len(modules) // num_stages
        stages = [Stage(m, modules=modules[m * each : (m + 1) * each]) for m in range(num_stages)]
        boundaries = [str(m * each) for m in range(1, num_stages)]
        # Crossbars set no attributes while they run, which overlapping micro-batches would have to keep apart.
        self._step = StagedStep(self._network, boundaries, stages, delayed=True, overlaps=False)
        self._pipeline = Pipeline(stages, Schedule("async", num_stages, 1, duplex), self._update)

    def run(self, batches: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        """Send micro-batches through the pipeline, for all copies.

        Args:
            batches: the inputs and the loss function of each micro-batch. Inputs are ``(copies, batch, features)``, or
                ``(1, batch, features)`` for all copies alike. A loss function takes the outputs
                ``(copies, batch, out)`` and returns the copies' losses ``(copies,)``.
        """
        with self._step.running():
            self._pipeline.run([Flight(self._step, partial(self._loss, *batch)) for batch in batches])

    def drain(self) -> None:
        """Finish the micro-batches in flight, including their updates."""
        with self._step.running():
            self._pipeline.drain()

    def _loss(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return loss(self._network(x)).sum()

    def _update(self, stage: Stage) -> None:
        for module in stage.modules:
            for part in module.modules():
                if isinstance(part, Crossbars):
                    part.update(self._learning_rate)


def _rounded(values: Tensor, width: float, bits: Number) -> Tensor:
    step = width / (2**bits - 2)
    return torch.round(values / step) * step
