"""This study asks when an asynchronous pipeline stops paying, in simulated seconds and joules.

A ResNet-20 and a small GPT, all of whose layers are on crossbars, are divided into stages on three kinds of hardware.
One thing is varied at a time: the load of the slowest stage, the latency of links, the time of updates, the number of
stages and of micro-batches. Nothing is trained: the samples that stale updates cost are taken from the studies that
measured them. The study takes two minutes on one core. Usage:

    .venv/bin/python scripts/studies/async_pays.py --folder docs/results
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from math import exp, inf, isfinite, log, nan
from pathlib import Path
from typing import Any

import numpy as np
import paper_accuracy
import paper_stages
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from aimc_pl.cost import PRESETS, Hardware, Quantity, StageCost, count_work, stage_cost
from aimc_pl.cost.estimate import estimate_stages
from aimc_pl.cost.report import engineering
from aimc_pl.devices import convert_to_analog
from aimc_pl.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, styled
from aimc_pl.models import GPT, ResNet
from aimc_pl.schedule import Schedule
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row, read_rows, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep

MEASURED = Path(__file__).parents[2] / "docs" / "results"
NUM_STAGES = 8
NUM_MICROBATCHES = 8
SCHEDULES: dict[str, tuple[Any, Any]] = {
    "sync": ("sync", "half"),
    "zero_bubble": ("zero_bubble", "half"),
    "async": ("async", "half"),
    "async, full duplex": ("async", "full"),
}
ALGORITHMS = ("soft_bounds", "residual_learning", "tiki_taka_v2", "mixed_precision")
"""Devices of the catalogue, by how they learn: pulses, transfers between crossbars, digital gradients."""

KNOBS: dict[str, tuple[float, ...]] = {
    "imbalance": (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0),
    "latency": tuple(10 ** (k / 4) for k in range(-32, -7)),
    "update": (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 10.0),
    "step": (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0, 10.0),
}
"""What is varied. ``imbalance``: the time of the slowest stage over the mean. ``latency``: that of links, in seconds.
``update``: the updates from a micro-batch over its forward and backward. ``step``: what every update takes once, from
however many micro-batches, over the same."""

STAGES = (2, 4, 8, 16)
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
COLORS = {"rasch_2024": BLUE, "marinella_2018": ORANGE, "isaac_2016": GREEN}
LOSS = 0.05
"""The share of the time, or of the speedup, at which links no longer can be ignored."""


def cases(quick: bool) -> list[dict[str, Any]]:
    """Return all cases. A quick run has one hardware and three values of everything that is varied."""
    networks, presets = (list(NETWORKS), list(PRESETS)[:1] if quick else list(PRESETS))
    size = {"num_stages": NUM_STAGES, "num_microbatches": NUM_MICROBATCHES}
    found = []
    for network, hardware in product(networks, presets):
        of = {"network": network, "hardware": hardware}
        plain = of | {"device": "soft_bounds"}
        found += [of | {"device": device} | size | {"knob": "none", "value": 0.0} for device in ALGORITHMS]
        for knob, values in KNOBS.items():
            found += [plain | size | {"knob": knob, "value": value} for value in (values[::8] if quick else values)]
        sizes = {(m, paper_accuracy.NUM_MICROBATCHES) for m in STAGES} | {(NUM_STAGES, b) for b in MICROBATCHES}
        for m, b in sorted(sizes - {(NUM_STAGES, NUM_MICROBATCHES)}):
            found.append(plain | {"num_stages": m, "num_microbatches": b, "knob": "imbalance", "value": 1.0})
    return found


def limit_cases(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of the table of links."""
    presets = list(PRESETS)[:1] if quick else list(PRESETS)
    return [
        {"network": network, "hardware": hardware, "schedule": schedule}
        for network, hardware, schedule in product(NETWORKS, presets, SCHEDULES)
    ]


def resnet(device: str) -> tuple[nn.Module, Callable[[], Tensor], list[str]]:
    """Return a ResNet-20, its step on one image of CIFAR's size, and where its most even eight stages begin."""
    network, image, label = ResNet(20), torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    convert_to_analog(network, device)
    stages = [f"group1.{block}.conv{layer}" for block in range(3) for layer in (1, 2)]
    return network, lambda: F.cross_entropy(network(image), label), [*stages, "group2"]


def gpt(device: str) -> tuple[nn.Module, Callable[[], Tensor], list[str]]:
    """Return a GPT of eight blocks, its step on one text of 64 characters, and where its stages of a block begin."""
    network, text = GPT(64, 8, 128, 4, 64), torch.zeros(1, 64, dtype=torch.int64)
    convert_to_analog(network, device)
    return network, lambda: F.cross_entropy(network(text)[0], text[0]), [f"blocks.{k}" for k in range(1, NUM_STAGES)]


NETWORKS = {"ResNet-20": resnet, "GPT": gpt}


@cache
def stages_of(network: str, hardware: str, device: str) -> list[StageCost]:
    """Return the costs of the eight stages of a network for one sample, with an optimizer like SGD."""
    constants = PRESETS[hardware]
    whole, step, split_at = NETWORKS[network](device)
    works = count_work(whole, step, split_at, int(constants.tile_size.value))
    return [stage_cost(work, constants) for work in works]


def divided(stages: Sequence[StageCost], num_stages: int, slowest: float) -> list[StageCost]:
    """Divide the work of all stages anew: one stage takes ``slowest`` times the mean, the others share the rest.

    The slowest stage is in the middle. Between stages goes the mean of what went between them before.
    """
    middle, rest = num_stages // 2, (1 - slowest / num_stages) / (num_stages - 1)
    return [
        replace(
            stages[0],
            **{name: _sum(stages, name) * (slowest / num_stages if m == middle else rest) for name in _ADDED},
            **{name: _sum(stages, name) / (len(stages) - 1) * (m < num_stages - 1) for name in ("sent", "returned")},
        )
        for m in range(num_stages)
    ]


_ADDED = [field.name for field in fields(StageCost) if field.name not in ("name", "num_tiles", "sent", "returned")]
"""What the parts of a divided stage share. The number of tiles makes no difference to a simulation."""


def _sum(stages: Sequence[StageCost], name: str) -> Any:
    first, *others = (getattr(stage, name) for stage in stages)
    return sum(others, first)


def with_latency(hardware: Hardware, seconds: float) -> Hardware:
    """Return the hardware with links of another latency."""
    return replace(hardware, link_latency=Quantity(seconds, "s", "varied"))


def with_bandwidth(hardware: Hardware, rate: float) -> Hardware:
    """Return the hardware with links of another bandwidth."""
    return replace(hardware, link_bandwidth=Quantity(rate, "bit/s", "varied"))


def per_sample(
    stages: Sequence[StageCost], hardware: Hardware, schedule: str, num_microbatches: int = NUM_MICROBATCHES
) -> tuple[float, float]:
    """Return the seconds and joules of a sample in a long training.

    They are those of six mini-batches, after two in which an asynchronous pipeline fills.
    """
    name, duplex = SCHEDULES[schedule]
    table = Schedule(name, len(stages), num_microbatches, duplex)
    fill, run = (estimate_stages(stages, table, hardware, num_minibatches=n) for n in (2, 8))
    seconds = (run.timeline.makespan - fill.timeline.makespan) / (6 * num_microbatches)
    return seconds, run.joules_per_sample


def run(
    network: str, hardware: str, device: str, num_stages: int, num_microbatches: int, knob: str, value: float
) -> list[dict[str, Any]]:
    """Return the seconds and joules of a sample under every schedule."""
    constants, stages = PRESETS[hardware], stages_of(network, hardware, device)
    if knob == "imbalance":
        stages = divided(stages, num_stages, value)
    elif knob == "latency":
        constants = with_latency(constants, value)
    elif knob in ("update", "step"):
        stages = [replace(stage, **{knob: (stage.forward + stage.backward) * value}) for stage in stages]
    rows = []
    for schedule in SCHEDULES:
        seconds, joules = per_sample(stages, constants, schedule, num_microbatches)
        rows.append({"schedule": schedule, "seconds": seconds, "joules": joules})
    return rows


def run_limits(network: str, hardware: str, schedule: str) -> list[dict[str, float]]:
    """Return the latency and the bandwidth at which a schedule takes 5 % more time than with perfect links.

    For asynchronous schedules also return the latency at which the speedup over ``sync`` is 5 % smaller.
    """
    stages = stages_of(network, hardware, "soft_bounds")
    perfect = with_bandwidth(with_latency(PRESETS[hardware], 0.0), 1e30)

    def seconds(of: Hardware, which: str = schedule) -> float:
        return per_sample(stages, of, which)[0]

    free = seconds(perfect)
    speedup = seconds(perfect, "sync") / free

    def loses_speedup(latency: float) -> bool:
        of = with_latency(perfect, latency)
        return seconds(of, "sync") / seconds(of) < speedup * (1 - LOSS)

    slow = first(lambda latency: seconds(with_latency(perfect, latency)) > free * (1 + LOSS), 1e-10, 1.0)
    narrow = first(lambda period: seconds(with_bandwidth(perfect, 1 / period)) > free * (1 + LOSS), 1e-15, 1.0)
    speedup_slow = first(loses_speedup, 1e-10, 1.0) if schedule.startswith("async") else nan
    return [{"seconds": free, "latency": slow, "bandwidth": 1 / narrow, "latency_of_speedup": speedup_slow}]


def first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return, within 1 %, where a statement about a number begins to hold; infinity if it does not up to ``high``."""
    if not holds(high):
        return inf
    while high > 1.01 * low:
        middle = exp((log(low) + log(high)) / 2)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def ratio(rows: Sequence[Row], quantity: str, schedule: str = "async", over: str = "", static: float = 0.0) -> float:
    """Return the seconds or joules under a synchronous schedule divided by those under another one.

    Args:
        rows: the rows of one case.
        quantity: ``"seconds"`` or ``"joules"``.
        schedule: the schedule that is compared.
        over: the synchronous schedule; by default the one of the two that takes the fewest seconds.
        static: the static power of a stage in watts, whose energy is added.
    """
    values = {}
    for row in rows:
        seconds = float(row["seconds"])
        joules = float(row["joules"]) + static * int(row["num_stages"]) * seconds
        values[row["schedule"]] = {"seconds": seconds, "joules": joules}
    over = over or min(("sync", "zero_bubble"), key=lambda each: values[each]["seconds"])
    return values[over][quantity] / values[schedule][quantity]


def curve(rows: Sequence[Row], field: str, quantity: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of rows, ascending, and for each the ratio of the two schedules."""
    values = sorted({float(row[field]) for row in rows})
    by_value = [[row for row in rows if float(row[field]) == value] for value in values]
    return np.array(values), np.array([ratio(each, quantity, **options) for each in by_value])


def imbalance(stages: Sequence[StageCost]) -> float:
    """Return the time of the slowest stage for a micro-batch over the mean of the stages."""
    times = [(stage.forward + stage.backward + stage.update + stage.step).seconds for stage in stages]
    return max(times) / np.mean(times).item()


def share_of(stages: Sequence[StageCost], part: str) -> float:
    """Return the time of ``"update"`` or ``"step"`` over that of forwards and backwards, summed over the stages."""
    passes = sum((stage.forward + stage.backward).seconds for stage in stages)
    return sum(getattr(stage, part).seconds for stage in stages) / passes


def digits_cost(num_stages: int) -> np.ndarray:
    """Return the updates to accuracy 0.9 on digits with delay over those without, for every seed (τ = ∞)."""
    rows = read_rows(MEASURED / "paper_stages.csv")
    return paper_stages.relative(rows, "accuracy", 0.9, num_stages, duplex="half", tau=inf)


def cifar_cost(num_stages: int, target: float) -> np.ndarray:
    """Return the samples of `async` to an accuracy on CIFAR-10 over those of `sync`, for every seed."""
    rows = read_rows(MEASURED / "paper_accuracy.csv")
    rows = select(rows, epochs=min(paper_accuracy.lengths(rows)))
    prompt, ours = paper_accuracy.learning(rows, "analog"), paper_accuracy.learning(rows, "analog", num_stages)
    epochs = np.arange(1.0, prompt.shape[1] + 1)
    needed = (paper_accuracy.cycles_to(target, accuracies, epochs) for accuracies in (ours, prompt))
    return np.divide(*needed)


def measured() -> Iterator[tuple[str, str, str, Callable[[int], np.ndarray]]]:
    """Yield what staleness costs in samples: name, colour, marker and a function of the number of stages."""
    yield "ResNet-8 on CIFAR-10, to 60 %", BLACK, "o", lambda m: cifar_cost(m, 0.6)
    yield "ResNet-8 on CIFAR-10, to 50 %", RED, "s", lambda m: cifar_cost(m, 0.5)
    yield "64 layers on digits, to 90 %", PURPLE, "^", digits_cost


def hardware_in(rows: Sequence[Row]) -> list[str]:
    """Return the names of the hardware in rows, in the order of the presets."""
    return [name for name in PRESETS if select(rows, hardware=name)]


def report(rows: Sequence[Row], limits: Sequence[Row]) -> None:
    """Print the tables of the page."""
    pairs = [*product(NETWORKS, hardware_in(rows))]
    report_algorithms(rows, pairs)
    report_knobs(rows, pairs)
    report_links(rows, limits, pairs)
    report_accuracy(rows, pairs)


def report_algorithms(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> None:
    """Print the gains of `async` with every algorithm, in time and in energy, on the networks as they are."""
    print("slowest stage over mean; pulses, and work per update, over forward and backward;")
    print("time over async: sync, zero_bubble; energy of sync over async: no static power, 5 W a stage")
    for (network, hardware), device in product(pairs, ALGORITHMS):
        stages = stages_of(network, hardware, device)
        case = select(rows, network=network, hardware=hardware, device=device, knob="none")
        times = ratio(case, "seconds", over="sync"), ratio(case, "seconds", over="zero_bubble")
        energies = ratio(case, "joules", over="sync"), ratio(case, "joules", over="sync", static=5.0)
        print(
            f"{network:<9} {hardware:<14} {device:<17} {imbalance(stages):.2f}; {share_of(stages, 'update'):.3f} "
            f"{share_of(stages, 'step'):.3f}; {times[0]:.2f} {times[1]:.2f}; {energies[0]:.3f} {energies[1]:.2f}"
        )


def report_knobs(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> None:
    """Print the range of the gains over everything that is varied, and from where on a gain is below 5 %."""
    print("\nover the better of sync and zero_bubble: speedup, from where on it is below 1.05, energy")
    for (network, hardware), knob in product(pairs, KNOBS):
        case = varied(rows, network, hardware, knob)
        values, speedups = curve(case, "value", "seconds")
        energies = curve(case, "value", "joules")[1]
        below = [f"{value:.3g}" for value, speedup in zip(values, speedups, strict=True) if speedup < 1 + LOSS]
        print(
            f"{network:<9} {hardware:<14} {knob:<10} {speedups[0]:.2f} to {speedups[-1]:.2f}, most "
            f"{speedups.max():.2f}; from {(below or ['nowhere'])[0]}; {energies[0]:.3f} to {energies[-1]:.3f}"
        )


def report_links(rows: Sequence[Row], limits: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> None:
    """Print at which latency and bandwidth links no longer can be ignored, and their share of the energy."""
    print("\nlatency and bandwidth at which a sample takes 5 % more time, latency at which async gains 5 % less")
    for row in limits:
        units = {"latency": "s", "bandwidth": "bit/s", "latency_of_speedup": "s"}
        found = {key: engineering(float(row[key]), unit) for key, unit in units.items() if isfinite(float(row[key]))}
        texts = "".join(f"{found.get(key, '-'):>16}" for key in units)
        print(f"{row['network']:<9} {row['hardware']:<14} {row['schedule']:<18}{texts}")
    for network, hardware in pairs:
        bits = sum(stage.sent + stage.returned for stage in stages_of(network, hardware, "soft_bounds"))
        case = select(rows, network=network, hardware=hardware, device="soft_bounds", knob="none", schedule="async")
        share = bits * PRESETS[hardware].link_energy.value / float(case[0]["joules"])
        print(f"{network:<9} {hardware:<14} {share:.1%} of the energy")


def report_accuracy(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> None:
    """Print the samples that staleness costs by the number of stages, and what `async` gains in even stages."""
    print("\nsamples that staleness costs, by stages")
    for name, _, _, cost in measured():
        print(f"{name:<30}", *(f"{m}: {cost(m).mean():.2f} ± {half_width(cost(m)):.2f}" for m in STAGES))
    print("speedup in even stages, which is the break-even")
    for network, hardware in pairs:
        for what, (values, speedups) in zip(("stages", "micro-batches"), even(rows, network, hardware), strict=True):
            pairs_of = (f"{value:.0f}: {speedup:.2f}" for value, speedup in zip(values, speedups, strict=True))
            print(f"{network:<9} {hardware:<14} {what:<13}", *pairs_of)


def varied(rows: Sequence[Row], network: str, hardware: str, knob: str) -> list[Row]:
    """Return the rows in which one thing is varied, with eight stages and eight micro-batches."""
    size = {"num_stages": NUM_STAGES, "num_microbatches": NUM_MICROBATCHES}
    return select(rows, network=network, hardware=hardware, knob=knob, **size)


def even(rows: Sequence[Row], network: str, hardware: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the speedups in even stages by the number of stages, and by the number of micro-batches."""
    case = select(rows, network=network, hardware=hardware, knob="imbalance", value=1.0)
    return [
        curve(select(case, num_microbatches=paper_accuracy.NUM_MICROBATCHES), "num_stages", "seconds"),
        curve(select(case, num_stages=NUM_STAGES), "num_microbatches", "seconds"),
    ]


PANELS = {
    "imbalance": ("uneven stages", "slowest stage over mean"),
    "latency": ("slow links", "latency (s)"),
    "update": ("slow pulses", "pulses over\nforward + backward"),
    "step": ("costly updates", "work per update over\nforward + backward"),
}
"""Titles and labels of what is varied."""


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw what `async` gains in time and energy against everything that is varied."""
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    grid = figure.subplots(len(NETWORKS), len(KNOBS), sharex="col", sharey=True)
    for (line, network), (column, knob) in product(enumerate(NETWORKS), enumerate(KNOBS)):
        axes = grid[line, column]
        axes.axhline(1.0, color=GREY, linewidth=1)
        for hardware in hardware_in(rows):
            _draw_knob(axes, rows, network, hardware, knob)
        if knob == "imbalance":
            axes.set_xlim(0.9, 4)
        else:
            axes.set_xscale("log")
        if line == 0:
            axes.set_title(PANELS[knob][0])
        else:
            axes.set_xlabel(PANELS[knob][1])
        if column == 0:
            axes.set_ylabel(f"{network}\nsync over async")
    kinds = {
        "time": {},
        "time, full duplex": {"linestyle": "--", "linewidth": 1.2},
        "energy": {"linestyle": ":"},
        "as modelled": {"linestyle": "none", "marker": "o", "markersize": 5},
        "mixed precision": {"linestyle": "none", "marker": "x"},
    }
    handles = [Line2D([], [], color=COLORS[hardware], linewidth=4) for hardware in hardware_in(rows)]
    handles += [Line2D([], [], color=BLACK, **style) for style in kinds.values()]
    figure.legend(handles, [*hardware_in(rows), *kinds], loc="outside lower center", ncols=4)
    return figure


def _draw_knob(axes: Axes, rows: Sequence[Row], network: str, hardware: str, knob: str) -> None:
    color, case = COLORS[hardware], varied(rows, network, hardware, knob)
    values, speedups = curve(case, "value", "seconds")
    axes.plot(values, speedups, color=color)
    axes.plot(*curve(case, "value", "joules"), ":", color=color)
    stages = stages_of(network, hardware, "soft_bounds")
    if knob == "step":
        own = share_of(stages_of(network, hardware, "mixed_precision"), "step")
        mixed = select(rows, network=network, hardware=hardware, knob="none", device="mixed_precision")
        axes.plot(own, ratio(mixed, "seconds"), "x", color=color)
        return
    if knob == "latency":
        full = curve(case, "value", "seconds", schedule="async, full duplex")
        axes.plot(*full, "--", color=color, linewidth=1.2)
        own = PRESETS[hardware].link_latency.value
    else:
        own = imbalance(stages) if knob == "imbalance" else share_of(stages, "update")
    as_it_is = select(rows, network=network, hardware=hardware, knob="none", device="soft_bounds")
    axes.plot(own, ratio(as_it_is, "seconds"), "o", color=color, markersize=5)


@styled
def draw_accuracy(rows: Sequence[Row]) -> Figure:
    """Draw what `async` gains for every sample, and the samples that staleness costs, which must be fewer."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for network, hardware in product(NETWORKS, hardware_in(rows)):
        style: Any = {"color": COLORS[hardware], "linestyle": "-" if network == "GPT" else "--"}
        for axes, speedups in zip(panels, even(rows, network, hardware), strict=True):
            axes.plot(*speedups, label=f"{network}, {hardware}", **style)
    by_stages, by_microbatches = panels
    lowest = min(cost(NUM_STAGES).mean() for *_, cost in measured())
    for name, color, marker, cost in measured():
        costs = {m: cost(m) for m in STAGES if np.isfinite(cost(m)).all()}
        means, errors = [each.mean() for each in costs.values()], [*map(half_width, costs.values())]
        places = {"o": 0.95, "s": 1.0, "^": 1.05}[marker] * np.array([*costs])  # no bar lies on another
        by_stages.errorbar(places, means, errors, color=color, marker=marker, linestyle="none")
        mean = costs[NUM_STAGES].mean()
        by_microbatches.axhline(mean, color=color, linewidth=1)
        side = "top" if mean == lowest else "bottom"  # no label lies on another
        by_microbatches.text(0.9, mean, name.rpartition(", ")[2], color=color, fontsize=8, va=side)
        by_microbatches.plot([MICROBATCHES[-1]], [mean], color=color, marker=marker, linestyle="none", label=name)
    for axes, positions in ((by_stages, STAGES), (by_microbatches, MICROBATCHES)):
        axes.set_xscale("log", base=2)
        axes.set(xticks=positions, xticklabels=positions, ylim=(0, 8))
    by_stages.text(2, 3.6, "async pays\nbelow the lines")
    by_stages.set(xlabel="stages", ylabel="samples of async\nover samples of sync")
    by_stages.set_title(f"{paper_accuracy.NUM_MICROBATCHES} micro-batches in a mini-batch")
    by_microbatches.set(xlabel="micro-batches in a mini-batch", title=f"{NUM_STAGES} stages")
    figure.legend(*by_microbatches.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    """Run the missing cases, print the tables and draw the figures."""
    args = study_parser(__doc__).parse_args()
    rows = sweep(run, cases(args.quick), args.folder / "async_pays.csv", jobs=1)
    limits = sweep(run_limits, limit_cases(args.quick), args.folder / "async_pays_links.csv", jobs=1)
    report(rows, limits)
    draw(rows).savefig(args.folder / "async_pays.png", dpi=110)
    draw_accuracy(rows).savefig(args.folder / "async_pays_accuracy.png", dpi=110)


if __name__ == "__main__":
    main()
