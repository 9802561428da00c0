"""The picture of docs/TRAINING_STEP.md: a step with its stages, their clock cycles, and the cut of the graph.

Two seconds. Usage:

    .venv/bin/python docs/images/training_step.py --folder docs/images
"""

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle, RegularPolygon

from aimc_pl.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, styled
from aimc_pl.schedule import Schedule
from aimc_pl.studies.arguments import study_parser

STAGES = (BLUE, ORANGE, GREEN)
"""Colours of stages 0, 1 and 2."""

PALE = ("#dcebf5", "#fdf1d9", "#d9f0e9")
DARK = (BLUE, "#7a5400", "#00664a")
"""The colours of the stages for text on a pale ground."""

INK = BLACK
ON_STAGES = ("white", INK, "white")
"""Colours of text on the colours of the stages: white cannot be read on orange."""

CODE = (
    # line, stage
    ("def training_step(self, batch):", 0),
    ("    x, y = batch", 0),
    ("    h = self.encoder(x)", 0),
    ("    z = self.blocks(h)", 1),
    ("    z = z + h", 1),
    ("    logits = self.head(z)", 2),
    ("    loss = F.cross_entropy(logits, y)", 2),
    ('    self.log("loss", loss)', 2),
    ("    return loss", 2),
)
BOUNDARIES = {3: "blocks", 5: "head"}
"""By the line that calls them."""

NUM_MICROBATCHES = 3


def draw_code(axes: Axes) -> None:
    """The step as it is written, in the colours of its stages."""
    axes.set_title("training_step, as it is written", loc="left", fontweight="bold")
    for number, (line, stage) in enumerate(CODE):
        axes.add_patch(Rectangle((0, -number - 1), 10, 1, color=PALE[stage], linewidth=0))
        axes.text(0.4, -number - 0.5, line, family="monospace", fontsize=11, va="center", color=INK)
    starts = [0, *BOUNDARIES, len(CODE)]
    for stage, (start, end) in enumerate(pairwise(starts)):
        axes.add_patch(Rectangle((0, -end), 0.18, end - start, color=STAGES[stage], linewidth=0))
        axes.text(9.8, -start - 0.5, f"stage {stage}", ha="right", va="center", color=DARK[stage], fontweight="bold")
    for line, name in BOUNDARIES.items():
        axes.plot([0, 10], [-line, -line], color=RED, linestyle=(0, (4, 2)), linewidth=1.6)
        axes.text(10.2, -line, f"boundary:\nwaits at self.{name}", va="center", color=RED)
    axes.text(10.2, -0.5, 'split_at=["blocks", "head"]', family="monospace", fontsize=11, va="center", color=RED)
    axes.text(
        10.2,
        -len(CODE),
        "The step runs once per micro-batch.\nAt a boundary it waits, until a later\nclock lets the next stage begin.",
        va="bottom",
        color=INK,
        linespacing=1.4,
    )
    axes.set(xlim=(-0.05, 15.5), ylim=(-len(CODE) - 0.05, 0.05))
    axes.axis("off")


def draw_clocks(axes: Axes) -> None:
    """Clock cycles by stages, the first micro-batch in colour."""
    schedule = Schedule("async", len(STAGES), NUM_MICROBATCHES)
    num_clocks = schedule.num_clocks(NUM_MICROBATCHES)
    axes.set_title("clock cycles (schedule async), micro-batch 0 in colour", loc="left", fontweight="bold")
    for clock in range(num_clocks):
        for operation in schedule.operations(clock, NUM_MICROBATCHES):
            stage, k, is_first = operation.stage, operation.microbatch, operation.microbatch == 0
            color = STAGES[stage] if is_first else "#ededed"
            axes.add_patch(
                FancyBboxPatch(
                    (clock + 0.07, stage + 0.12),
                    0.86,
                    0.76,
                    boxstyle="round,pad=0,rounding_size=0.08",
                    facecolor=color,
                    edgecolor="white" if operation.kind == "F" else INK if is_first else GREY,
                    linestyle="-" if operation.kind == "F" else ":",
                    linewidth=1.4,
                )
            )
            axes.text(
                clock + 0.5,
                stage + 0.5,
                f"{'forward' if operation.kind == 'F' else 'backward'}\n{k}",
                ha="center",
                va="center",
                fontsize=9,
                color=ON_STAGES[stage] if is_first else "#555555",
            )
            if operation.kind == "B":
                axes.plot(clock + 1, stage + 0.5, "D", color=INK if is_first else GREY, markersize=5, zorder=5)
    for stage, name in enumerate(BOUNDARIES.values()):
        axes.text(stage + 0.9, stage + 1.5, f"waits at\n{name}", ha="right", va="center", color=RED, fontsize=9)
        _arrow(axes, (stage + 0.6, stage + 0.9), (stage + 1.3, stage + 1.1), RED, bend=-0.2)
    axes.plot(0.1, -0.5, "D", color=INK, markersize=5, clip_on=False)
    axes.text(0.25, -0.5, "the stage updates its weights", va="center", color=INK)
    axes.text(-0.15, -0.1, "clock", ha="right", va="center")
    axes.set(xlim=(0, num_clocks + 0.15), ylim=(-0.7, len(STAGES)))
    axes.grid(visible=False)
    for clock in range(num_clocks):
        axes.text(clock + 0.5, -0.1, str(clock), ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([stage + 0.5 for stage in range(len(STAGES))], [f"stage {stage}" for stage in range(len(STAGES))])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_graph(axes: Axes) -> None:
    """The graph of one micro-batch, cut where its stages begin."""
    axes.set_title(
        "autograd's graph of micro-batch 0, its nodes numbered as they are made", loc="left", fontweight="bold"
    )
    edges = (0.0, 2.6, 7.6, 12.6)
    for stage, (start, end) in enumerate(pairwise(edges)):
        axes.add_patch(Rectangle((start, -1.75), end - start, 4.4, color=PALE[stage], linewidth=0))
        axes.text(start + 0.15, 2.35, f"stage {stage}", color=DARK[stage], fontweight="bold", va="center")
        if stage:
            axes.plot([start, start], [-1.75, 2.65], color=RED, linestyle=(0, (4, 2)), linewidth=1.6)
    nodes = {
        "encoder": (1.3, 0, 1),
        "blocks": (4.9, 1, 3),
        "+": (6.7, 1, 4),
        "head": (9.9, 2, 6),
        "loss": (11.7, 2, 7),
    }
    for after, before in (("loss", "head"), ("head", "+"), ("+", "blocks"), ("blocks", "encoder")):
        _arrow(axes, (nodes[after][0] - 0.42, 0), (nodes[before][0] + 0.42, 0), INK)
    _arrow(axes, (6.5, 0.38), (1.5, 0.4), INK, bend=0.32)
    axes.text(4.05, 1.52, "h, past self.blocks", ha="center", va="center", color=INK)
    for name, (x, stage, number) in nodes.items():
        axes.add_patch(Circle((x, 0), 0.42, facecolor=STAGES[stage], edgecolor="white", linewidth=1.5, zorder=4))
        axes.text(x, 0, str(number), ha="center", va="center", color=ON_STAGES[stage], fontweight="bold", zorder=5)
        axes.text(x, 0.66 if name not in ("encoder", "+") else -0.66, name, ha="center", va="center")
        if name in ("encoder", "blocks", "head"):
            below = -1.18 if name != "encoder" else -1.32
            axes.text(
                x,
                below,
                "weights",
                ha="center",
                va="center",
                fontsize=9,
                bbox={"boxstyle": "square,pad=0.3", "facecolor": "white", "edgecolor": STAGES[stage]},
            )
            _arrow(axes, (x, -0.42 if name != "encoder" else -0.82), (x, below + 0.24), STAGES[stage])
    for x, number in ((3.4, 2), (8.4, 5)):
        axes.add_patch(RegularPolygon((x, -1.05), 8, radius=0.42, facecolor=RED, edgecolor="white", zorder=4))
        axes.text(x, -1.05, str(number), ha="center", va="center", color="white", fontweight="bold", zorder=5)
        axes.text(x, -0.48, "sentinel", ha="center", va="center", color=RED)
    for x, y in ((2.6, 0), (2.6, 0.88), (7.6, 0)):
        axes.plot(x, y, "o", color="white", markeredgecolor=RED, markersize=7, markeredgewidth=1.6, zorder=6)
    axes.text(
        0,
        -2.05,
        "autograd runs the newest node first. Stage 2 runs 7 and 6, then sentinel 5, which stops it.\n"
        "What arrives at a cut      is kept for the stage before: 4 and 3, stopped by sentinel 2; then 1.",
        va="top",
        color=INK,
        linespacing=1.5,
    )
    axes.plot(2.22, -2.5, "o", color="white", markeredgecolor=RED, markersize=7, markeredgewidth=1.6)
    axes.set(xlim=(-0.05, 12.65), ylim=(-3.05, 2.7), aspect="equal")
    axes.axis("off")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=11,
            color=color,
            linewidth=1.3,
            shrinkA=0,
            shrinkB=0,
            zorder=3,
        )
    )


@styled
def draw() -> Figure:
    """All three parts."""
    figure = Figure(figsize=(10, 10), layout="constrained", facecolor="white")
    code, clocks, graph = figure.subplots(3, 1, height_ratios=[2.8, 2.7, 4.5])
    draw_code(code)
    draw_clocks(clocks)
    draw_graph(graph)
    return figure


def main() -> None:
    """Write the picture."""
    args = study_parser(__doc__).parse_args()
    draw().savefig(args.folder / "training_step.png", dpi=100)


if __name__ == "__main__":
    main()
