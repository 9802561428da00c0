"""This study counts the updates to a target while the number of stages grows.

The paper bounds the staleness by a constant, but in a pipeline the staleness grows with the number of stages. The study
trains a deep and narrow residual network on real digits: 64 layers in 1 to 64 stages, on devices of the paper's
expected motion. For every number of stages, device and seed the best learning rate of a grid counts. Usage:

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

from aimc_pl.figures import THINGS, styled
from aimc_pl.schedule import Duplex, Schedule
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.ensemble import Crossbars, EnsemblePipeline
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import estimate, extents, half_width
from aimc_pl.studies.sweeps import sweep

MICROBATCH_SIZE = 8
WIDTH = 16
LEARNING_RATES = tuple(1.28 / 2 ** (k / 2) for k in range(13))
TARGETS = {"loss": (0.5, 0.25, 0.1), "accuracy": (0.8, 0.9, 0.94)}
EVERY = 20
"""The number of updates from one evaluation to the next."""

PIPELINES: tuple[tuple[int, Duplex], ...] = (
    *((num_stages, "half") for num_stages in (1, 2, 4, 8, 16, 32, 64)),
    *((num_stages, "full") for num_stages in (2, 4, 8, 16, 32, 64)),
)
RANGES = (4.0, 16.0, inf)
Device = Mapping[str, Any]


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return the pipelines. A quick run gives up after 20 updates."""
    length = {"num_seeds": num_seeds, "num_updates": 20 if quick else 2000}
    return [{"num_stages": m, "duplex": duplex} | length for m, duplex in PIPELINES]


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
    """Real digits of 4x4 pixels. Every fifth image is a test image."""

    def __init__(self) -> None:
        data: Any = load_digits()
        images = F.avg_pool2d(torch.from_numpy(data.images).float(), 2).flatten(1)
        x, y = (images - images.mean(0)) / images.std(), torch.from_numpy(data.target)
        test = torch.arange(len(x)) % 5 == 0
        self.x, self.y = x[~test], y[~test]
        self.x_test, self.y_test = x[test], y[test]


def all_targets() -> list[tuple[str, float]]:
    """Return all pairs of a metric and its value to reach."""
    return [(metric, value) for metric, values in TARGETS.items() for value in values]


def build(depth: int, seed: Tensor, device: Device, generator: Generator) -> list[nn.Module]:
    """Return the layers of all copies. Copies with the same seed start from the same weights."""
    modules: list[nn.Module] = []
    for layer in range(depth):
        out_size = 10 if layer == depth - 1 else WIDTH
        weight = torch.randn(int(seed.max()) + 1, out_size, WIDTH, generator=generator) / WIDTH**0.5
        crossbars = Crossbars(weight[seed], generator, **device)
        modules.append(Residual(crossbars, depth**-0.5) if 0 < layer < depth - 1 else crossbars)
    return modules


def train(
    depth: int,
    num_stages: int,
    duplex: Duplex,
    devices: Sequence[Device],
    rates: Sequence[float],
    num_seeds: int,
    num_updates: int,
) -> list[dict[str, Any]]:
    """Train a copy for every device, learning rate and seed.

    The training ends when every device and seed has, with one of the learning rates, reached all targets.

    Args:
        depth: number of layers.
        num_stages: of the asynchronous pipeline; one stage has no delay.
        duplex: of the pipeline.
        devices: arguments of the crossbars.
        rates: the grid of learning rates.
        num_seeds: of weights and the order of samples.
        num_updates: the number of updates after which the training gives up.

    Returns:
        For each device, seed and target the fewest updates and their learning rate. The updates are infinite if no
        rate reaches the target.
    """
    torch.set_flush_denormal(True)
    settings = list(product(range(len(devices)), rates, range(num_seeds)))
    which, rate, seed = (torch.tensor(column) for column in zip(*settings, strict=True))
    columns = {key: [device[key] for device in devices] for key in devices[0]}
    device = {
        key: None if None in column else torch.tensor(column)[which].view(-1, 1, 1) for key, column in columns.items()
    }
    generator = Generator().manual_seed(0)
    modules = build(depth, seed, device, generator)
    pipeline = EnsemblePipeline(modules, num_stages, rate.view(-1, 1, 1), duplex)
    data, network = Digits(), nn.Sequential(*modules)
    targets = all_targets()
    reached = torch.full((len(devices), len(rates), num_seeds, len(targets)), inf)
    for update in range(EVERY, num_updates + EVERY, EVERY):
        pipeline.run([sample(data, seed, generator) for _ in range(EVERY)])
        loss, accuracy = evaluate(network, data)
        hits = [loss <= value if metric == "loss" else accuracy >= value for metric, value in targets]
        reached = torch.where(torch.stack(hits, 1).view(reached.shape) & reached.isinf(), update, reached)
        if reached.amin(1).isfinite().all():
            break
    fastest, best = reached.min(1)
    return [
        {
            **devices[d],
            "seed": s,
            "metric": metric,
            "target": value,
            "updates": float(fastest[d, s, t]),
            "learning_rate": rates[int(best[d, s, t])],
        }
        for d, s in product(range(len(devices)), range(num_seeds))
        for t, (metric, value) in enumerate(targets)
    ]


def sample(data: Digits, seed: Tensor, generator: Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a micro-batch of random training images and its loss. Copies with the same seed get the same images."""
    chosen = torch.randint(len(data.x), (int(seed.max()) + 1, MICROBATCH_SIZE), generator=generator)[seed]
    labels = data.y[chosen]
    return data.x[chosen], lambda output: F.cross_entropy(output.mT, labels, reduction="none").mean(1)


@torch.no_grad()
def evaluate(network: nn.Module, data: Digits, count: int = 240) -> tuple[Tensor, Tensor]:
    """Return the loss of some training images and the accuracy of the test images, both ``(copies,)``."""
    output = network(torch.cat([data.x[:count], data.x_test])[None])
    labels = data.y[:count].expand(len(output), -1)
    loss = F.cross_entropy(output[:, :count].mT, labels, reduction="none").mean(1)
    return loss, (output[:, count:].argmax(2) == data.y_test).float().mean(1)


def run(num_stages: int, duplex: Duplex, num_seeds: int, num_updates: int) -> list[dict[str, Any]]:
    """Train 64 layers on devices of the paper's expected motion."""
    devices = [{"tau": tau} for tau in RANGES]
    return train(64, num_stages, duplex, devices, LEARNING_RATES, num_seeds, num_updates)


def updates_to(rows: Sequence[Row], metric: str, target: float, **where: Any) -> np.ndarray:
    """Return the updates of every seed; infinite where no learning rate reaches the target."""
    return curves(select(rows, metric=metric, target=target, **where), "updates")[:, 0]


def alone(rows: Sequence[Row], metric: str, target: float, **where: Any) -> np.ndarray:
    """Return the updates with one stage, for which the duplex mode makes no difference."""
    return updates_to(rows, metric, target, num_stages=1, **{k: v for k, v in where.items() if k != "duplex"})


def relative(rows: Sequence[Row], metric: str, target: float, num_stages: int, **where: Any) -> np.ndarray:
    """Return the updates of every seed divided by those with one stage; NaN where neither reaches the target."""
    with np.errstate(invalid="ignore"):
        ours = updates_to(rows, metric, target, num_stages=num_stages, **where)
        return ours / alone(rows, metric, target, **where)


def saved(rows: Sequence[Row], metric: str, target: float, num_stages: int, duplex: Duplex, **where: Any) -> np.ndarray:
    """Return the clock cycles without a pipeline divided by those with one, fills included, for every seed.

    The ratio is NaN where the pipeline does not reach the target.
    """
    schedules = Schedule("none", num_stages), Schedule("async", num_stages, 1, duplex)
    updates = (
        alone(rows, metric, target, **where),
        updates_to(rows, metric, target, num_stages=num_stages, duplex=duplex, **where),
    )
    none, ours = (
        np.array([schedule.num_cycles(int(k)) if np.isfinite(k) else np.nan for k in each])
        for schedule, each in zip(schedules, updates, strict=True)
    )
    return none / ours


def report(rows: Sequence[Row]) -> None:
    """Print the updates with one stage to every target, the ratios with more stages, and the cost of staleness."""
    for (metric, target), tau in product(all_targets(), RANGES):
        one = alone(rows, metric, target, tau=tau)
        print(f"{metric} {target}, tau {tau}: {one} updates with one stage; 95 % intervals")
        staleness, updates = [], []
        for m, duplex in PIPELINES:
            where: Any = {"duplex": duplex, "tau": tau}
            ours = updates_to(rows, metric, target, num_stages=m, **where)
            if not np.isfinite(ours).all():
                print(f"    {m} stages, {duplex} duplex: {np.isfinite(ours).sum()} of {len(ours)} seeds get there")
                continue
            staleness.append(Schedule("async", m, 1, duplex).max_staleness(0))
            updates.append(ours)
            if m > 1 and np.isfinite(one).all():
                times = relative(rows, metric, target, m, **where)
                fewer = saved(rows, metric, target, m, **where)
                print(
                    f"    {m} stages, {duplex} duplex: {times.mean():.2f} ± {half_width(times):.2f} times the updates, "
                    f"{fewer.mean():.1f} ± {half_width(fewer):.1f} times fewer clock cycles"
                )
        if len(updates) > 2:
            cost = estimate(np.polyfit(staleness, np.array(updates), 1)[0])
            print(
                f"    {cost.value:.2f} [{cost.low:.2f}, {cost.high:.2f}] more for each update of staleness, "
                f"in {len(updates)} of {len(PIPELINES)} pipelines"
            )


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the updates relative to one stage, and the clock cycles saved."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, len(RANGES), sharex=True, sharey="row")
    for column, tau in enumerate(RANGES):
        ratios, savings = grid[:, column]
        for (color, target), duplex in product(enumerate(TARGETS["loss"]), ("half", "full")):
            stages = [m for m, d in PIPELINES if d == duplex]
            label = f"loss {target}" if duplex == "half" else None
            for axes, quantity in ((ratios, relative), (savings, saved)):
                values = [quantity(rows, "loss", target, m, duplex=duplex, tau=tau) for m in stages]
                means, errors = [v.mean() for v in values], extents(values)
                style = {"color": THINGS[color], "linestyle": "-" if duplex == "half" else "--", "marker": "."}
                axes.errorbar(stages, means, errors, label=label, **style)
        savings.plot((1, 64), (1, 64), "k:", linewidth=1, label="number of stages")
        ratios.set(xscale="log")
        savings.set(xscale="log", yscale="log", xlabel="stages")
        ratios.set_title(f"τ = {tau:g}".replace("inf", "∞"))
        for axes in (ratios, savings):
            axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
            axes.minorticks_off()
    grid[0, 0].set_ylabel("updates over those\nof one stage")
    grid[1, 0].set_ylabel("clock cycles of no pipeline\nover ours")
    title = "half duplex (solid) and full duplex (dashed); bars show the range of the seeds"
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title=title)
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=3).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "paper_stages.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "paper_stages.png", dpi=110)


if __name__ == "__main__":
    main()
