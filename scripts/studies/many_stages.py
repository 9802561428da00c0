"""This study asks how far the asynchronous speedup carries: 1 to 16 stages with all layers analog, and a control.

It is Figure 4 of the paper with the paper's eight micro-batches. A narrow `ConvNet` learns CIFAR-10, with all
convolutions and the linear layer in mixed precision on soft-bounds devices, or digitally. With 12 and 16 stages, a
remedy against stale weights is tried too: the optimizer `AsyncNAdam`, which was as good as any other remedy in
``staleness_remedies.py``, and takes no clock cycles. One stage with the same optimizer shows what it does without
staleness. For each kind of layers, schedule, number of stages and remedy, the learning rate is the one with the best
accuracy on validation images, for a seed that counts for nothing else. The grid of rates grows until its best is
inside. Then other seeds are trained. Speedups are measured on validation images, and each run reads the test images
once, at its end.

`none` and `sync` do the same arithmetic with any number of stages. One run therefore stands for both, and their clock
cycles are computed from the schedule. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/many_stages.py --data data --folder docs/results
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, product
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_accuracy import PAPER, DigitsInColour, band, cycles_to
from sklearn.isotonic import IsotonicRegression
from torch.optim.lr_scheduler import CosineAnnealingLR

from aimc_pl.callbacks import ClockMonitor
from aimc_pl.data import CIFAR10
from aimc_pl.data.images import InMemoryImages
from aimc_pl.devices import mixed_precision, soft_bounds
from aimc_pl.figures import GREY, ORANGE, styled
from aimc_pl.figures import LAYERS as KINDS
from aimc_pl.figures import SCHEDULES as COLORS
from aimc_pl.models import ConvNet
from aimc_pl.optim import AsyncNAdam
from aimc_pl.schedule import Schedule, ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import estimate, half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.studies.tuning import tune
from aimc_pl.tasks import Classifier

Kind = Literal["analog", "digital"]


class Setting(NamedTuple):
    """What a learning rate is tuned for."""

    kind: Kind
    schedule: ScheduleName
    num_stages: int
    remedies: str = "none"


BATCH_SIZE = 256
NUM_MICROBATCHES = 8
EPOCHS = 5
WIDTHS = (16, 32, 64)
FIRST_RATES = (0.05, 0.1, 0.2)
"""The learning rates from which each grid grows, by factors of 2."""

ADAM_RATES = (0.002, 0.004, 0.008)
"""The same for AsyncNAdam."""

TUNING_SEED = 100
TARGETS = (0.6, 0.7)
"""Accuracies on validation images to which speedups are measured."""

ANALOG = mixed_precision(device=soft_bounds(tau=1.0, perfect_io=True))
GROUPS = [f"network.group{number}" for number in (1, 2, 3)]
LAYERS = [
    "network.stem.1",
    *(f"{group}.{index}" for group in GROUPS for index in (0, 2, 4, 5)),
    "network.pool",
    "network.fc",
]
SPLITS: dict[int, list[str] | None] = {
    1: None,
    2: GROUPS[1:2],
    4: GROUPS,
    8: LAYERS[1::2],
    12: LAYERS[:8] + LAYERS[9::2],
    16: LAYERS,
}
"""Where the stages begin: convolutions with 8 stages, and with 16 also BatchNorms and the linear layer."""

REMEDY = "AsyncNAdam"
REMEDY_STAGES = (1, 12, 16)
"""The numbers of stages with the remedy."""


def settings(quick: bool) -> list[Setting]:
    """Return the settings whose learning rates are tuned."""
    stages, remedied, control = ((1, 16), (1, 16), ()) if quick else (SPLITS, REMEDY_STAGES, SPLITS)
    found: list[Setting] = []
    groups: list[tuple[Kind, str, Iterable[int]]] = [
        ("analog", "none", stages),
        ("analog", REMEDY, remedied),
        ("digital", "none", control),
    ]
    for kind, remedy, numbers in groups:
        if numbers:
            found += [Setting(kind, "sync", 1, remedy), *(Setting(kind, "async", m, remedy) for m in numbers)]
    return found


def first_rates(setting: Setting, quick: bool) -> tuple[float, ...]:
    """Return the learning rates from which the grid of a setting grows."""
    rates = ADAM_RATES if setting.remedies == REMEDY else FIRST_RATES
    return rates[:1] if quick else rates


class InChannelsLast(Classifier):
    """A classifier of images whose channels lie side by side in memory, which convolutions on a CPU are faster with."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the images in another layout, and the labels."""
        images, labels = batch
        return images.contiguous(memory_format=torch.channels_last), labels


class Curve(pl.Callback):
    """A callback that collects the accuracy on validation images, and the clock cycles so far."""

    def __init__(self, clock: ClockMonitor) -> None:
        self.clock = clock
        self.rows: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append a row."""
        self.add(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append a row."""
        self.add(trainer, "test")

    def add(self, trainer: pl.Trainer, part: str) -> None:
        """Append a row with the accuracy on a part of the data."""
        accuracy = float(trainer.callback_metrics[f"{part}/accuracy"])
        so_far = {"mini_batches": trainer.global_step, "cycles": self.clock.cycles}
        self.rows.append({"part": part, **so_far, "accuracy": accuracy})


def run(
    kind: Kind,
    schedule: ScheduleName,
    num_stages: int,
    remedies: str,
    epochs: int,
    learning_rate: float,
    seed: int,
    root: str | None = None,
) -> list[dict[str, Any]]:
    """Train once and return a row for every half epoch, and one for the test at the end.

    Args:
        kind: of all convolutions and of the linear layer.
        schedule: of the pipeline.
        num_stages: one of :data:`SPLITS`.
        remedies: :data:`REMEDY` or ``"none"``.
        epochs: length of the run, and of the cosine.
        learning_rate: at the start; it falls by a cosine.
        seed: of weights, devices and the order of images. That of the tuning has other validation images, and no test.
        root: the folder of CIFAR-10; ``None`` trains on handwritten digits.
    """
    tuning = seed == TUNING_SEED
    pl.seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "drop_last": True, "split_seed": int(tuning)}
    data: InMemoryImages = CIFAR10(root, augment=True, **options) if root else DigitsInColour(**options)
    data.setup("fit")
    clock = ClockMonitor()
    curve = Curve(clock)
    strategy = AnalogPipelineStrategy(
        num_stages,
        schedule,
        NUM_MICROBATCHES,
        device=ANALOG if kind == "analog" else None,
        split_at=SPLITS[num_stages],
        on_nonfinite="warn",  # a rate that is too large is not the best one
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=strategy,
        val_check_interval=0.5,
        callbacks=[clock, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if remedies == REMEDY:
            return AsyncNAdam(parameters, num_stages, learning_rate, weight_decay=0.05)
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    task = InChannelsLast(
        ConvNet(WIDTHS if root else (4, 4, 4)),
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
    )
    trainer.fit(task, data.train_dataloader(), data.val_dataloader())
    if not tuning:
        trainer.test(task, data.test_dataloader(), verbose=False)
    return curve.rows


def last(rows: Sequence[Row], part: str = "test", **where: Any) -> np.ndarray:
    """Return the last accuracy of every seed."""
    return curves(select(rows, part=part, **where), "accuracy")[:, -1]


def reached(
    rows: Sequence[Row], setting: Setting, num_stages: int, target: float, schedule: ScheduleName
) -> np.ndarray:
    """Return the clock cycle in which each seed of a setting reaches an accuracy, or infinity.

    Accuracies jump from one validation to the next. They are therefore made monotone by least squares (isotonic
    regression), and interpolated.

    Args:
        rows: all rows.
        setting: whose training it is.
        num_stages: the number of stages that it would run in.
        target: the accuracy.
        schedule: that gives the clock cycles of a mini-batch. If it is that of the setting, cycles were counted.
    """
    mine = select(rows, part="val", **setting._asdict())
    noisy, mini_batches, counted = (curves(mine, field) for field in ("accuracy", "mini_batches", "cycles"))
    smooth = np.array([IsotonicRegression().fit_transform(mini_batches[0], values) for values in noisy])
    cycles = mini_batches * Schedule(schedule, num_stages, NUM_MICROBATCHES).num_cycles()
    return cycles_to(target, smooth, (counted if schedule == setting.schedule == "async" else cycles)[0])


def speedups(rows: Sequence[Row], setting: Setting, target: float, over: Setting) -> np.ndarray:
    """Return how many times fewer clock cycles each seed needs than without a pipeline, or NaN if it gets nowhere.

    Args:
        rows: all rows.
        setting: whose speedup it is.
        target: the accuracy to reach.
        over: the setting whose updates are made without a pipeline.
    """
    alone = reached(rows, over, setting.num_stages, target, "none")
    ours = reached(rows, setting, setting.num_stages, target, setting.schedule)
    return np.divide(alone, ours, out=np.full_like(ours, np.nan), where=np.isfinite(alone) & np.isfinite(ours))


def finished(rows: Sequence[Row], kind: Kind, remedies: str) -> list[int]:
    """Return the numbers of stages of the asynchronous runs that have ended, with as many seeds as `sync` has."""
    tested = select(rows, kind=kind, part="test", remedies=remedies)
    needed = len(select(tested, schedule="sync"))
    stages = [m for m in SPLITS if len(select(tested, schedule="async", num_stages=m)) == needed]
    return stages if needed and 1 in stages else []


def report(rows: Sequence[Row], rates: dict[Setting, float]) -> None:
    """Print learning rates, accuracies, what `async` loses to `sync`, speedups, and whether the goal is reached."""
    kinds: tuple[Kind, ...] = ("analog", "digital")
    for kind, name in product(kinds, ("none", REMEDY)):
        for m in finished(rows, kind, name):
            report_setting(rows, Setting(kind, "async", m, name), rates)


def report_setting(rows: Sequence[Row], setting: Setting, rates: dict[Setting, float]) -> None:
    """Print the report of an asynchronous setting beside `sync`."""
    kind, _, m, name = setting
    remedy = "" if name == "none" else f", {name}"
    prompt = Setting(kind, "sync", 1)
    if m == 1:
        ours = Setting(kind, "sync", 1, name)
        print(f"{kind} none, sync{remedy}: rate {rates[ours]}, test accuracy {shown(last(rows, **ours._asdict()), 4)}")
    behind = last(rows, **prompt._asdict()) - last(rows, **setting._asdict())
    print(
        f"{kind} async, {m} stages{remedy}: rate {rates[setting]}, test accuracy "
        f"{shown(last(rows, **setting._asdict()), 4)}"
    )
    print(f"    points behind sync, same seed: {shown(100 * behind)}")
    for target in TARGETS:
        sync = Schedule("sync", m, NUM_MICROBATCHES).speedup()
        print(f"    clock cycles to {target}, times fewer than without a pipeline (sync {sync:.2f}):")
        for other in dict.fromkeys((name, "none")):
            words = f", {other}" if other != "none" else ""
            references = {
                f"the same updates{words}": Setting(kind, "async", 1, other),
                f"an update per mini-batch{words}": Setting(kind, "sync", 1, other),
            }
            for reference, over in references.items():
                report_speedup(reference, speedups(rows, setting, target, over), m)
    if m >= 12:
        low, high = estimate(behind)[1:]
        print(f"    goal of one point of sync: {verdict(low, high, 0.01)}")


def report_speedup(reference: str, values: np.ndarray, num_stages: int) -> None:
    """Print the speedups of all seeds over a reference."""
    if np.isnan(values).any():
        print(f"        {reference}: {np.isfinite(values).sum()} of {len(values)} seeds get there")
        return
    share, low, high = estimate(values / num_stages)
    print(f"        {reference}: {shown(values)}, {share:.2f} ± {share - low:.2f} M{above(share, low)}")
    if num_stages >= 12:
        print(f"            goal of 0.8 M: {verdict(-high, -low, -0.8)}")


def above(share: float, low: float) -> str:
    """Return what a speedup above the number of stages is, in words."""
    if share <= 1 or np.isnan(low):
        return ""
    return " (above M: noise)" if low <= 1 else " (above M: it needs fewer samples than the reference)"


def verdict(low: float, high: float, limit: float) -> str:
    """Return whether a number with an interval is at most a limit, in words."""
    return "reached" if high <= limit else "missed" if low > limit else "open"


def shown(values: np.ndarray, digits: int = 2) -> str:
    """Return a mean and half the width of its interval as text."""
    return f"{values.mean():.{digits}f} ± {half_width(values):.{digits}f}"


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw accuracy by epoch, the points behind `sync` and the speedup by number of stages."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    by_epoch, by_stages, speedup = figure.subplots(1, 3)
    kinds: tuple[tuple[Kind, str], ...] = (("analog", "-"), ("digital", "--"))
    for (kind, style), name in product(kinds, ("none", REMEDY)):
        stages = finished(rows, kind, name)
        if not stages:
            continue
        what = kind if name == "none" else f"{kind}, {name}"
        shown_in_full = [Setting(kind, "async", stages[-1], name)]
        if name == "none":
            shown_in_full.append(Setting(kind, "sync", 1))
        for setting in shown_in_full:
            draw_learning(by_epoch, rows, setting, what, style)
        color = KINDS[kind] if name == "none" else ORANGE
        options: Any = {"color": color, "linestyle": style, "marker": ".", "capsize": 2}
        prompt = last(rows, **Setting(kind, "sync", 1)._asdict())
        settings = [Setting(kind, "async", m, name) for m in stages]
        behind = [100 * (prompt - last(rows, **setting._asdict())) for setting in settings]
        by_stages.errorbar(stages, [b.mean() for b in behind], [*map(half_width, behind)], label=what, **options)
        for target, marker, alpha in zip(TARGETS, ("o", "s"), (0.45, 1), strict=True):
            values = [speedups(rows, setting, target, Setting(kind, "async", 1, name)) for setting in settings]
            speedup.errorbar(
                stages,
                [v.mean() for v in values],
                [*map(half_width, values)],
                label=f"{what}, async, to {target:.0%}",
                markersize=4,
                alpha=alpha,
                **options | {"marker": marker},
            )
    by_stages.axhline(1, color=GREY, linewidth=1)
    stages = list(SPLITS)
    sync = [Schedule("sync", m, NUM_MICROBATCHES).speedup() for m in stages]
    speedup.plot(stages, sync, color=COLORS["sync"], linewidth=1, label="sync, by its schedule")
    for schedule, published in PAPER.items():
        options = {"color": COLORS[schedule], "linestyle": "-.", "marker": "x", "linewidth": 1}
        speedup.plot(list(published), list(published.values()), label=f"the paper, {schedule}", **options)
    speedup.plot(stages, stages, color=GREY, linewidth=1, label="number of stages")
    by_epoch.set(xlabel="epoch", ylabel="accuracy on validation images", title="learning")
    by_stages.set(xlabel="stages", ylabel="points", title="test accuracy behind sync", xticks=stages)
    speedup.set(xlabel="stages", ylabel="times fewer clock cycles", title="speedup over one stage", xticks=stages)
    for axes in (by_epoch, by_stages, speedup):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)
    return figure


def draw_learning(axes: Axes, rows: Sequence[Row], setting: Setting, what: str, style: str) -> None:
    """Draw the accuracy of a setting by epoch."""
    mine = select(rows, part="val", **setting._asdict())
    epochs = curves(mine, "mini_batches")[0] / (45_000 // BATCH_SIZE)
    label = f"{what}, {setting.schedule}" + (f", {setting.num_stages} stages" if setting.schedule == "async" else "")
    color = COLORS[setting.schedule] if setting.remedies == "none" else ORANGE
    band(axes, epochs, curves(mine, "accuracy"), label, color=color, linestyle=style)


def main() -> None:
    """Tune the learning rates, run the missing cases, print the report and draw the figure."""
    parser = sweep_parser(__doc__, seeds=5)
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="folder that holds CIFAR-10 in torchvision's layout; needed unless the run is quick",
    )
    args = parser.parse_args()
    if not (args.data or args.quick):
        parser.error("--data is needed: the folder that holds CIFAR-10")
    # A quick run trains a narrow network on handwritten digits.
    train = partial(run, root=None if args.quick else args.data)
    path = args.folder / "many_stages.csv"
    epochs = 1 if args.quick else EPOCHS
    rows: list[Row] = []
    rates: dict[Setting, float] = {}
    for _, group in groupby(settings(args.quick), key=lambda setting: (setting.kind, setting.remedies)):
        mine = [*group]
        cases = [setting._asdict() | {"epochs": epochs} for setting in mine]
        grid = first_rates(mine[0], args.quick)
        chosen = tune(train, cases, [TUNING_SEED], grid, lambda rows: last(rows, "val").mean(), path, args.jobs)
        best = [
            case | {"learning_rate": rate, "seed": seed}
            for seed in range(args.seeds)
            for case, rate in zip(cases, chosen, strict=True)
        ]
        rows += sweep(train, best, path, args.jobs)
        rates |= zip(mine, chosen, strict=True)
    report(rows, rates)
    draw(rows).savefig(args.folder / "many_stages.png", dpi=110)


if __name__ == "__main__":
    main()
