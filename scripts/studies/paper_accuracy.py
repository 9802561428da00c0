"""This study repeats Figure 4 of the paper: a ResNet on CIFAR-10 with no, a synchronous and an asynchronous pipeline.

It trains on soft-bounds devices and, as a control, with digital layers. `none` and `sync` do the same arithmetic with
any number of stages. One run therefore stands for both, and their clock cycles are computed from the schedule. Runs
that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/paper_accuracy.py --data data --folder docs/results
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

from aimc_pl.callbacks import ClockMonitor
from aimc_pl.data import CIFAR10, Digits
from aimc_pl.data.images import Images, InMemoryImages
from aimc_pl.devices import soft_bounds
from aimc_pl.figures import GREY, styled
from aimc_pl.figures import SCHEDULES as COLORS
from aimc_pl.models import ResNet
from aimc_pl.schedule import Schedule, ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import extents, half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.tasks import Classifier

BATCH_SIZE = 128
NUM_MICROBATCHES = 4
LEARNING_RATE = 0.5
ANALOG = soft_bounds(tau=4.0, num_states=20000)
DEVICE: Any = {"*": None, "network.group2*": ANALOG, "network.group3*": ANALOG}
LAYERS = [f"network.group{group}.0.{layer}" for group in (1, 2, 3) for layer in ("conv1", "bn1", "conv2", "bn2")]
SPLITS = {
    2: ["network.group2.0.conv1"],
    4: ["network.group1.0.conv1", "network.group2.0.conv1", "network.group3.0.conv1"],
    8: [*LAYERS[::2], "network.pool"],
    16: ["network.bn", *LAYERS, "network.pool", "network.fc"],
}
TARGETS = (0.5, 0.6)
"""Accuracies to which the speedup is measured."""

PAPER = {
    "sync": {1: 1.0, 2: 1.77, 4: 2.91, 8: 4.25, 12: 5.05, 16: 5.56},
    "async": {1: 1.0, 2: 1.88, 4: 3.9, 8: 7.5, 12: 5.8, 16: 7.75},
}
"""Speedups by stages in the paper's Figure 4, read off its pixels to ±0.05, with 8 micro-batches in a mini-batch."""


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return the cases: analog layers without delay and asynchronously in 2 to 16 stages, and digital controls.

    Digital layers are trained without delay and in 8 stages. Analog layers without delay and in 8 stages are also
    trained for twice the epochs. This shows whether a longer training makes up for the cost of staleness.
    """
    epochs = 1 if quick else 8
    analog = [("analog", "sync", 4), *(("analog", "async", num_stages) for num_stages in SPLITS)]
    digital = [("digital", "sync", 4), ("digital", "async", 8)]
    lengths = {epochs: analog + digital}
    if not quick:
        lengths[2 * epochs] = [("analog", "sync", 4), ("analog", "async", 8)]
    return [
        {"seed": seed, "kind": kind, "schedule": schedule, "num_stages": num_stages, "epochs": length}
        for length, settings in lengths.items()
        for seed, (kind, schedule, num_stages) in product(range(num_seeds), settings)
    ]


class DigitsInColour(Digits):
    """Handwritten digits as images of three equal channels, for the quick mode."""

    def load(self) -> tuple[Images, Images]:
        """See :meth:`InMemoryImages.load`."""
        (train, labels), (test, test_labels) = super().load()
        return (train.expand(-1, 3, -1, -1), labels), (test.expand(-1, 3, -1, -1), test_labels)


class Curve(pl.Callback):
    """A callback that collects training loss, test accuracy and clock cycles of every epoch."""

    def __init__(self, clock: ClockMonitor) -> None:
        self.clock = clock
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the values that the epoch has logged."""
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "mini_batches": trainer.global_step,
                "loss": float(metrics["train/loss_epoch"]),
                "accuracy": float(metrics["val/accuracy"]),
                "cycles": self.clock.cycles,
            }
        )


def run(
    kind: Literal["analog", "digital"],
    schedule: ScheduleName,
    num_stages: int,
    seed: int,
    epochs: int,
    root: str | None = None,
) -> list[dict[str, float]]:
    """Train once and return a row per epoch; its accuracy is that of the test images after the epoch.

    Args:
        kind: of the convolutions of the second and third group.
        schedule: of the pipeline.
        num_stages: one of :data:`SPLITS`, or 1.
        seed: of weights, devices, noise and the order of images.
        epochs: length of the run, and of the learning rate's cosine.
        root: the folder of CIFAR-10; ``None`` trains on handwritten digits.
    """
    pl.seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "drop_last": True}
    data: InMemoryImages = CIFAR10(root, **options) if root else DigitsInColour(**options)
    data.setup("fit")
    clock = ClockMonitor()
    curve = Curve(clock)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(
            num_stages,
            schedule,
            NUM_MICROBATCHES,
            device=DEVICE if kind == "analog" else None,
            split_at=SPLITS.get(num_stages),
        ),
        callbacks=[clock, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    task = Classifier(
        ResNet(8, width=16 if root else 4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
    )
    trainer.fit(task, data.train_dataloader(), data.test_dataloader())
    return curve.rows


def learning(rows: Sequence[Row], kind: str, num_stages: int | None = None, metric: str = "accuracy") -> np.ndarray:
    """Return the metric ``(seeds, epochs)`` in ``num_stages`` asynchronous stages or, if ``None``, without delay."""
    which = {"schedule": "async", "num_stages": num_stages} if num_stages else {"schedule": "sync"}
    return curves(select(rows, kind=kind, **which), metric)


def cycles(rows: Sequence[Row], kind: str, schedule: ScheduleName, num_stages: int) -> np.ndarray:
    """Return the clock cycles after every epoch: counted for `async`, otherwise computed from the schedule."""
    if schedule == "async":
        return curves(select(rows, kind=kind, schedule="async", num_stages=num_stages), "cycles")[0]
    mini_batches = curves(select(rows, kind=kind, schedule="sync"), "mini_batches")[0]
    return mini_batches * Schedule(schedule, num_stages, NUM_MICROBATCHES).num_cycles()


def cycles_to(target: float, accuracies: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the clock cycle in which each seed reaches an accuracy, interpolated between epochs, or infinity."""
    reached = np.full(len(accuracies), np.inf)
    for seed, values in enumerate(accuracies):
        above = np.flatnonzero(values >= target)
        if len(above):
            last = above[0]
            points = slice(max(last - 1, 0), last + 1)
            reached[seed] = np.interp(target, values[points], after[points])
    return reached


def speedups(rows: Sequence[Row], target: float, kind: str, schedule: ScheduleName, num_stages: int) -> np.ndarray:
    """Return how many times fewer clock cycles each seed needs to the target than without a pipeline, or NaN."""
    prompt = learning(rows, kind)
    alone = cycles_to(target, prompt, cycles(rows, kind, "none", num_stages))
    ours = learning(rows, kind, num_stages) if schedule == "async" else prompt
    needed = cycles_to(target, ours, cycles(rows, kind, schedule, num_stages))
    return np.divide(alone, needed, out=np.full_like(needed, np.nan), where=np.isfinite(needed))


def report(rows: Sequence[Row]) -> None:
    """Print final accuracies, how far each seed ends behind the same seed without delay, and speedups."""
    for epochs in lengths(rows):
        print(f"{epochs} epochs")
        report_length(select(rows, epochs=epochs))


def lengths(rows: Sequence[Row]) -> list[int]:
    """Return the lengths of the runs in epochs, in ascending order."""
    return sorted({int(row["epochs"]) for row in rows})


def report_length(rows: Sequence[Row]) -> None:
    """Print the report of the runs of one length."""
    for kind in sorted({row["kind"] for row in rows}):
        prompt = learning(rows, kind)[:, -1]
        print(f"{kind:<8} none, sync      accuracy {prompt.mean():.4f} ± {half_width(prompt):.4f}")
        for num_stages in sorted({int(row["num_stages"]) for row in select(rows, kind=kind, schedule="async")}):
            last = learning(rows, kind, num_stages)[:, -1]
            print(f"{kind:<8} async, M = {num_stages:<3} accuracy {last.mean():.4f} ± {half_width(last):.4f}")
            for metric, sign in (("accuracy", 1), ("loss", -1)):
                prompt_end, own_end = (learning(rows, kind, m, metric)[:, -1] for m in (None, num_stages))
                behind = sign * (prompt_end - own_end)
                print(f"    {metric} behind sync: {behind.mean():.4f} ± {half_width(behind):.4f}, {behind.round(4)}")
            for target in TARGETS:
                sync, ours = (speedups(rows, target, kind, schedule, num_stages) for schedule in ("sync", "async"))
                print(
                    f"    cycles to {target}: {ours.mean():.2f} ± {half_width(ours):.2f} times fewer than none "
                    f"({ours.mean() / num_stages:.2f} M), sync {sync.mean():.2f}"
                )


@styled
def draw(rows: Sequence[Row], num_stages: int = 8) -> Figure:
    """Draw accuracy by epoch and by clock cycle, and speedup by number of stages, for the shorter runs."""
    rows = select(rows, epochs=min(lengths(rows)))
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    by_epoch, by_cycle, by_stages = figure.subplots(1, 3)
    for kind, style in (("analog", "-"), ("digital", "--")):
        prompt, ours = learning(rows, kind), learning(rows, kind, num_stages)
        epochs = np.arange(1, prompt.shape[1] + 1)
        band(by_epoch, epochs, prompt, f"{kind}, none and sync", color=COLORS["sync"], linestyle=style)
        band(by_epoch, epochs, ours, f"{kind}, async", color=COLORS["async"], linestyle=style)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy", title=f"{num_stages} stages")
    for schedule in ("none", "sync", "async"):
        curve = learning(rows, "analog", num_stages if schedule == "async" else None)
        band(
            by_cycle, cycles(rows, "analog", schedule, num_stages), curve, f"analog, {schedule}", color=COLORS[schedule]
        )
    by_cycle.set(xscale="log", xlabel="clock cycle", ylabel="test accuracy", title=f"{num_stages} stages")
    stages = list(SPLITS)
    for (target, style), schedule in product(zip(TARGETS, (":", "-"), strict=True), ("sync", "async")):
        values = [speedups(rows, target, "analog", schedule, m) for m in stages]
        means, errors = [v.mean() for v in values], extents(values)
        options: Any = {"color": COLORS[schedule], "linestyle": style, "marker": "."}
        by_stages.errorbar(stages, means, errors, label=f"analog, {schedule}, to {target:.0%}", **options)
    for schedule, published in PAPER.items():
        options = {"color": COLORS[schedule], "linestyle": "-.", "marker": "x", "linewidth": 1}
        by_stages.plot(list(published), list(published.values()), label=f"the paper, {schedule}, B = 8", **options)
    by_stages.plot([1, *stages], [1, *stages], color=GREY, linewidth=1, label="number of stages")
    by_stages.set(xlabel="stages", ylabel="times fewer clock cycles", title="speedup over no pipeline", xticks=stages)
    for axes in (by_epoch, by_cycle, by_stages):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    return figure


def band(axes: Axes, x: np.ndarray, values: np.ndarray, label: str, **style: Any) -> None:
    """Draw the mean over the seeds as a line and their range as a band."""
    axes.plot(x, values.mean(0), label=label, marker=".", **style)
    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    parser = sweep_parser(__doc__, seeds=3)
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="folder that holds CIFAR-10 in torchvision's layout; needed unless the run is quick",
    )
    args = parser.parse_args()
    if not (args.data or args.quick):
        parser.error("--data is needed: the folder that holds CIFAR-10")
    # A quick run trains a narrow network on handwritten digits.
    root = None if args.quick else args.data
    rows = sweep(partial(run, root=root), cases(args.seeds, args.quick), args.folder / "paper_accuracy.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "paper_accuracy.png", dpi=110)


if __name__ == "__main__":
    main()
