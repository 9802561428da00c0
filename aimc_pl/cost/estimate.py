"""This module estimates time, energy and memory of a schedule, from the work of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from aimc_pl.cost.constants import Hardware
from aimc_pl.cost.simulation import StageTimes, Timeline, simulate
from aimc_pl.cost.stages import Cost, StageCost, link_cost, stage_cost, with_spills
from aimc_pl.cost.work import Work
from aimc_pl.schedule import Schedule


@dataclass(frozen=True)
class Estimate:
    """The cost of training some mini-batches, from the first fill to the last drain.

    Attributes:
        hardware: the constants of the hardware.
        schedule: the schedule.
        stages: the costs of the stages.
        energies: for each stage, its energy for all mini-batches.
        timeline: when each stage does what. Memory is in bits.
        num_samples: the number of samples in all mini-batches.
    """

    hardware: Hardware
    schedule: Schedule
    stages: Sequence[StageCost]
    energies: Sequence[Cost]
    timeline: Timeline
    num_samples: float

    @property
    def seconds_per_sample(self) -> float:
        """The time divided by the number of samples."""
        return self.timeline.makespan / self.num_samples

    @property
    def joules_per_sample(self) -> float:
        """The energy divided by the number of samples."""
        return sum(cost.energy for cost in self.energies) / self.num_samples


def estimate(
    works: Sequence[Work],
    schedule: Schedule,
    hardware: Hardware,
    samples_per_microbatch: float = 1.0,
    optimizer_states: int = 0,
    num_minibatches: int = 1,
) -> Estimate:
    """Estimate the cost of training some mini-batches.

    Args:
        works: what each stage does for one micro-batch.
        schedule: the schedule.
        hardware: the constants of the hardware.
        samples_per_microbatch: the number of samples in a micro-batch.
        optimizer_states: the numbers that the optimizer keeps for each digital parameter.
        num_minibatches: the number of mini-batches. An asynchronous pipeline drains after the last of them only.
    """
    stages = [stage_cost(work, hardware, optimizer_states) for work in works]
    stages = with_spills(stages, schedule, hardware)
    timeline = simulate(schedule, stage_times(stages, hardware), hardware.link_latency.value, num_minibatches)
    microbatches = num_minibatches * schedule.num_microbatches
    steps = microbatches if schedule.is_async else num_minibatches
    static = Cost(0.0, {"static": hardware.static_power.value * timeline.makespan})
    back = [0.0, *(stage.returned for stage in stages)]
    energies = [
        (stage.forward + stage.backward + stage.update + link_cost(stage.sent + returned, hardware)) * microbatches
        + stage.step * steps
        + static
        for stage, returned in zip(stages, back, strict=False)
    ]
    return Estimate(hardware, schedule, stages, energies, timeline, microbatches * samples_per_microbatch)


def stage_times(stages: Sequence[StageCost], hardware: Hardware) -> list[StageTimes]:
    """Return the times of stages for a simulation. Memory is in bits."""
    back = [0.0, *(stage.returned for stage in stages)]
    return [
        StageTimes(
            stage.forward.seconds,
            stage.backward.seconds,
            stage.update.seconds,
            stage.step.seconds,
            link_cost(stage.sent, hardware).seconds,
            link_cost(returned, hardware).seconds,
            stage.kept,
            stage.pending,
        )
        for stage, returned in zip(stages, back, strict=False)
    ]
