"""Figures 2 and 3 of the paper and the tables of its schedules, from the operations that the engine runs.

Every number of the table is counted in a run of the pipeline, and stands beside its closed form. Ten seconds. Usage:

    .venv/bin/python scripts/studies/paper_schedules.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from aimc_pl.diagram import draw_table, draw_text
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.pipeline import Event, Observer, Pipeline
from aimc_pl.schedule import Operation, Schedule
from aimc_pl.stage import Stage
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.studies.sweeps import sweep

FIGURE_2 = (Schedule("none", 4, 4), Schedule("sync", 4, 5), Schedule("async", 4, 4))
KINDS = (("none", "half"), ("sync", "half"), ("1f1b", "half"), ("async", "half"), ("async", "full"))
STAGES = (1, 2, 4, 8, 16)
MICROBATCHES = (1, 4, 8, 32)


def cases(quick: bool) -> list[dict[str, Any]]:
    """Schedules, stages and micro-batches."""
    return [
        {"schedule": name, "duplex": duplex, "num_stages": m, "num_microbatches": b}
        for (name, duplex), m, b in product(KINDS, (8,) if quick else STAGES, (8,) if quick else MICROBATCHES)
    ]


class Counter(Observer):
    """What happened, and when."""

    def __init__(self) -> None:
        self.clocks = 0
        self.operations = 0
        self.in_flight = 0
        self.staleness = 0
        self.events: list[tuple[str, Event]] = []

    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        """Count clocks and busy accelerators."""
        self.clocks += 1
        self.operations += len(operations)

    def on_forward(self, event: Event) -> None:
        """Note the most micro-batches that a stage holds."""
        self.in_flight = max(self.in_flight, event.in_flight)
        self.events.append(("F", event))

    def on_backward(self, event: Event) -> None:
        """Note it."""
        self.events.append(("B", event))

    def on_update(self, event: Event) -> None:
        """Note the largest staleness."""
        self.staleness = max(self.staleness, event.staleness)


class Scale(nn.Module):
    """A stage of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """The number times the weight."""
        return x * self.weight


def count(schedule: Schedule, num_microbatches: int) -> Counter:
    """Run the pipeline from a fill to a drain, with stages of one weight."""
    counter = Counter()
    network = nn.Sequential(*(Scale() for _ in range(schedule.num_stages)))
    stages = [Stage(index) for index in range(schedule.num_stages)]
    step = StagedStep(network, [str(m) for m in range(1, schedule.num_stages)], stages, delayed=schedule.is_async)
    pipeline = Pipeline(stages, schedule, lambda _: None, [counter])
    with step.running():
        pipeline.run([Flight(step, lambda: network(torch.ones(1)).sum()) for _ in range(num_microbatches)])
        pipeline.drain()
    if not schedule.is_async:
        pipeline.updated()
    return counter


def run(schedule: Any, duplex: Any, num_stages: int, num_microbatches: int) -> list[dict[str, Any]]:
    """One line of the table: closed forms and counts.

    Raises:
        RuntimeError: if they differ.
    """
    plan = Schedule(schedule, num_stages, num_microbatches, duplex)
    counter = count(plan, num_microbatches)
    cycles = counter.clocks * plan.cycles_per_clock
    closed = {
        "cycles": plan.num_cycles(),
        "density": plan.density(),
        "speedup": plan.speedup(),
        "in_flight": plan.in_flight(0),
        "staleness": max(plan.staleness(0, k) for k in range(num_microbatches)),
    }
    counted = {
        "cycles": cycles,
        "density": counter.operations / cycles / num_stages,
        "speedup": counter.operations / cycles,
        "in_flight": counter.in_flight,
        "staleness": counter.staleness,
    }
    if any(abs(closed[key] - counted[key]) > 1e-12 for key in closed):
        raise RuntimeError(f"{plan}: the closed forms are {closed}, and {counted} was counted")
    return [{f"{key}_{kind}": v[key] for key in closed for kind, v in (("closed", closed), ("counted", counted))}]


def report(rows: Sequence[Row]) -> None:
    """Print the tables of Figure 2, and how much was compared."""
    for schedule in FIGURE_2:
        print(draw_text(schedule, schedule.num_microbatches), end="\n\n")
    print(f"{len(rows)} combinations: every count equals its closed form")


def draw() -> dict[str, Figure]:
    """Figures 2 and 3."""
    return {"figure_2": figure_2(), "figure_3": figure_3()}


def figure_2() -> Figure:
    """The clock tables of the three schedules."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    for axes, schedule in zip(figure.subplots(len(FIGURE_2)), FIGURE_2, strict=True):
        draw_table(axes, schedule, 16 if schedule.is_async else schedule.num_microbatches, 32)
    return figure


def figure_3(num_clocks: int = 24) -> Figure:
    """Which input and which weight version every accelerator uses in each clock, in both duplex modes."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axes, duplex in zip(figure.subplots(2), ("half", "full"), strict=True):
        _versions(axes, Schedule("async", 4, 1, duplex), num_clocks)
    return figure


def _versions(axes: Axes, schedule: Schedule, num_clocks: int) -> None:
    per_cell = schedule.cycles_per_clock
    for kind, event in count(schedule, num_clocks).events:
        if event.clock < num_clocks:
            offset = 0.25 if kind == "B" and per_cell == 2 else -0.25 if per_cell == 2 else 0.0
            axes.text(
                event.clock + 0.5,
                event.stage.index + offset,
                f"{'x' if kind == 'F' else 'δ'}{event.microbatch} w{event.version}",
                ha="center",
                va="center",
                fontsize=7,
                color="tab:blue" if kind == "F" else "tab:red",
            )
    axes.set(
        xlim=(0, num_clocks),
        ylim=(-0.6, schedule.num_stages - 0.4),
        xlabel="clock" if per_cell == 1 else "clock (two clock cycles each)",
        yticks=range(schedule.num_stages),
        yticklabels=[f"stage {stage}" for stage in range(schedule.num_stages)],
    )
    axes.set_xticks(range(num_clocks), minor=True)
    axes.grid(which="minor", axis="x", alpha=0.3)
    axes.set_title(
        f"async, {schedule.duplex} duplex: input xₖ or error δₖ, and the weight version it meets", fontsize=10
    )


def main() -> None:
    """Count and compare what is missing, report and draw."""
    args = study_parser(__doc__).parse_args()
    report(sweep(run, cases(args.quick), args.folder / "paper_schedules.csv", jobs=1))
    for name, figure in draw().items():
        figure.savefig(args.folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
