"""This study counts the updates to a target while the number of stages grows.

The paper bounds the staleness by a constant, but in a pipeline the staleness grows with the number of stages. The study
trains a deep and narrow residual network on real digits: 64 layers in 1 to 64 stages, on devices of the paper's
expected motion. For every number of stages, device and target, a learning rate is chosen with other seeds and on
held-out images. Then the updates with this rate are counted. A run that does not reach its target is censored: the
study prints medians and their intervals from order statistics, for which only the rank of such a run counts. Usage:

    .venv/bin/python scripts/studies/paper_stages.py --folder docs/results
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from aimc_pl.errors import UsageError
from aimc_pl.figures import THINGS, styled
from aimc_pl.schedule import Duplex, Schedule
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.ensemble import Crossbars, EnsemblePipeline
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import estimate, median_interval
from aimc_pl.studies.sweeps import sweep

MICROBATCH_SIZE = 8
DEPTH = 64
WIDTH = 16
LEARNING_RATES = tuple(2 / 1.6**k for k in range(11))
EASY = (("loss", 0.5), ("loss", 0.25), ("accuracy", 0.8), ("accuracy", 0.9))
TARGETS = {4.0: EASY, inf: (*EASY, ("loss", 0.1), ("accuracy", 0.94))}
"""Metrics and their values to reach, by τ. With τ = 4, one stage takes 5,000 updates or more to the two others."""

EVERY = 10
"""The number of updates from one evaluation to the next. Later it is a twentieth of the updates so far."""

PIPELINES: tuple[tuple[int, Duplex], ...] = (
    *((num_stages, "half") for num_stages in (1, 2, 4, 8, 16, 32, 64)),
    *((num_stages, "full") for num_stages in (4, 16, 64)),
)
NUM_UPDATES = 6000
"""The number of updates after which a run gives up."""

TUNING_SEEDS = 3
Device = Mapping[str, Any]
Target = tuple[str, float]


def tuning_cases(quick: bool) -> list[dict[str, Any]]:
    """Return the pipelines and ranges whose learning rates are to be chosen. A quick run has two of them."""
    pipelines, ranges, num_updates = (PIPELINES[:2], [inf], 60) if quick else (PIPELINES, TARGETS, NUM_UPDATES)
    return [
        {"num_stages": m, "duplex": duplex, "tau": tau, "num_seeds": TUNING_SEEDS, "num_updates": num_updates}
        for tau, (m, duplex) in product(ranges, pipelines)
    ]


def cases(rates: Sequence[Row], num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return the same pipelines and ranges with the learning rates that were chosen, one for each target."""
    found = []
    for case in tuning_cases(quick):
        of_case = select(rates, **case)
        chosen = tuple(best_rate(of_case, *target) for target in TARGETS[case["tau"]])
        found.append(case | {"num_seeds": num_seeds, "learning_rates": chosen})
    return found


class Residual(nn.Module):
    """A residual layer: x + tanh(Wx)·scale."""

    def __init__(self, crossbars: Crossbars, scale: float) -> None:
        super().__init__()
        self.crossbars = crossbars
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``(copies, batch, width)`` of inputs of the same shape."""
        return x + torch.tanh(self.crossbars(x)) * self.scale


class Digits:
    """Real digits of 4x4 pixels: every fifth image is a test image.

    Args:
        tuning: evaluate on every tenth image instead of the test images. These images are then not trained on.
    """

    def __init__(self, tuning: bool = False) -> None:
        data: Any = load_digits()
        images = F.avg_pool2d(torch.from_numpy(data.images).float(), 2).flatten(1)
        x, y = (images - images.mean(0)) / images.std(), torch.from_numpy(data.target)
        test = torch.arange(len(x)) % 5 == 0
        held_out = torch.arange(len(x)) % 10 == 1 if tuning else test
        train = ~(test | held_out)
        self.x, self.y = x[train], y[train]
        self.x_held_out, self.y_held_out = x[held_out], y[held_out]


def build(depth: int, seed: Tensor, device: Device, generator: Generator) -> list[nn.Module]:
    """Return the layers of all copies. Copies with the same seed start from the same weights."""
    modules: list[nn.Module] = []
    for layer in range(depth):
        out_size = 10 if layer == depth - 1 else WIDTH
        weight = torch.randn(int(seed.max()) + 1, out_size, WIDTH, generator=generator) / WIDTH**0.5
        crossbars = Crossbars(weight[seed], generator, **device)
        modules.append(Residual(crossbars, depth**-0.5) if 0 < layer < depth - 1 else crossbars)
    return modules


def count_updates(
    depth: int,
    num_stages: int,
    duplex: Duplex,
    device: Device,
    rate: Tensor,
    seed: Tensor,
    targets: Sequence[Target],
    num_updates: int,
    is_done: Callable[[Tensor], bool],
    tuning: bool = False,
) -> Tensor:
    """Train copies of the network and return their updates to every target ``(copies, targets)``, or infinity.

    Args:
        depth: number of layers.
        num_stages: of the asynchronous pipeline; one stage has no delay.
        duplex: of the pipeline.
        device: arguments of the crossbars.
        rate: learning rate of every copy.
        seed: of every copy, for weights and the order of samples.
        targets: metrics and their values to reach.
        num_updates: the number of updates after which the training gives up.
        is_done: a function of the result so far that says when the training may end earlier.
        tuning: evaluate on images that are kept for the choice of learning rates, with other weights for each seed.
    """
    torch.set_flush_denormal(True)
    generator = Generator().manual_seed(int(tuning))
    modules = build(depth, seed, device, generator)
    pipeline = EnsemblePipeline(modules, num_stages, rate.view(-1, 1, 1), duplex)
    data, network = Digits(tuning), nn.Sequential(*modules)
    reached = torch.full((len(rate), len(targets)), inf)
    update = 0
    while update < num_updates and not is_done(reached):
        more = min(max(EVERY, update // 20), num_updates - update)
        pipeline.run([sample(data, seed, generator) for _ in range(more)])
        update += more
        loss, accuracy = evaluate(network, data)
        hits = [loss <= value if metric == "loss" else accuracy >= value for metric, value in targets]
        reached = torch.where(torch.stack(hits, 1) & reached.isinf(), update, reached)
    return reached


def sample(data: Digits, seed: Tensor, generator: Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a micro-batch of random training images and its loss. Copies with the same seed get the same images."""
    chosen = torch.randint(len(data.x), (int(seed.max()) + 1, MICROBATCH_SIZE), generator=generator)[seed]
    labels = data.y[chosen]
    return data.x[chosen], lambda output: F.cross_entropy(output.mT, labels, reduction="none").mean(1)


@torch.no_grad()
def evaluate(network: nn.Module, data: Digits, count: int = 240) -> tuple[Tensor, Tensor]:
    """Return the loss of some training images and the accuracy of the images held out, both ``(copies,)``."""
    output = network(torch.cat([data.x[:count], data.x_held_out])[None])
    labels = data.y[:count].expand(len(output), -1)
    loss = F.cross_entropy(output[:, :count].mT, labels, reduction="none").mean(1)
    return loss, (output[:, count:].argmax(2) == data.y_held_out).float().mean(1)


def tune(num_stages: int, duplex: Duplex, tau: float, num_seeds: int, num_updates: int) -> list[dict[str, Any]]:
    """Return, for every learning rate and target, the median of the updates over the seeds.

    The training ends when the best rate for every target is known. The medians that are greater are then infinite.
    """
    seed, rate = torch.arange(num_seeds).repeat(len(LEARNING_RATES)), torch.tensor(LEARNING_RATES)

    def medians(reached: Tensor) -> Tensor:
        return reached.unflatten(0, (-1, num_seeds)).median(1).values

    reached = count_updates(
        DEPTH,
        num_stages,
        duplex,
        {"tau": tau},
        rate.repeat_interleave(num_seeds),
        seed,
        TARGETS[tau],
        num_updates,
        lambda reached: bool(medians(reached).amin(0).isfinite().all()),
        tuning=True,
    )
    return [
        {"learning_rate": LEARNING_RATES[r], "metric": metric, "target": target, "updates": float(updates[t])}
        for r, updates in enumerate(medians(reached))
        for t, (metric, target) in enumerate(TARGETS[tau])
    ]


def best_rate(rows: Sequence[Row], metric: str, target: float) -> float | None:
    """Return the rate with the fewest updates, the middle one of equals, or ``None`` if none reaches the target.

    Raises:
        UsageError: if the rate is the first or the last of the grid, which may miss a better one.
    """
    updates = {float(row["learning_rate"]): float(row["updates"]) for row in select(rows, metric=metric, target=target)}
    fewest = min(updates.values())
    if fewest == inf:
        return None
    best = [rate for rate, needed in updates.items() if needed == fewest]
    if {min(updates), max(updates)} & set(best):
        raise UsageError(
            f"the best learning rate to {metric} {target} is at an edge of the grid ({best}): extend LEARNING_RATES"
        )
    return best[len(best) // 2]


def run(
    num_stages: int,
    duplex: Duplex,
    tau: float,
    num_seeds: int,
    num_updates: int,
    learning_rates: Sequence[float | None],
) -> list[dict[str, Any]]:
    """Return, for every seed and target, the updates with the target's rate, or infinity if the run gave up."""
    rates = sorted({rate for rate in learning_rates if rate})
    which = [(t, rates.index(rate)) for t, rate in enumerate(learning_rates) if rate]

    def chosen(reached: Tensor) -> Tensor:
        by_rate = reached.unflatten(0, (len(rates), num_seeds))
        return torch.stack([by_rate[r, :, t] for t, r in which])

    seed, rate = torch.arange(num_seeds).repeat(len(rates)), torch.tensor(rates).repeat_interleave(num_seeds)
    reached = count_updates(
        DEPTH,
        num_stages,
        duplex,
        {"tau": tau},
        rate,
        seed,
        TARGETS[tau],
        num_updates,
        lambda reached: bool(chosen(reached).isfinite().all()),
    )
    return [
        {"seed": s, "metric": TARGETS[tau][t][0], "target": TARGETS[tau][t][1], "updates": float(updates[s])}
        | {"learning_rate": rates[r]}
        for (t, r), updates in zip(which, chosen(reached), strict=True)
        for s in range(num_seeds)
    ]


def updates_to(rows: Sequence[Row], metric: str, target: float, **where: Any) -> np.ndarray:
    """Return the updates of every seed, infinite where the run gave up; no values where no rate was found."""
    found = select(rows, metric=metric, target=target, **where)
    return curves(found, "updates")[:, 0] if found else np.array([])


def alone(rows: Sequence[Row], metric: str, target: float, **where: Any) -> np.ndarray:
    """Return the updates with one stage, for which the duplex mode makes no difference."""
    return updates_to(rows, metric, target, num_stages=1, **{k: v for k, v in where.items() if k != "duplex"})


def relative(rows: Sequence[Row], metric: str, target: float, num_stages: int, **where: Any) -> np.ndarray:
    """Return the updates of every seed divided by those with one stage; NaN where neither reaches the target."""
    ours = updates_to(rows, metric, target, num_stages=num_stages, **where)
    with np.errstate(invalid="ignore"):
        return ours / alone(rows, metric, target, **where) if len(ours) else ours


def saved(rows: Sequence[Row], metric: str, target: float, num_stages: int, duplex: Duplex, **where: Any) -> np.ndarray:
    """Return the clock cycles without a pipeline divided by those with one, fills included, for every seed.

    The ratio is 0 where only the pipeline gives up, and NaN where no pipeline does.
    """
    schedules = Schedule("none", num_stages), Schedule("async", num_stages, 1, duplex)
    ours = updates_to(rows, metric, target, num_stages=num_stages, duplex=duplex, **where)
    if not len(ours):
        return ours
    none, cycles = (
        np.array([schedule.num_cycles(int(k)) if np.isfinite(k) else inf for k in each])
        for schedule, each in zip(schedules, (alone(rows, metric, target, **where), ours), strict=True)
    )
    return np.where(np.isfinite(none), none / cycles, np.nan)


def report(rows: Sequence[Row]) -> None:
    """Print the updates to every target, the ratios to those with one stage, and the cost of staleness.

    A number is the median of the seeds. Its interval covers the median of the population in at least 95 % of cases.
    """
    print(f"runs give up after {rows[0]['num_updates']} updates; such runs count as slower than all others")
    chosen = {float(row["learning_rate"]) for row in rows}
    print(
        f"learning rates from {min(chosen):.3g} to {max(chosen):.3g}, inside a grid from {LEARNING_RATES[-1]:.3g} to 2"
    )
    for tau in ranges_in(rows):
        for metric, target in TARGETS[tau]:
            report_target(select(rows, tau=tau), metric, target)


def ranges_in(rows: Sequence[Row]) -> list[float]:
    """Return the ranges τ of which there are rows."""
    return [tau for tau in TARGETS if select(rows, tau=tau)]


def report_target(rows: Sequence[Row], metric: str, target: float) -> None:
    """Print the report of one range and target."""
    print(f"tau {rows[0]['tau']}, {metric} {target}")
    staleness, updates = [], []
    pipelines: list[tuple[int, Duplex]] = [
        (m, duplex) for m, duplex in PIPELINES if select(rows, num_stages=m, duplex=duplex)
    ]
    for m, duplex in pipelines:
        ours = updates_to(rows, metric, target, num_stages=m, duplex=duplex)
        if not len(ours):
            print(f"    {m} stages, {duplex} duplex: no learning rate was found")
            continue
        line = (
            f"    {m} stages, {duplex} duplex: {np.isfinite(ours).sum()} of {len(ours)} seeds, {shown(ours, 0)} updates"
        )
        if m > 1 and np.isfinite(alone(rows, metric, target)).all():
            line += f", {shown(relative(rows, metric, target, m, duplex=duplex))} times those of one stage"
            line += f", {shown(saved(rows, metric, target, m, duplex), 1)} times fewer clock cycles"
        print(line)
        if np.isfinite(ours).all():
            staleness.append(Schedule("async", m, 1, duplex).max_staleness(0))
            updates.append(ours)
    if len(updates) > 2:
        cost = estimate(np.polyfit(staleness, np.array(updates), 1)[0])
        print(
            f"    {cost.value:.2f} [{cost.low:.2f}, {cost.high:.2f}] more for each update of staleness (mean), "
            f"in the {len(updates)} of {len(pipelines)} pipelines in which all seeds reach it"
        )


def shown(values: np.ndarray, digits: int = 2) -> str:
    """Return a median and its interval as text."""
    median, low, high = (f"{number:.{digits}f}" for number in median_interval(values))
    return f"{median} [{low}, {high}]"


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the updates relative to one stage, and the clock cycles saved."""
    ranges = ranges_in(rows)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, len(ranges), sharex=True, sharey="row", squeeze=False)
    for column, tau in enumerate(ranges):
        ratios, savings = grid[:, column]
        losses = [value for metric, value in TARGETS[inf] if metric == "loss"]
        for (color, target), duplex in product(enumerate(losses), ("half", "full")):
            label = f"loss {target}" if duplex == "half" else None
            for axes, quantity in ((ratios, relative), (savings, saved)):
                stages = [m for m, d in PIPELINES if d == duplex and m > 1]
                values = {m: quantity(rows, "loss", target, m, duplex=duplex, tau=tau) for m in stages}
                points = {m: median_interval(v) for m, v in values.items() if len(v)}
                points = {m: point for m, point in points.items() if 0 < point.value < inf}
                medians = [point.value for point in points.values()]
                bars = [(value - low, high - value if high < inf else np.nan) for value, low, high in points.values()]
                style = {"color": THINGS[color], "linestyle": "-" if duplex == "half" else "--", "marker": "."}
                axes.errorbar(list(points), medians, np.transpose(bars) if bars else None, label=label, **style)
        savings.plot((1, 64), (1, 64), "k:", linewidth=1, label="number of stages")
        ratios.set(xscale="log")
        savings.set(xscale="log", yscale="log", xlabel="stages")
        ratios.set_title(f"τ = {tau:g}".replace("inf", "∞"))
        for axes in (ratios, savings):
            axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
            axes.minorticks_off()
    grid[0, 0].set_ylabel("updates over those\nof one stage")
    grid[1, 0].set_ylabel("clock cycles of no pipeline\nover ours")
    title = "half duplex (solid) and full duplex (dashed): medians of the seeds and their 95 % intervals"
    figure.legend(*grid[1, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4, title=title)
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=10).parse_args()
    rates = sweep(tune, tuning_cases(args.quick), args.folder / "paper_stages_rates.csv", args.jobs)
    rows = sweep(run, cases(rates, args.seeds, args.quick), args.folder / "paper_stages.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "paper_stages.png", dpi=110)


if __name__ == "__main__":
    main()
