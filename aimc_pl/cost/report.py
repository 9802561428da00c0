"""This module prints and draws estimates, and lists the constants of hardware with their sources."""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from aimc_pl.cost.constants import OTHER_VALUES, Hardware, spread
from aimc_pl.cost.estimate import Estimate
from aimc_pl.cost.stages import PARTS
from aimc_pl.schedule import Schedule

_SHARE_IN_PICTURE = 4
"""How many mini-batches a picture shows. More could not be read."""


def constants_table(hardware: Hardware) -> str:
    """Return a table of all constants: name, value, range over the sources if they disagree, and source."""
    rows = [("constant", "value", "all sources", "source")]
    for name, unit, what, quantity in hardware.rows():
        least, most = spread(name)
        is_range = least.value != most.value
        between = f"{engineering(least.value, unit)} to {engineering(most.value, unit)}" if is_range else ""
        rows.append((f"{name}: {what}", engineering(quantity.value, unit), between, quantity.source))
    others = [
        f"{name}: {engineering(q.value, q.unit)}, {q.source}" for name, all_ in OTHER_VALUES.items() for q in all_
    ]
    return "\n".join([_aligned(rows), "", "Further sources:", *others])


def stages_table(estimate: Estimate) -> str:
    """Return a table with a line for each stage: its tiles, times, energy, memory and load."""
    rows = [
        ("stage", "begins with", "tiles", "forward", "backward", "update", "energy/sample", "memory", "busy"),
        *(
            (
                str(index),
                stage.name or "the step",
                str(stage.num_tiles),
                engineering(stage.forward.seconds, "s"),
                engineering(stage.backward.seconds, "s"),
                engineering(stage.update.seconds + stage.step.seconds, "s"),
                engineering(energy.energy / estimate.num_samples, "J"),
                engineering(peak / 8, "B"),
                f"{100 * estimate.timeline.busy(index) / estimate.timeline.makespan:.0f} %",
            )
            for index, (stage, energy, peak) in enumerate(
                zip(estimate.stages, estimate.energies, estimate.timeline.peaks, strict=True)
            )
        ),
    ]
    return _aligned(rows)


def comparison_table(estimates: Sequence[Estimate], heading: str) -> str:
    """Return a table with a line for each estimate, and the speedup over the first of them.

    Args:
        estimates: the estimates, of several schedules or of several hardwares.
        heading: what differs between them: ``"schedule"`` or ``"hardware"``.
    """
    first = estimates[0].seconds_per_sample
    rows = [(heading, "time/sample", "speedup", "utilization", "energy/sample", "memory")]
    for each in estimates:
        rows.append(
            (
                each.hardware.name if heading == "hardware" else schedule_name(each.schedule),
                engineering(each.seconds_per_sample, "s"),
                f"{first / each.seconds_per_sample:.2f}" if heading == "schedule" else "",
                f"{each.timeline.utilization:.2f}",
                engineering(each.joules_per_sample, "J"),
                engineering(max(each.timeline.peaks) / 8, "B"),
            )
        )
    return _aligned(rows)


def energy_line(estimate: Estimate) -> str:
    """Return a line that says what the energy is spent on."""
    spent = {part: sum(cost.joules.get(part, 0.0) for cost in estimate.energies) for part in PARTS}
    whole = sum(spent.values()) or 1.0
    shares = [f"{PARTS[part]} {100 * energy / whole:.1f} %" for part, energy in spent.items() if energy]
    return f"energy: {', '.join(shares)}"


def schedule_name(schedule: Schedule) -> str:
    """Return the name of a schedule, with its duplex if it is full, and how many micro-batches an update sums up."""
    duplex = ", full duplex" if schedule.duplex == "full" else ""
    accumulation = f", updates from {schedule.accumulate}" if schedule.accumulate > 1 else ""
    return f"{schedule.name}{duplex}{accumulation}"


def draw_estimate(estimate: Estimate) -> Figure:
    """Return a figure: what each stage does when, and what each stage spends its energy on."""
    stages = len(estimate.stages)
    figure = Figure(figsize=(12, 0.4 * stages + 5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(0.25 * stages + 1.5, 2.5))
    _draw_timeline(above, estimate)
    _draw_energy(below, estimate)
    return figure


def _draw_timeline(axes: Axes, estimate: Estimate) -> None:
    schedule = estimate.schedule
    shown = _SHARE_IN_PICTURE * schedule.num_microbatches
    spans = [span for span in estimate.timeline.spans if span.microbatch < shown]
    colours, hatches = colormaps["tab20"], {"F": None, "B": "////", "W": "....", "U": "xxxx"}
    for span in spans:
        axes.add_patch(
            Rectangle(
                (span.start, span.stage + 0.1),
                span.end - span.start,
                0.8,
                facecolor=colours(span.microbatch % 20),
                edgecolor="white",
                linewidth=0.3,
                hatch=hatches[span.kind],
            )
        )
    axes.set(
        xlim=(0, max(span.end for span in spans)),
        ylim=(0, len(estimate.stages)),
        xlabel="time",
        yticks=[stage + 0.5 for stage in range(len(estimate.stages))],
        yticklabels=[f"stage {stage}" for stage in range(len(estimate.stages))],
    )
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    third = ", gradient of weights dotted" if schedule.splits_backward else ""
    title = f"{schedule_name(schedule)} on {estimate.hardware.name} (backward hatched{third}, update crossed)"
    axes.set_title(title)


def _draw_energy(axes: Axes, estimate: Estimate) -> None:
    stages = range(len(estimate.stages))
    bottom = [0.0 for _ in stages]
    for part, label in PARTS.items():
        heights = [cost.joules.get(part, 0.0) / estimate.num_samples for cost in estimate.energies]
        if any(heights):
            axes.bar(stages, heights, bottom=bottom, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="stage", ylabel="energy per sample", xticks=[*stages])
    axes.yaxis.set_major_formatter(EngFormatter("J"))
    axes.legend(fontsize=8)


def engineering(value: float, unit: str) -> str:
    """Return a number with a prefix of its unit, such as ``"40 ns"``."""
    return EngFormatter(unit, places=2)(value).replace(".00 ", " ").rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
