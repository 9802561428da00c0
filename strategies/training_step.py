"""This module runs the user's training_step on micro-batches, and merges what these runs return."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from aimc_pl.errors import UsageError
from aimc_pl.private_torch import tree_map

_current: ContextVar[Optional["TrainingStep"]] = ContextVar("current training step", default=None)


class TrainingStep:
    """A run of training_step on one micro-batch. A call of this object runs the step and returns the loss.

    Args:
        function: runs training_step on the micro-batch.
        inputs: the micro-batch.
        size: the number of samples in the micro-batch.
        share: the share of the micro-batch's loss in the loss of the mini-batch.
        weight: the weight of the micro-batch's loss in the gradient.
        context: returns a context manager, which is entered while the function runs.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        inputs: Any,
        size: int,
        share: float,
        weight: float,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.inputs = inputs
        self.size = size
        self.share = share
        self.weight = weight
        self.output: Any = None
        self.is_finished = False
        self.number = 0
        """The number of the micro-batch, counted over the whole training."""
        self.num_logged: Counter[str] = Counter()
        """The number of times that each name has been logged."""
        self._function = function
        self._context = context

    @staticmethod
    def current() -> "TrainingStep | None":
        """Return the run inside which the caller is; ``None`` if there is none."""
        return _current.get()

    def start_anew(self) -> None:
        """Forget an earlier run, which was a trial."""
        self.output, self.is_finished = None, False
        self.num_logged.clear()

    @property
    def loss(self) -> Any:
        """The loss, without its graph; ``None`` before the run, or if training_step skips the micro-batch."""
        return self.output.get("loss") if isinstance(self.output, Mapping) else self.output

    def run(self) -> Any:
        """Run training_step, and return what it returns."""
        before = _current.set(self)
        try:
            with self._context():
                return self._function()
        finally:
            _current.reset(before)

    def __call__(self) -> Tensor | None:
        """Run training_step to its end, and return the loss; ``None`` if training_step skips the micro-batch.

        Raises:
            UsageError: if training_step returns something other than a loss.
        """
        output = self.run()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                "training_step must return the loss, a tensor of one element, a dict with it under 'loss', or None to "
                f"skip the batch; got {found}."
            )
        self.output = _detached(output)
        self.is_finished = True
        return loss


def _detached(output: Any) -> Any:
    """Return an output of training_step without its graph, which would keep all activations in memory."""
    return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)


def merge_outputs(steps: Sequence[TrainingStep], loss_reduction: str) -> Any:
    """Merge what training_step has returned for several micro-batches, as if they were one batch.

    The merged loss is the mean weighted by the micro-batches' shares, or the sum if the loss sums over samples. Other
    values of one element are averaged over the samples. Tensors and lists with a row per sample are joined. Anything
    else becomes a list with an item per micro-batch that has returned it. Micro-batches that were skipped do not count.
    The output of a single micro-batch is returned as it is.
    """
    steps = [step for step in steps if step.output is not None]
    if len(steps) <= 1:
        return steps[0].output if steps else None
    outputs = [step.output if isinstance(step.output, Mapping) else {"loss": step.output} for step in steps]
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for output in outputs for key in output):
        having = [(step, output[key]) for step, output in zip(steps, outputs, strict=True) if key in output]
        merge = partial(_merge_loss, loss_reduction) if key == "loss" else _merge
        merged[key] = merge([step for step, _ in having], [value for _, value in having])
    return merged if any(isinstance(step.output, Mapping) for step in steps) else merged["loss"]


def _merge_loss(reduction: str, steps: Sequence[TrainingStep], losses: list[Tensor]) -> Tensor:
    if reduction == "sum":
        return torch.stack(losses).sum(0)
    total = sum(step.share for step in steps) or 1.0  # if no micro-batch counts, the loss is 0
    return torch.stack([step.share / total * loss for step, loss in zip(steps, losses, strict=True)]).sum(0)


def _merge(steps: Sequence[TrainingStep], values: list[Any]) -> Any:
    sizes = [step.size for step in steps]
    if all(isinstance(value, Tensor) for value in values):
        have_rows = all(value.dim() and len(value) == size for value, size in zip(values, sizes, strict=True))
        if have_rows and len({(value.shape[1:], value.dtype) for value in values}) == 1:
            return torch.cat(values)
        if all(value.numel() == 1 and value.is_floating_point() for value in values):
            return sum(size / sum(sizes) * value for size, value in zip(sizes, values, strict=True))
    if all(isinstance(value, list) and len(value) == size for value, size in zip(values, sizes, strict=True)):
        return [item for value in values for item in value]
    return values
