"""The picture of README.md: a network over four crossbars, and a full asynchronous pipeline beside a synchronous one.

Two seconds. Usage:

    .venv/bin/python docs/images/idea.py --folder docs/images
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from aimc_pl.figures import BLACK, GREY, OPERATIONS, styled
from aimc_pl.schedule import Schedule, ScheduleName
from aimc_pl.studies.arguments import study_parser

NUM_STAGES, NUM_MICROBATCHES, NUM_CYCLES = 4, 4, 28
"""The pipelines that are compared: 28 clock cycles are two mini-batches of the synchronous one."""

FILLED = 8
"""A clock cycle in which the asynchronous pipeline is full."""

FORWARD, BACKWARD = OPERATIONS["F"], OPERATIONS["B"]


def draw_network(axes: Axes) -> None:
    """Draw four crossbars, one for each stage, between which activations go right and errors go left."""
    for stage in range(NUM_STAGES):
        left = 3.6 * stage
        axes.add_patch(
            FancyBboxPatch((left, 0), 2.2, 2.2, boxstyle="round,pad=0,rounding_size=0.12", fc="#f4f4f4", ec=GREY)
        )
        for line in range(5):
            place = 0.3 + 0.4 * line
            axes.plot([left + 0.1, left + 2.1], [place, place], color=GREY, linewidth=1)
            axes.plot([left + place, left + place], [0.1, 2.1], color=GREY, linewidth=1)
            for other in range(5):
                size = 0.05 + 0.09 * ((3 * line + 5 * other + 2 * stage) % 7) / 6
                axes.add_patch(Circle((left + 0.3 + 0.4 * other, place), size, color=BLACK, zorder=3))
        axes.text(left + 1.1, -0.42, f"stage {stage}", ha="center", va="center", fontweight="bold")
        if stage:
            _arrow(axes, (left - 1.33, 1.55), (left - 0.05, 1.55), FORWARD)
            _arrow(axes, (left - 0.05, 0.65), (left - 1.33, 0.65), BACKWARD)
    end = 3.6 * NUM_STAGES - 1.4
    axes.text(-0.25, 1.55, "micro-batches", ha="right", va="center")
    axes.text(end + 0.25, 1.55, "loss", ha="left", va="center")
    axes.text(2.9, 1.72, "activations", ha="center", fontsize=8)
    axes.text(2.9, 0.28, "errors", ha="center", fontsize=8)
    axes.set(xlim=(-2.9, end + 1.4), ylim=(-0.7, 2.35), aspect="equal")
    axes.set_title("A network over four analog accelerators: the weights of a stage stay in its crossbar")
    axes.axis("off")


def draw_pipeline(axes: Axes, name: ScheduleName, first: int, title: str) -> None:
    """Draw what every stage does in some clock cycles of a pipeline that goes on from mini-batch to mini-batch."""
    schedule = Schedule(name, NUM_STAGES, NUM_MICROBATCHES)
    busy, finished = 0, 0
    for clock in range(NUM_CYCLES):
        for kind, stage, k in _operations(schedule, first + clock):
            busy += 1
            finished += kind == "B" and stage == 0
            axes.add_patch(Rectangle((clock + 0.04, stage + 0.08), 0.92, 0.84, color=OPERATIONS[kind], linewidth=0))
            axes.text(clock + 0.5, stage + 0.5, str(k % NUM_MICROBATCHES), ha="center", va="center", fontsize=9)
    share = busy / NUM_STAGES / NUM_CYCLES
    axes.set(
        xlim=(0, NUM_CYCLES),
        ylim=(0, NUM_STAGES),
        yticks=[stage + 0.5 for stage in range(NUM_STAGES)],
        yticklabels=[f"stage {stage}" for stage in range(NUM_STAGES)],
        xticks=range(0, NUM_CYCLES + 1, 2),
        title=f"{title}: stages work in {share:.0%} of the clock cycles, and finish {finished} micro-batches",
    )
    axes.set_facecolor("#f4f4f4")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _operations(schedule: Schedule, clock: int) -> list[tuple[str, int, int]]:
    if schedule.is_async:
        return [*schedule.operations(clock, FILLED + NUM_CYCLES)]
    return [*schedule.operations(clock % schedule.num_clocks(), NUM_MICROBATCHES)]


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=color, **style))


@styled
def draw() -> Figure:
    """Draw the network and both pipelines on common axes."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    network, sync, full = figure.subplots(3, height_ratios=[2.3, 2, 2])
    draw_network(network)
    draw_pipeline(sync, "sync", 0, "Synchronous")
    draw_pipeline(full, "async", FILLED, "Asynchronous, once it is full")
    for end in (NUM_CYCLES / 2, NUM_CYCLES):
        sync.axvline(end, color=BLACK, linewidth=2.5)
    sync.text(13.8, 3.5, "all stages\nare updated", ha="right", va="center", fontsize=9)
    full.set_xlabel("clock cycle (the time of one forward or one backward of a micro-batch at a stage)")
    keys = [Rectangle((0, 0), 1, 1, color=color) for color in (FORWARD, BACKWARD)]
    names = ["forward", "backward (async: with an update of the stage)"]
    figure.legend(keys, names, loc="outside lower center", ncols=2, handlelength=1.2)
    return figure


def main() -> None:
    """Write the picture."""
    args = study_parser(__doc__).parse_args()
    draw().savefig(args.folder / "idea.png", dpi=110)


if __name__ == "__main__":
    main()
