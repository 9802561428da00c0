"""This module holds the arguments of the strategy, and checks them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aimc_pl.arguments import check_callable, check_choice, check_flag, check_list, check_number, shown
from aimc_pl.cost import Hardware
from aimc_pl.errors import UsageError
from aimc_pl.schedule import MAX_MICROBATCHES, MAX_STAGES, Duplex, Schedule, ScheduleName, check_order
from aimc_pl.strategies.remedies import Remedy

GradientScale = Literal["minibatch", "microbatch"]
LossReduction = Literal["mean", "sum"]
OnNonfinite = Literal["stop", "warn"]


def with_remedies(schedule: Schedule, remedies: Sequence[Remedy]) -> Schedule:
    """Return the schedule as the remedies change it.

    Raises:
        UsageError: if something is no remedy, if a class of remedies comes twice, if there is no staleness, or if a
            remedy returns no asynchronous schedule of this size.
    """
    check_list("remedies", remedies, Remedy, "remedies for staleness")
    kinds = [type(remedy).__name__ for remedy in remedies]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise UsageError(f"remedies has {twice[0]} {len(twice)} times: give it once")
    if remedies and not schedule.is_async:
        raise UsageError(f"remedies need schedule='async': {schedule.name!r} has no stale weights")
    size = schedule.num_stages, schedule.num_microbatches
    for remedy in remedies:
        schedule, own = remedy.change(schedule), f"{type(remedy).__name__}.change"
        is_schedule = isinstance(schedule, Schedule) and schedule.is_async
        if not is_schedule or (schedule.num_stages, schedule.num_microbatches) != size:
            raise UsageError(
                f"{own} must return an asynchronous aimc_pl.schedule.Schedule for num_stages={size[0]} and "
                f"num_microbatches={size[1]}, got {shown(schedule)}"
            )
        accumulate = schedule.accumulate
        check_number(f"accumulate of {own}", accumulate, at_least=1, at_most=MAX_MICROBATCHES, whole=True)
    return schedule


def make_schedule(
    schedule: ScheduleName | Callable[[int, int], Schedule], num_stages: int, num_microbatches: int, duplex: Duplex
) -> Schedule:
    """Return the built-in schedule of a name, or the schedule that the user's class or function makes.

    Raises:
        UsageError: if the result is no schedule for this number of stages and micro-batches, or if one of these numbers
            is out of range.
    """
    if not callable(schedule):
        try:
            return Schedule(schedule, num_stages, num_microbatches, duplex)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if duplex != "half":
        raise UsageError(f"duplex={duplex!r} is for schedule='async': a custom schedule sets its own, so leave it out")
    check_number("num_stages", num_stages, at_least=1, at_most=MAX_STAGES, whole=True)
    check_number("num_microbatches", num_microbatches, at_least=1, at_most=MAX_MICROBATCHES, whole=True)
    made = schedule(num_stages, num_microbatches)
    if not isinstance(made, Schedule) or (made.num_stages, made.num_microbatches) != (num_stages, num_microbatches):
        raise UsageError(
            f"schedule= must be a name, or make an aimc_pl.schedule.Schedule for num_stages={num_stages} and "
            f"num_microbatches={num_microbatches}; it made {made!r}"
        )
    try:
        check_order(made)
    except ValueError as error:
        raise UsageError(f"schedule= cannot run: {error}") from error
    return made


@dataclass(frozen=True)
class Settings:
    """The settings of the training. See :class:`AnalogPipelineStrategy` for the fields.

    Attributes:
        hardware: the hardware on which times are modelled to choose the stages; ``None`` to measure them.

    Raises:
        UsageError: if a field has a wrong type or value, or if some fields exclude each other.
    """

    schedule: Schedule
    split_at: Sequence[str] | None
    gradient_scale: GradientScale
    weight_stashing: bool
    loss_reduction: LossReduction
    microbatch_weight: Callable[[Any], float] | None
    split_batch: Callable[[Any, int], Sequence[Any]] | None
    verify: bool
    on_nonfinite: OnNonfinite
    remedies: Sequence[Remedy]
    hardware: Hardware | None = None

    def __post_init__(self) -> None:
        check_choice("gradient_scale", self.gradient_scale, GradientScale)
        check_choice("loss_reduction", self.loss_reduction, LossReduction)
        check_choice("on_nonfinite", self.on_nonfinite, OnNonfinite)
        check_flag("weight_stashing", self.weight_stashing)
        check_flag("verify", self.verify)
        for name in ("microbatch_weight", "split_batch"):
            if getattr(self, name) is not None:
                check_callable(name, getattr(self, name))
        if self.split_at is not None:
            check_list("split_at", self.split_at, str, "module names")
            twice = [name for name in self.split_at if [*self.split_at].count(name) > 1]
            if twice:
                raise UsageError(f"split_at has {twice[0]!r} twice: every stage begins at a module of its own")
        if not self.schedule.is_async and self.gradient_scale == "microbatch":
            raise UsageError(
                f"gradient_scale='microbatch' needs schedule='async': {self.schedule.name!r} updates per mini-batch"
            )
        if not self.schedule.is_async and self.weight_stashing:
            raise UsageError(f"weight_stashing needs schedule='async': {self.schedule.name!r} has no stale weights")
        num_stages = self.schedule.num_stages
        if self.split_at is not None and len(self.split_at) != num_stages - 1:
            raise UsageError(
                f"num_stages={num_stages} needs {num_stages - 1} names in split_at, got {len(self.split_at)}: "
                "split_at=null (None in Python) balances the stages by measured time"
            )
        if self.microbatch_weight is not None and self.gradient_scale == "microbatch":
            raise UsageError("gradient_scale='microbatch' makes every micro-batch count fully: drop microbatch_weight")
        if self.microbatch_weight is not None and self.loss_reduction == "sum":
            raise UsageError("microbatch_weight is for losses that are means: loss_reduction='sum' needs no weights")
