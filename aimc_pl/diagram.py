"""This module draws a schedule as the paper's Figure 2 does, as text and as a figure."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from aimc_pl.arguments import check_instance, check_number
from aimc_pl.figures import OPERATIONS, styled
from aimc_pl.schedule import Schedule

MAX_DRAWN_STAGES = 32
MAX_DRAWN_CLOCKS = 256
"""The most stages and clocks that are drawn on request. A larger drawing takes minutes and cannot be read."""


def draw_text(schedule: Schedule, num_microbatches: int) -> str:
    """Return the clock table from the fill to the drain of some micro-batches, with the last stage on top.

    Args:
        schedule: the schedule to draw.
        num_microbatches: K, the number of micro-batches between fill and drain.

    Raises:
        UsageError: if an argument is of another type, or below 1.
    """
    _check(schedule, num_microbatches)
    cells = _cells(schedule, num_microbatches)
    clocks = range(schedule.num_clocks(num_microbatches))
    table = [[str(clock) for clock in clocks]]
    table += [
        ["/".join(f"{kind}{k}" for kind, k in cells.get((stage, clock), [])) for clock in clocks]
        for stage in reversed(range(schedule.num_stages))
    ]
    width = max(len(cell) for row in table for cell in row) + 1
    names = ["clock", *(f"stage {stage}" for stage in reversed(range(schedule.num_stages)))]
    margin = max(map(len, names))
    return "\n".join(
        f"{name:<{margin}} " + "".join(f"{cell:>{width}}" for cell in row)
        for name, row in zip(names, table, strict=True)
    )


@styled
def draw_figure(schedule: Schedule, num_microbatches: int, num_clocks: int | None = None) -> Figure:
    """Return the clock table as a figure, with the number of the micro-batch in each operation.

    Args:
        schedule: the schedule to draw.
        num_microbatches: K, the number of micro-batches between fill and drain.
        num_clocks: the number of clocks to show, by default all.

    Raises:
        UsageError: if an argument is of another type, or below 1.
    """
    _check(schedule, num_microbatches)
    if num_clocks is not None:
        check_number("num_clocks", num_clocks, at_least=1, whole=True)
    clocks = schedule.num_clocks(num_microbatches) if num_clocks is None else num_clocks
    stages = schedule.num_stages
    # Up to 32 clocks fit into the width of a page, where the numbers can be read.
    width = max(4.0, min(0.34 * clocks + 1.2, max(10.0, 0.27 * clocks + 1.2)))
    figure = Figure(figsize=(width, 0.42 * stages + 1.1), layout="constrained")
    draw_table(figure.subplots(), schedule, num_microbatches, clocks)
    return figure


@styled
def draw_thumbnail(schedule: Schedule, num_microbatches: int, num_clocks: int) -> Figure:
    """Return the clock table as a figure that can be read at a width of 300 pixels.

    The figure has no numbers if there is no room for them. The arguments are those of :func:`draw_figure`.
    """
    stages = schedule.num_stages
    figure = Figure(figsize=(3.2, max(1.7, min(0.19 * stages, 3.0) + 0.75)), dpi=200, layout="constrained")
    axes = figure.subplots()
    draw_table(axes, schedule, num_microbatches, num_clocks, numbers=max(num_clocks, stages) <= 16)
    axes.set_title(axes.get_title(loc="left"), fontsize=7.5, fontweight="normal")
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_fontsize(8)
    every = -(-stages // 8)
    axes.set_yticks([stage + 0.5 for stage in range(0, stages, every)])
    axes.set_yticklabels([f"stage {stage}" for stage in range(0, stages, every)])
    return figure


def draw_table(axes: Axes, schedule: Schedule, num_microbatches: int, clocks: int, numbers: bool = True) -> None:
    """Draw the table of :func:`draw_figure` into one part of a figure, ``axes``, as far as ``clocks`` clocks.

    The numbers of the micro-batches can be left out.
    """
    stages = schedule.num_stages
    for (stage, clock), operations in _cells(schedule, num_microbatches).items():
        if clock >= clocks:
            continue
        height = 1 / len(operations)
        for row, (kind, k) in enumerate(operations):
            bottom = stage + row * height
            line = {"edgecolor": "white", "linewidth": 1.5 if numbers else 0.5}
            axes.add_patch(Rectangle((clock, bottom), 1, height, facecolor=OPERATIONS[kind], **line))
            if numbers:
                axes.text(clock + 0.5, bottom + height / 2, str(k), ha="center", va="center", fontsize=8)
    axes.set(
        xlim=(0, clocks),
        ylim=(0, stages),
        xlabel="clock" if schedule.cycles_per_clock == 1 else "clock (two clock cycles each)",
        yticks=[stage + 0.5 for stage in range(stages)],
        yticklabels=[f"stage {stage}" for stage in range(stages)],
    )
    third = ", gradient (green)" if schedule.splits_backward else ""
    axes.set_title(f"{schedule.name}: forward (blue), backward (orange){third}", fontsize=10)
    axes.set_facecolor("whitesmoke")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _check(schedule: Schedule, num_microbatches: int) -> None:
    check_instance("schedule", schedule, Schedule, "a Schedule")
    check_number("num_microbatches", num_microbatches, at_least=1, whole=True)


def _cells(schedule: Schedule, num_microbatches: int) -> dict[tuple[int, int], list[tuple[str, int]]]:
    cells: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for clock, operations in enumerate(schedule.clocks(num_microbatches)):
        for kind, stage, k in operations:
            cells.setdefault((stage, clock), []).append((kind, k))
    return cells
