"""This module estimates time, energy and memory of a schedule, from the work of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from aimc_pl.cost.constants import Hardware
from aimc_pl.cost.simulation import Simulation, StageTimes, Timeline, simulate
from aimc_pl.cost.stages import Cost, StageCost, link_cost, stage_cost, with_spills
from aimc_pl.cost.work import Work
from aimc_pl.schedule import Operation, Schedule


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
    optimizer_states: float = 0,
    num_minibatches: int = 1,
) -> Estimate:
    """Estimate the cost of training some mini-batches.

    Args:
        works: what each stage does for one micro-batch.
        schedule: the schedule.
        hardware: the constants of the hardware.
        samples_per_microbatch: the number of samples in a micro-batch.
        optimizer_states: the numbers that the optimizer keeps for each digital parameter that learns.
        num_minibatches: the number of mini-batches. An asynchronous pipeline drains after the last of them only.
    """
    stages = [stage_cost(work, hardware, optimizer_states) for work in works]
    return estimate_stages(stages, schedule, hardware, samples_per_microbatch, num_minibatches)


def estimate_stages(
    stages: Sequence[StageCost],
    schedule: Schedule,
    hardware: Hardware,
    samples_per_microbatch: float = 1.0,
    num_minibatches: int = 1,
) -> Estimate:
    """Estimate the cost of training some mini-batches, from the costs of stages whose activations all fit.

    The arguments are those of :func:`estimate`.
    """
    stages = with_spills(stages, schedule, hardware)
    timeline = simulate(schedule, stage_times(stages, hardware), hardware.link_latency.value, num_minibatches)
    microbatches = num_minibatches * schedule.num_microbatches
    steps = ceil(microbatches / schedule.accumulate) if schedule.is_async else num_minibatches
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
            stage.gradient.seconds,
            stage.deferred,
        )
        for stage, returned in zip(stages, back, strict=False)
    ]


class Meter:
    """Counts the simulated seconds and joules of a run, clock by clock.

    All micro-batches count as the one whose work was counted.

    Args:
        works: what each stage does for one micro-batch.
        schedule: the schedule.
        hardware: the constants of the hardware.
        optimizer_states: the numbers that the optimizer keeps for each digital parameter that learns.
    """

    def __init__(
        self, works: Sequence[Work], schedule: Schedule, hardware: Hardware, optimizer_states: float = 0
    ) -> None:
        self._stages = with_spills([stage_cost(work, hardware, optimizer_states) for work in works], schedule, hardware)
        self._back = [0.0, *(stage.returned for stage in self._stages)]
        self._hardware = hardware
        times = stage_times(self._stages, hardware)
        self._simulation = Simulation(schedule, times, hardware.link_latency.value, keeps_timeline=False)
        self._energy = 0.0

    @property
    def seconds(self) -> float:
        """The time until now."""
        return self._simulation.seconds

    @property
    def joules(self) -> float:
        """The energy until now, of all stages."""
        return self._energy + len(self._stages) * self._hardware.static_power.value * self.seconds

    def clock(self, operations: Sequence[Operation], running: Schedule | None = None) -> None:
        """Count the operations of one clock (see :meth:`aimc_pl.cost.simulation.Simulation.clock`)."""
        for kind, index, _ in operations:
            if kind == "W":
                continue  # its energy is a part of the backward's
            stage = self._stages[index]
            own = stage.forward if kind == "F" else stage.backward + stage.update
            bits = stage.sent if kind == "F" else self._back[index]
            self._energy += own.energy + link_cost(bits, self._hardware).energy
        self._simulation.clock(operations, running)

    def update(self, index: int, microbatch: int) -> None:
        """Count an update of a stage.

        Args:
            index: the stage.
            microbatch: the last micro-batch of the update, counted from the fill.
        """
        self._energy += self._stages[index].step.energy
        # A pipeline tells of an update within a clock before it tells of the clock, whose simulation makes the update.
        if self._simulation.awaits_update(index, microbatch):
            self._simulation.update(index)
