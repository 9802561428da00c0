"""This module holds the cross-points of a crossbar, and moves their weights by update pulses."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from aihwkit.simulator.configs import SingleRPUConfig, UpdateParameters
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.parameters.enums import RPUDataType
from torch import Tensor, nn

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.pulses import (
    DRAWN,
    Counts,
    expected_counts,
    sampled_counts,
    train_settings,
    whole_counts,
)
from aimc_pl.devices.mean_field.random_table import LENGTH, TableGenerator, gaussian, tables, uniform
from aimc_pl.devices.mean_field.response import LinearResponse, Number, Response, after_pulse, response_of
from aimc_pl.devices.mean_field.vectors import Patches, Vectors

ROWS = Vectors(-1)
"""Vectors that are the rows of a matrix."""

_LARGEST_REACH = 0.5
"""A batch is split if it moves weights by more than this, in units of their device's relaxation."""

_ONE = np.ones(1, np.float32)


@dataclass
class Tally:
    """The number of updates of a crossbar, and what they have lost."""

    num_updates: int = 0
    """How often the crossbar, or a column of it, has been sent pulses."""

    cut: Tensor | float = 0.0
    """The sum over these updates of the share of the pulses that did not fit into the trains."""

    def add(self, cut: Tensor | float, num_updates: int = 1) -> None:
        """Count updates that have lost these shares of their pulses, in sum."""
        self.num_updates += num_updates
        self.cut += cut


class _Loop(NamedTuple):
    """What compiled loops need to move the weights of a crossbar, apart from the pulses."""

    weight: np.ndarray
    """The memory of the weights ``(out, in)`` that pulses move."""

    settings: tuple[Any, ...]
    """The last arguments of these loops."""


class Crossbar(nn.Module):
    """The cross-points of a crossbar: their weights, and the parameters of their devices.

    aihwkit draws the parameters of the cross-points. They therefore vary, and are named, as in aihwkit's own tiles.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        device: one of aihwkit's step devices.
        sample_pulses: whether pulse trains are drawn, instead of using the mean and variance of their coincidences.
        generator: the source of all random numbers.

    Attributes:
        weight: the weights ``(out, in)``, which keep their memory.
        hidden: the parameters of the devices ``(names, out, in)``, or ``(names, 1, 1)`` if all devices are equal.
        names: aihwkit's names of these parameters.
        granularity: the mean step of the devices.
        tally: counts the updates.
    """

    weight: Tensor
    hidden: Tensor

    def __init__(
        self, x_size: int, d_size: int, device: PulsedDevice, sample_pulses: bool, generator: TableGenerator
    ) -> None:
        super().__init__()
        self._device = device
        self._sample_pulses = sample_pulses
        self._generator = generator
        device = deepcopy(device)
        device.construction_seed = device.construction_seed or 1 + int(torch.randint(2**31 - 2, ()))
        drawn = SingleRPUConfig(device=device).tile_class(d_size, x_size, SingleRPUConfig(device=device), False).tile
        parameters: Any = device.as_bindings(RPUDataType.FLOAT)
        self.granularity: float = parameters.calc_weight_granularity()
        self._write_noise: float = getattr(device, "write_noise_std", 0.0) * parameters.dw_min
        self.names: list[str] = drawn.get_hidden_parameter_names()
        hidden: Tensor = drawn.get_hidden_parameters()
        if torch.equal(hidden, hidden[:, :1, :1].expand_as(hidden)):
            hidden = hidden[:, :1, :1]
        if self._write_noise > 0:
            hidden = hidden.expand(-1, d_size, x_size)
        self.register_buffer("weight", torch.zeros(d_size, x_size), persistent=False)
        self.register_buffer("hidden", hidden.clone(), persistent=False)
        if self._write_noise > 0:
            self._persistent.zero_()  # aihwkit draws these without the construction's seed
        self.tally = Tally()
        self._responses: dict[int | None, Response] = {}
        """The responses of single columns, and under ``None`` that of all cross-points."""
        self._responses_to: Tensor | None = None
        self._loop: _Loop | None = None
        self._loop_at: tuple[int, int] | None = None

    @property
    def bounds(self) -> tuple[Number, Number]:
        """The lowest and the highest weight."""
        return self.response.bounds

    @property
    def response(self) -> Response:
        """The response of all cross-points to pulses."""
        return self._response(None)

    def write(self, weight: Tensor) -> None:
        """Program the weights, clipped to the bounds of the cross-points."""
        self.response.clip(self.weight.copy_(weight))
        if self._write_noise > 0:
            self._persistent.copy_(self.weight)
            if getattr(self._device, "apply_write_noise_on_set", False):
                self.weight.add_(self._gaussian(self.weight), alpha=self._write_noise)

    def move_to(self, weight: Tensor) -> None:
        """Move the weights to other ones, clipped to the bounds of the cross-points. Write noise stays on top."""
        if self._write_noise == 0:
            self.response.clip(self.weight.copy_(weight))
            return
        before = self._persistent.clone()
        self.response.clip(self._persistent.add_(weight - self.weight))
        self.weight.add_(self._persistent - before)

    def pulse(
        self,
        x: Tensor,
        error: Tensor,
        vectors: Vectors | Patches,
        learning_rate: float,
        update: UpdateParameters,
        signs: Tensor | None = None,
    ) -> None:
        """Move the weights by −learning_rate·δᵀx on average, by pulses.

        Args:
            x: the inputs, arranged as ``vectors`` says, with the batch along the first dimension.
            error: the errors δ of the same vectors.
            vectors: how the vectors are arranged in the tensors.
            learning_rate: the learning rate.
            update: the parameters of the pulse trains.
            signs: −1 at cross-points ``(out, in)`` whose pulses change their direction, and 1 at the others. One row of
                signs ``(1, in)`` is for all outputs.
        """
        if learning_rate == 0:
            return
        limit = largest_reach(x)
        reach, cut = self._attempt(x, error, vectors, learning_rate, update, signs, limit)
        self.tally.add(cut)
        if reach <= limit:
            return
        # The order of the samples matters: split the batch, and apply its parts one after another.
        parts = min(len(x), ceil(reach / _LARGEST_REACH))
        for some_x, some_error in split(parts, x, error):
            self._attempt(some_x, some_error, vectors, learning_rate, update, signs)

    def pulse_column(self, column: int, error: Tensor, learning_rate: float, update: UpdateParameters) -> None:
        """Do the same as :meth:`pulse` for one error ``(out,)`` and an input of 1 on one line, and 0 on all others."""
        if learning_rate == 0:
            return
        arguments = self.column_arguments(learning_rate, update)
        if arguments is not None:
            cut = kernels.pulse_column(column, kernels.array(error), *arguments)
        else:
            counts = self._count(error.new_ones(1, 1), error[None], ROWS, learning_rate, update)
            self._move(counts, self._reach(counts), column)
            cut = counts.cut
        self.tally.add(cut)

    def add_column(
        self,
        column: int,
        source: Tensor,
        reads: tuple[tuple[Any, ...], tuple[Any, ...]],
        learning_rate: float,
        update: UpdateParameters,
    ) -> bool:
        """Read a column of other weights, and add learning_rate times what was read to the same column, by pulses.

        Args:
            column: the number of the column.
            source: the other weights ``(out, in)``.
            reads: the converters of the reads, see :func:`~aimc_pl.devices.mean_field.converters.kernel_arguments`.
            learning_rate: the learning rate.
            update: the parameters of the pulse trains.

        Returns:
            Whether a compiled loop could do this. Otherwise, nothing has happened.
        """
        arguments = self.column_arguments(learning_rate, update)
        if arguments is None:
            return False
        self.tally.add(kernels.transfer(source.numpy(), reads, column, *arguments))
        return True

    def pulse_arguments(
        self,
        x: Tensor,
        error: Tensor,
        vectors: Vectors | Patches,
        learning_rate: float,
        update: UpdateParameters,
        signs: Tensor | None = None,
        furthest: float = inf,
    ) -> tuple[Any, ...] | None:
        """Return the arguments of the compiled loop that does what :meth:`pulse` does, or ``None`` if it cannot do it.

        For the arguments see :meth:`pulse`. The loop sends no pulses if the reach is larger than ``furthest``.
        """
        trains, loop = self._pulse_loop(learning_rate, update)
        if loop is None or vectors is not ROWS or error.numel() > LENGTH:
            return None
        turned = kernels.NOTHING if signs is None else kernels.array(signs)
        most = furthest / (self.response.steepness or 1e-30)
        return loop.weight, kernels.array(x), kernels.array(error), turned, most, trains, *loop.settings

    def column_arguments(self, learning_rate: float, update: UpdateParameters) -> tuple[Any, ...] | None:
        """Return the last arguments of the compiled loops that move a column, or ``None`` if they cannot do it."""
        trains, loop = self._pulse_loop(learning_rate, update)
        return None if loop is None else (loop.weight, trains, *loop.settings)

    def draw_pulses(
        self,
        x: Tensor,
        error: Tensor,
        vectors: Vectors | Patches,
        learning_rate: float,
        update: UpdateParameters,
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Draw how many pulses up and down every cross-point gets, and leave the weights alone.

        For the arguments see :meth:`pulse`.

        Returns:
            Two tensors ``(out, in)`` of whole numbers, and the share of the pulses that do not fit into the trains.
        """
        counts = self._count(x, error, vectors, learning_rate, update, 0.0)
        if self._sample_pulses:
            return (counts.total + counts.net) / 2, (counts.total - counts.net) / 2, counts.cut
        return *whole_counts(counts, self._generator), counts.cut

    def move_one_way(self, pulses: Tensor, upward: bool) -> None:
        """Move every weight by its number ``(out, in)`` of pulses, one after another, all up or all down."""
        weight = self._moving.view(-1)
        moving = pulses.flatten().nonzero()[:, 0]
        remaining, hidden = pulses.flatten()[moving], self.hidden.flatten(1)
        is_uniform = hidden.shape[1] == 1
        hidden = hidden if is_uniform else hidden[:, moving]
        while len(moving) > 0:
            values = dict(zip(self.names, hidden, strict=True))
            before = weight[moving]
            weight[moving] = after_pulse(before, self._device, values, upward, self._gaussian(before))
            remaining -= 1
            more = remaining > 0
            moving, remaining = moving[more], remaining[more]
            hidden = hidden if is_uniform else hidden[:, more]
        if self._write_noise > 0:
            noisy = torch.add(self._persistent, self._gaussian(self.weight), alpha=self._write_noise)
            self.weight.copy_(torch.where(pulses > 0, noisy, self.weight))

    def reset(self, where: Tensor, sign: int = 1) -> None:
        """Reset some weights, to the value (times ``sign``) to which their devices return, with noise.

        Args:
            where: a mask ``(out, in)`` of these weights.
            sign: 1 or −1.
        """
        target = sign * self.hidden[self.names.index("reset_bias")]
        target = torch.add(target, self._gaussian(self.weight), alpha=self._device.reset_std)
        self.weight.copy_(torch.where(where, self.response.clip(target), self.weight))

    def program(self, residual: Tensor, shown: Tensor, scales: Tensor | None) -> None:
        """Move the weights by what has changed of a tensor that shows them, in whole pulses, and show the new weights.

        The crossbar must have been created with ``sample_pulses``.

        Args:
            residual: the change ``(out, in)`` that is less than a pulse. The new change is added, and what the pulses
                carry is subtracted.
            shown: the weights ``(out, in)``, times the scales.
            scales: one scale per output ``(out, 1)`` or one for all ``(1, 1)``; ``None`` stands for 1.
        """
        loop = self._moving_loop()
        if loop is not None and shown.is_contiguous() and shown.dtype == torch.float32:
            arrays = loop.weight, residual.numpy(), shown.detach().numpy()
            scale = _ONE if scales is None else kernels.array(scales.view(-1))
            kernels.program(*arrays, scale, self.granularity, *loop.settings)
            return
        scale = 1.0 if scales is None else scales
        pulses = residual.add_((shown - self.weight * scale) / scale).div(self.granularity, rounding_mode="trunc")
        residual.sub_(pulses, alpha=self.granularity)
        total, variance = pulses.abs(), self.response.spread**2
        counts = Counts(pulses, total, (pulses * variance, total * variance))
        self._move(counts, self._reach(counts))
        shown.copy_(self.weight * scale)

    @property
    def leaks(self) -> bool:
        """Whether the devices have a lifetime, so that their weights leak."""
        return self._device.lifetime > 0

    def decay(self) -> None:
        """Let the weights leak, as once per mini-batch, if the devices have a lifetime."""
        if self.leaks:
            scale, target = (self.hidden[self.names.index(name)] for name in ("decay_scales", "reset_bias"))
            self.response.clip(self.weight.sub_(target).mul_(scale).add_(target))

    def extra(self) -> dict[str, Tensor]:
        """Return the state that weights and parameters do not show."""
        if self._write_noise == 0:
            return {}
        return {"visible_weights": self.weight.clone(), "persistent_weights": self._persistent.clone()}

    def load_extra(self, extra: dict[str, Tensor]) -> None:
        """Restore the state that :meth:`extra` returned."""
        if "visible_weights" in extra:
            self.weight.copy_(extra["visible_weights"])
            self._persistent.copy_(extra["persistent_weights"])

    @property
    def _persistent(self) -> Tensor:
        """The weights without write noise, if there is such noise."""
        return self.hidden[self.names.index("persistent_weights")]

    @property
    def _moving(self) -> Tensor:
        """The weights that pulses move: those without write noise."""
        return self._persistent if self._write_noise > 0 else self.weight

    def _response(self, column: int | None) -> Response:
        """Return the response of a column, or with ``None`` of all columns."""
        if self._responses_to is not self.hidden:
            self._responses_to = self.hidden
            self._responses = {}
        if column is not None and self.hidden.shape[-1] == 1:
            column = None
        response = self._responses.get(column)
        if response is None:
            if column is None:
                response = self._response_of(self.hidden)
            elif isinstance(self.response, LinearResponse):
                response = self.response.column(column)
            else:
                response = self._response_of(self.hidden[:, :, column : column + 1])
            self._responses[column] = response
        return response

    def _response_of(self, hidden: Tensor) -> Response:
        values: dict[str, Number] = {
            name: float(value.flatten()[0]) if bool((value == value.flatten()[0]).all()) else value
            for name, value in zip(self.names, hidden, strict=True)
        }
        return response_of(self._device, values, self._sample_pulses)

    def _reach(self, counts: Counts) -> float:
        reach = self.response.steepness * float(counts.total.max())
        return reach if isfinite(reach) else 0.0

    def _moving_loop(self) -> "_Loop | None":
        """Return what compiled loops need to move the weights, or ``None`` if they cannot."""
        # Small layers would take longer to collect this than to move, so it is kept for as long as it is valid.
        at = self.weight.data_ptr(), self.hidden.data_ptr()
        if at != self._loop_at:
            self._loop_at, self._loop = at, self._make_loop()
        return self._loop

    def _make_loop(self) -> "_Loop | None":
        response, weight = self.response, self.weight
        if not (isinstance(response, LinearResponse) and weight.is_cpu and weight.numel() <= LENGTH):
            return None
        visible = weight.numpy() if self._write_noise > 0 else kernels.NOTHING
        random = *tables(), self._generator.offsets
        settings = response.parameters, response.spread, (visible, self._write_noise), random
        return _Loop(self._moving.numpy(), settings)

    def _pulse_loop(
        self, learning_rate: float, update: UpdateParameters
    ) -> tuple[tuple[float, int, bool, bool], "_Loop | None"]:
        """Return the settings of trains, and what compiled loops need to send them, or ``None`` if they cannot."""
        trains = train_settings(learning_rate / self.granularity, update)
        _, length, _, _ = trains
        return trains, None if self._sample_pulses or length > DRAWN else self._moving_loop()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other memory.
        return {**self.__dict__, "_loop": None, "_loop_at": None}

    def _attempt(
        self,
        x: Tensor,
        error: Tensor,
        vectors: Vectors | Patches,
        learning_rate: float,
        update: UpdateParameters,
        signs: Tensor | None,
        furthest: float = inf,
    ) -> tuple[float, Tensor | float]:
        """Do what :meth:`pulse` does, unless the reach is larger than ``furthest``.

        Returns:
            The reach (or 0 if it is small), and the share of the pulses that do not fit into the trains.
        """
        arguments = self.pulse_arguments(x, error, vectors, learning_rate, update, signs, furthest)
        if arguments is not None:
            most, cut = kernels.pulse(*arguments)
            return most * self.response.steepness, cut
        counts = _turned(self._count(x, error, vectors, learning_rate, update), signs)
        reach = self._reach(counts)
        if reach <= furthest:
            self._move(counts, reach)
        return reach, counts.cut

    def _count(
        self,
        x: Tensor,
        error: Tensor,
        vectors: Vectors | Patches,
        learning_rate: float,
        update: UpdateParameters,
        spread: float | None = None,
    ) -> Counts:
        spread = self.response.spread if spread is None else spread
        settings = learning_rate, self.granularity, update, spread, self._generator
        if not self._sample_pulses:
            return expected_counts(x, error, vectors, *settings)
        if isinstance(vectors, Patches):
            x = vectors.columns(x).movedim(1, -1).flatten(0, 1)
            error = error.flatten(2).movedim(1, -1).flatten(0, 1)
        return sampled_counts(x, error, *settings)

    def _move(self, counts: Counts, reach: float, column: int | None = None) -> None:
        """Move a column of weights, or with ``None`` all weights."""
        response, columns = self._response(column), slice(column, None if column is None else column + 1)
        visible, weight = self.weight[:, columns], self._moving[:, columns]
        before = weight.clone() if self._write_noise > 0 else None
        response.step(weight, counts, reach, self._gaussian(weight))
        if before is not None:
            # Write noise is drawn again where at least one pulse came. Elsewhere the noise stays as it is.
            if self._sample_pulses:
                written = counts.total > 0
            else:
                written = uniform(weight.shape, self._generator, weight.device) > torch.exp(-counts.total)
            noisy = torch.add(weight, self._gaussian(weight), alpha=self._write_noise)
            visible.copy_(torch.where(written, noisy, visible + (weight - before)))

    def _gaussian(self, like: Tensor) -> Tensor:
        return gaussian(like.shape, self._generator, like.device)


def largest_reach(x: Tensor) -> float:
    """Return the largest reach with which a batch need not be split."""
    return _LARGEST_REACH if x.shape[0] > 1 else inf


def split(parts: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors along their first dimension into a number of parts."""
    return [tensors] if parts == 1 else zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)


def _turned(counts: Counts, signs: Tensor | None) -> Counts:
    if signs is None:
        return counts
    net_noise, total_noise = counts.noise
    return counts._replace(net=counts.net * signs, noise=(net_noise * signs, total_noise))
