"""This module splits mini-batches into micro-batches, and prepares a run of training_step for each of them."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from aimc_pl.errors import UsageError
from aimc_pl.microbatch import batch_size, reading, split_batch
from aimc_pl.private_torch import tree_leaves
from aimc_pl.strategies.settings import Settings
from aimc_pl.strategies.training_step import TrainingStep


class Batches:
    """The way in which mini-batches are split: by the user's function or, without one, along the samples.

    Args:
        module: the LightningModule. It may have a method ``split_batch(batch, num_microbatches)``.
        settings: the arguments of the strategy. Their ``split_batch`` takes precedence over the module's method.
    """

    def __init__(self, module: "pl.LightningModule", settings: Settings) -> None:
        self._module = module
        self._settings = settings
        self._custom = settings.split_batch or getattr(module, "split_batch", None)
        self._reading: dict[tuple[Any, ...], Any] = {}
        """How mini-batches have been split so far, see :func:`reading`."""

    @property
    def splits_by_sample(self) -> bool:
        """Whether batches are split along the samples, because there is no function of the user."""
        return self._custom is None

    def split(self, batch: Any) -> list[Any]:
        """Return the micro-batches of a mini-batch."""
        return self._split(batch, self._settings.schedule.num_microbatches)

    def _split(self, batch: Any, number: int) -> list[Any]:
        if number == 1:
            return [batch]
        if self._custom is None:
            self._reading |= reading(batch, self._reading)
            return split_batch(batch, number, self._reading)
        parts = self._custom(batch, number)
        if not isinstance(parts, Sequence) or not 1 <= len(parts) <= number:
            found = f"{len(parts)} of them" if isinstance(parts, Sequence) else type(parts).__name__
            raise UsageError(f"split_batch must return a list of 1 to {number} micro-batches, got {found}")
        return [*parts]

    def size(self, batch: Any) -> int:
        """Return the number of samples in a batch.

        If a function of the user splits batches, their samples cannot be counted. The result is then the number of
        elements in all tensors of the batch, which serves as well to compare micro-batches.
        """
        if self._settings.schedule.num_microbatches == 1:
            return _size_for_logs(batch)
        if self._custom is None:
            return batch_size(batch, self._reading)
        return sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)) or 1

    def steps(
        self,
        batch: Any,
        args: tuple[Any, ...],
        context: Callable[[], AbstractContextManager[Any]],
        in_sync: bool = False,
    ) -> list[TrainingStep]:
        """Return a run of training_step for every micro-batch, with the weight of its loss.

        Args:
            batch: the mini-batch.
            args: further arguments of training_step.
            context: returns a context manager, which is entered while training_step runs.
            in_sync: whether all micro-batches make one update of every stage, a step of the mini-batch.

        Raises:
            UsageError: if the batch holds an iterator, or if it cannot be split.
        """
        settings = self._settings
        _refuse_iterators(batch)
        parts = self.split(batch)
        sizes = [self.size(part) for part in parts]
        weigh = settings.microbatch_weight
        counts = sizes if weigh is None else [self._weight(weigh(part)) for part in parts]
        steps = []
        for part, size, count in zip(parts, sizes, counts, strict=True):
            share = count / max(sum(counts), 1e-30)
            weight = share if settings.loss_reduction == "mean" else 1.0
            if settings.gradient_scale == "microbatch" and not in_sync:
                weight = 1.0 if settings.loss_reduction == "mean" else sum(sizes) / size
            weight /= self._module.trainer.accumulate_grad_batches
            function = partial(self._module.training_step, part, *args)
            steps.append(TrainingStep(function, part, size, share, weight, context))
        return steps

    def whole(
        self, batch: Any, args: tuple[Any, ...], context: Callable[[], AbstractContextManager[Any]]
    ) -> TrainingStep:
        """Return a run of training_step on the undivided batch. The arguments are those of :meth:`steps`."""
        return TrainingStep(partial(self._module.training_step, batch, *args), batch, 1, 1.0, 1.0, context)

    def half(
        self, batch: Any, args: tuple[Any, ...], context: Callable[[], AbstractContextManager[Any]]
    ) -> TrainingStep:
        """Return a run of training_step on the second half of a batch.

        The run takes the whole batch if the batch has only one sample, or if it cannot be split and
        ``num_microbatches`` is 1. The arguments are those of :meth:`steps`.
        """
        try:
            half = self._split(batch, 2)[-1]
        except UsageError:
            if self._settings.schedule.num_microbatches > 1:
                raise
            half = batch
        return self.whole(half, args, context)

    @staticmethod
    def _weight(value: Any) -> float:
        weight = float(value)
        if not 0 <= weight < float("inf"):
            raise UsageError(f"microbatch_weight must return a number of at least 0, got {weight:g}")
        return weight


def _refuse_iterators(batch: Any) -> None:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Iterator):
            raise UsageError(
                f"the batch holds a {type(leaf).__name__}, which trial runs of training_step would use up: make it a "
                "list"
            )


def _size_for_logs(batch: Any) -> int:
    """Return the number of samples in a batch that is not split: as Lightning counts them, or 1 if nobody can."""
    with warnings.catch_warnings():
        # Lightning warns if the number is ambiguous. Here it only weights logged values.
        warnings.filterwarnings("ignore", message="Trying to infer the `batch_size`")
        try:
            return extract_batch_size(batch)
        except MisconfigurationException:
            pass  # Lightning cannot count them.
    try:
        return batch_size(batch)
    except UsageError:
        return 1
