"""The arguments of the strategy, checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aimc_pl.errors import UsageError
from aimc_pl.schedule import Duplex, Schedule, ScheduleName, check_order

GradientScale = Literal["minibatch", "microbatch"]
LossReduction = Literal["mean", "sum"]
OnNonfinite = Literal["stop", "warn"]


def make_schedule(
    schedule: ScheduleName | Callable[[int, int], Schedule], num_stages: int, num_microbatches: int, duplex: Duplex
) -> Schedule:
    """The schedule that has been asked for by name, or what the user's class or function makes.

    Raises:
        UsageError: if that is no schedule for so many stages and micro-batches.
        ValueError: for an unknown name or a number below 1.
    """
    if not callable(schedule):
        return Schedule(schedule, num_stages, num_microbatches, duplex)
    if duplex != "half":
        raise UsageError(f"duplex={duplex!r} goes with schedule='async': a schedule of your own says it itself")
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
    """How to train; see :class:`AnalogPipelineStrategy` for the fields.

    Raises:
        UsageError: if some exclude each other.
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

    def __post_init__(self) -> None:
        choices = {"gradient_scale": GradientScale, "loss_reduction": LossReduction, "on_nonfinite": OnNonfinite}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(
                    f"unknown {name}={getattr(self, name)!r}: choose one of {', '.join(get_args(allowed))}"
                )
        if not self.schedule.is_async and self.gradient_scale == "microbatch":
            raise UsageError(
                f"gradient_scale='microbatch' needs schedule='async': {self.schedule.name!r} updates per mini-batch"
            )
        if not self.schedule.is_async and self.weight_stashing:
            raise UsageError(f"weight_stashing needs schedule='async': {self.schedule.name!r} has no stale weights")
        if isinstance(self.split_at, str):
            raise UsageError(f"split_at is a list of module names, got the string {self.split_at!r}")
        num_stages = self.schedule.num_stages
        if self.split_at is not None and len(self.split_at) != num_stages - 1:
            raise UsageError(
                f"num_stages={num_stages} needs {num_stages - 1} names in split_at, got {len(self.split_at)}"
            )
        if self.microbatch_weight is not None and self.gradient_scale == "microbatch":
            raise UsageError("gradient_scale='microbatch' makes every micro-batch count fully: drop microbatch_weight")
        if self.microbatch_weight is not None and self.loss_reduction == "sum":
            raise UsageError("microbatch_weight is for losses that are means: loss_reduction='sum' needs no weights")
