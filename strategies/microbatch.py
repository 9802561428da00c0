"""A micro-batch of the pipeline as the user's training_step, suspended where it calls the backbone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aimc_pl.errors import UsageError
from aimc_pl.partition import bind_inputs
from aimc_pl.strategies.suspension import SuspendableCall


class BackboneCall(NamedTuple):
    """One call of the backbone's forward."""

    name: str
    backbone: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What enters stage 0."""
        return bind_inputs(self.backbone, self.args, self.kwargs)


class TrainingStep(SuspendableCall):
    """One run of training_step: up to the backbone's inputs, then from its outputs to the loss.

    Args:
        function: runs training_step on the micro-batch; it calls :meth:`suspend`, with the backbone's inputs, in place
            of the backbone's forward.
        size: samples of the micro-batch.
        weight: what its loss counts in the gradient.
        check_loss: called with the loss.
        context: entered while the function runs.
        draw: entered while it runs up to the backbone, which every process that needs it does for itself.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        size: int,
        weight: float,
        check_loss: Callable[[Tensor], None],
        context: Callable[[], AbstractContextManager[Any]],
        draw: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(function)
        self.size = size
        self.output: Any = None
        self.is_finished = False
        self._weight = weight
        self._check_loss = check_loss
        self._context = context
        self._draw = draw

    @cached_property
    def call(self) -> BackboneCall:
        """Run training_step up to its call of the backbone."""
        with self._draw(), self._context():
            call = self.start()
        if not self.is_suspended:
            raise UsageError(
                "training_step does not call the backbone: it calls neither a submodule that holds at least half of "
                "the parameters, nor the module's own forward, nor what backbone= names. Move the layers into one "
                "submodule, or into forward, and name it with backbone= if it holds less"
            )
        return call

    def enter(self) -> tuple[Any, ...]:
        """The backbone's inputs."""
        return self.call.inputs

    def leave(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """The loss for the backbone's outputs, and its weight."""
        _ = self.call
        with self._context():
            self.output = self.resume(outputs)
        if self.is_suspended:
            self.abort()
            raise UsageError(
                "training_step calls the backbone twice: a micro-batch passes through the pipeline once. "
                "Call it once on the concatenated inputs, or name another submodule with backbone=."
            )
        loss = self.output.get("loss") if isinstance(self.output, Mapping) else self.output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UsageError(
                f"training_step must return the loss, a tensor of one element, or a dict with it under 'loss'; got "
                f"{'shape ' + str(tuple(loss.shape)) if isinstance(loss, Tensor) else type(loss).__name__}."
            )
        self._check_loss(loss)
        self.is_finished = True
        return loss, torch.full_like(loss, self._weight)

    def entered(self, gradients: tuple[Any, ...]) -> None:
        """Go on with the backward where the backbone's inputs came from parameters of their own."""
        pairs = zip(self.enter(), gradients, strict=True)
        pairs = [(v, g) for v, g in pairs if isinstance(v, Tensor) and v.grad_fn is not None and g is not None]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        # Another process has gone on with the outputs.
        self.abort()
        self.is_finished = True


def merge_outputs(steps: Sequence[TrainingStep], loss_reduction: str) -> Any:
    """What the training_steps of several micro-batches returned, as one for all their samples.

    The loss and other values of one element are averaged over the samples (the loss is added up if it is a sum),
    tensors and lists with a row per sample are joined, anything else becomes a list with an item per micro-batch.
    """
    if not steps:
        return None
    sizes = [step.size for step in steps]
    if not isinstance(steps[0].output, Mapping):
        return _merge([step.output for step in steps], sizes, loss_reduction)
    return {
        key: _merge([step.output[key] for step in steps], sizes, loss_reduction if key == "loss" else "mean")
        for key in steps[0].output
    }


def _merge(values: list[Any], sizes: list[int], reduction: str) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        values = [value.detach() for value in values]
        if all(value.dim() and len(value) == size for value, size in zip(values, sizes, strict=True)):
            return torch.cat(values)
        if all(value.numel() == 1 and value.is_floating_point() for value in values):
            weights = [1.0 if reduction == "sum" else size / sum(sizes) for size in sizes]
            return sum(weight * value for weight, value in zip(weights, values, strict=True))
    if all(isinstance(value, list) and len(value) == size for value, size in zip(values, sizes, strict=True)):
        return [item for value in values for item in value]
    return values
