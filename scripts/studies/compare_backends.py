"""This study compares learning curves on the mean-field tile with those on aihwkit's tiles.

It trains an MLP on handwritten digits and LeNet on MNIST, in 1, 4 and 8 stages under the asynchronous schedule. The
updates of the first layer are then 0, 3 and 7 versions late, where a version is the number of updates so far. A third
problem is LeNet in one stage with perfect products (no converters, no noise), where only updates differ, and pulse
trains that are drawn slot by slot (``bits``). The study takes about 50 minutes on two cores. Runs that the CSV file
already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/compare_backends.py --mnist data --folder docs/results
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from aimc_pl.data import MNIST, Digits
from aimc_pl.devices import soft_bounds, soft_bounds_reference
from aimc_pl.figures import BACKENDS as BACKEND_COLORS
from aimc_pl.figures import styled
from aimc_pl.models import MLP, LeNet5
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.tasks import Classifier

PERFECT = "mnist, perfect products"
BACKENDS: tuple[Any, ...] = ("aihwkit", "mean_field")
EPOCHS = {"digits": 20, "mnist": 8, PERFECT: 8}
DELAYS = (0, 3, 7)


def cases(num_seeds: int, quick: bool, with_mnist: bool) -> list[dict[str, Any]]:
    """Return all combinations of problems, backends, delays and seeds."""
    delays = DELAYS[:1] if quick else DELAYS
    grid = list(product(("digits", "mnist") if with_mnist else ("digits",), BACKENDS, delays))
    if with_mnist:
        grid += [(PERFECT, backend, 0) for backend in (*BACKENDS, "bits")]
    return [
        {
            "problem": problem,
            "backend": backend,
            "delay": delay,
            "seed": seed,
            "epochs": 1 if quick else EPOCHS[problem],
        }
        for problem, backend, delay in grid
        for seed in range(num_seeds)
    ]


class Curve(pl.Callback):
    """A callback that collects the mean training loss and the validation accuracy of every epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the loss and the accuracy that the epoch has logged."""
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "loss": float(metrics["train/loss_epoch"]),
                "accuracy": float(metrics["val/accuracy"]),
            }
        )


def digits(backend: Any, delay: int) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return a network of four linear layers, its data, and the strategy's arguments for a pipeline with this delay."""
    splits = {0: [], 3: ["3", "5", "7"], 7: ["2", "3", "4", "5", "6", "7", "8"]}
    network = nn.Sequential(*MLP([64, 64, 48, 32, 10], nn.Tanh), nn.LogSoftmax(1))
    split_at = [f"network.{name}" for name in splits[delay]]
    pipeline = {"split_at": split_at, "device": soft_bounds(tau=4.0, backend=backend)}
    return network, Digits(batch_size=32), pipeline


def mnist(backend: Any, delay: int, root: str, perfect_io: bool) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return LeNet-5, its data, and the strategy's arguments for a pipeline with this delay."""
    splits = {0: [], 3: ["3", "7", "9"], 7: ["1", "3", "4", "7", "8", "9", "11"]}
    split_at = [f"network.{name}" for name in splits[delay]]
    pipeline = {"split_at": split_at, "device": soft_bounds_reference(tau=0.8, perfect_io=perfect_io, backend=backend)}
    return LeNet5(), MNIST(root, batch_size=32), pipeline


def train(
    network: nn.Module, data: Any, pipeline: dict[str, Any], epochs: int, **limits: int
) -> list[dict[str, float]]:
    """Train once through an asynchronous pipeline and return the loss and the accuracy of every epoch."""
    curve = Curve()
    trainer = pl.Trainer(
        max_epochs=epochs,
        **limits,  # pyright: ignore[reportArgumentType]
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(len(pipeline["split_at"]) + 1, "async", 4, **pipeline),
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Classifier(
        network,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=lambda optimizer: LinearLR(optimizer, 1.0, 0.1, total_iters=max(epochs - 1, 1)),
    )
    trainer.fit(task, data)
    return curve.rows


def run(problem: str, backend: str, delay: int, seed: int, epochs: int, root: str) -> list[dict[str, float]]:
    """Train once on one of the problems. An epoch of MNIST is cut to 125 mini-batches."""
    pl.seed_everything(seed, verbose=False)
    if problem == "digits":
        return train(*digits(backend, delay), epochs)
    return train(
        *mnist(backend, delay, root, problem == PERFECT), epochs, limit_train_batches=125, limit_val_batches=60
    )


def compared(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Return the problems and delays of which there are rows."""
    return [
        (problem, delay) for problem, delay in product(EPOCHS, DELAYS) if select(rows, problem=problem, delay=delay)
    ]


def report(rows: Sequence[Row]) -> None:
    """Print the final accuracies and losses of all backends, with 95 % intervals."""
    for problem, delay in compared(rows):
        of_each = []
        for backend in (*BACKENDS, "bits"):
            of_backend = select(rows, problem=problem, backend=backend, delay=delay)
            if not of_backend:
                continue
            for metric in ("accuracy", "loss"):
                last = curves(of_backend, metric)[:, -1]
                of_each.append(f"{backend} {metric} {last.mean():.3f} ± {half_width(last):.3f}")
        print(f"{problem:<7} delay {delay}  {'   '.join(of_each)}")


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the training loss by epoch, mean and standard deviation over the seeds, with all backends in one plot."""
    panels = compared(rows)
    problems = [problem for problem in EPOCHS if problem in dict(panels)]
    figure = Figure(figsize=(10, 2.8 * len(problems)), layout="constrained")
    grid = figure.subplots(len(problems), len(DELAYS), squeeze=False, sharey="row")
    for axes in grid.flat:
        axes.set_visible(False)
    for problem, delay in panels:
        axes = grid[problems.index(problem), DELAYS.index(delay)]
        axes.set_visible(True)
        for backend in (*BACKENDS, "bits"):
            of_backend = select(rows, problem=problem, backend=backend, delay=delay)
            if not of_backend:
                continue
            losses = curves(of_backend, "loss")
            epochs, mean, std = np.arange(1, losses.shape[1] + 1), losses.mean(0), losses.std(0)
            style = {"color": BACKEND_COLORS[backend], "linestyle": "-" if backend == "aihwkit" else "--"}
            axes.plot(epochs, mean, label=backend.replace("_", "-"), **style)
            axes.fill_between(epochs, mean - std, mean + std, color=BACKEND_COLORS[backend], alpha=0.2, linewidth=0)
        axes.set(title=f"{problem}, first layer {delay} versions late", xlabel="epoch", ylabel="training loss")
        axes.set(yscale="log", xlim=(1, EPOCHS[problem]))
    for row in grid:
        row[0].legend()
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    parser = sweep_parser(__doc__, seeds=10)
    parser.add_argument(
        "--mnist",
        metavar="ROOT",
        help="folder that holds MNIST in torchvision's layout; without it only the digits are trained",
    )
    args = parser.parse_args()
    settings = cases(args.seeds, args.quick, with_mnist=bool(args.mnist))
    rows = sweep(partial(run, root=args.mnist), settings, args.folder / "compare_backends.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "compare_backends.png", dpi=120)


if __name__ == "__main__":
    main()
