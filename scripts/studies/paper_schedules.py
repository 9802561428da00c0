"""This study makes Figures 2 and 3 of the paper and the tables of its schedules from runs of the pipeline.

Every number of the tables is counted in a run, and is compared with its closed form. The study takes ten seconds.
Usage:

    .venv/bin/python scripts/studies/paper_schedules.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from aimc_pl.diagram import draw_table, draw_text
from aimc_pl.figures import BLUE, RED, styled
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.pipeline import Event, Observer, Pipeline
from aimc_pl.schedule import Operation, Schedule, ScheduleName
from aimc_pl.stage import Stage
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.studies.sweeps import sweep

FIGURE_2 = (Schedule("none", 4, 4), Schedule("sync", 4, 5), Schedule("async", 4, 4))
KINDS = (*((name, "half") for name in get_args(ScheduleName)), ("async", "full"))
STAGES = (1, 2, 4, 8, 16)
MICROBATCHES = (1, 4, 8, 32)


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of schedules, stages and micro-batches."""
    return [
        {"schedule": name, "duplex": duplex, "num_stages": m, "num_microbatches": b}
        for (name, duplex), m, b in product(KINDS, (8,) if quick else STAGES, (8,) if quick else MICROBATCHES)
    ]


class Counter(Observer):
    """An observer that counts clocks and operations and keeps the events of a run."""

    def __init__(self) -> None:
        self.clocks = 0
        self.operations = 0
        self.in_flight = 0
        self.staleness = 0
        self.events: list[tuple[str, Event]] = []

    def on_clock(self, clock: int, operations: Sequence[Operation]) -> None:
        """Count the clock and the accelerators that work in it."""
        self.clocks += 1
        self.operations += len(operations)

    def on_forward(self, event: Event) -> None:
        """Keep the event, and the most micro-batches that a stage has held."""
        self.in_flight = max(self.in_flight, event.in_flight)
        self.events.append(("F", event))

    def on_backward(self, event: Event) -> None:
        """Keep the event."""
        self.events.append(("B", event))

    def on_update(self, event: Event) -> None:
        """Keep the largest staleness."""
        self.staleness = max(self.staleness, event.staleness)


class Scale(nn.Module):
    """A stage with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the input by the weight."""
        return x * self.weight


def count(schedule: Schedule, num_microbatches: int) -> Counter:
    """Run the pipeline from a fill to a drain, with stages of one weight, and return what was counted."""
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
    """Return one row of the table: the closed forms and the counts.

    Raises:
        RuntimeError: if a count differs from its closed form.
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
    """Print the tables of Figure 2 and the number of combinations that were compared."""
    for schedule in FIGURE_2:
        print(draw_text(schedule, schedule.num_microbatches), end="\n\n")
    print(f"{len(rows)} combinations: every count equals its closed form")


def draw() -> dict[str, Figure]:
    """Draw Figures 2 and 3."""
    return {"figure_2": figure_2(), "figure_3": figure_3()}


@styled
def figure_2() -> Figure:
    """Draw the clock tables of the three schedules."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, schedule in zip(figure.subplots(len(FIGURE_2)), FIGURE_2, strict=True):
        draw_table(axes, schedule, 16 if schedule.is_async else schedule.num_microbatches, 32)
    return figure


@styled
def figure_3(num_clocks: int = 12) -> Figure:
    """Draw which input and which weight version every accelerator uses in each clock, in both duplex modes."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
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
                fontsize=9,
                color=BLUE if kind == "F" else RED,
            )
    axes.set(
        xlim=(0, num_clocks),
        ylim=(-0.6, schedule.num_stages - 0.4),
        xlabel="clock" if per_cell == 1 else "clock (two clock cycles each)",
        yticks=range(schedule.num_stages),
        yticklabels=[f"stage {stage}" for stage in range(schedule.num_stages)],
    )
    axes.set_xticks(range(num_clocks), minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", axis="x")
    axes.tick_params(which="both", length=0)
    axes.set_title(f"async, {schedule.duplex} duplex: input xₖ or error δₖ, and the weight version it meets")


def main() -> None:
    """Run the missing cases, print the report and draw the figures."""
    args = study_parser(__doc__).parse_args()
    report(sweep(run, cases(args.quick), args.folder / "paper_schedules.csv", jobs=1))
    for name, figure in draw().items():
        figure.savefig(args.folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
