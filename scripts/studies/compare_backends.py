"""Learning curves on the mean-field tile beside aihwkit's tiles: digits, and LeNet on MNIST, in 1, 4 and 8 stages.

Under the asynchronous schedule the first layer's updates are 0, 3 and 7 versions late. Runs that the CSV file holds are
not repeated. About 30 minutes on two cores. Usage:

    .venv/bin/python scripts/compare_backends.py --csv docs/results/compare_backends.csv \
        --png docs/images/compare_backends.png --mnist data
"""

from functools import partial
from itertools import product
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from sweeps import Row, curves, select, standard_error, study_parser, sweep, writable
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from aimc_pl.data import MNIST, Digits
from aimc_pl.devices import soft_bounds, soft_bounds_reference
from aimc_pl.models import MLP, LeNet5
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier

BACKENDS: tuple[Any, ...] = ("aihwkit", "mean_field")
DELAYS = (0, 3, 7)


class Curve(pl.Callback):
    """The mean training loss and the validation accuracy of every epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take both from what has been logged."""
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "loss": float(metrics["train/loss_epoch"]),
                "accuracy": float(metrics["val/accuracy"]),
            }
        )


def digits(backend: Any, delay: int) -> tuple[nn.Module, Any, dict[str, Any], dict[str, Any]]:
    """A network of four linear layers, its data, its pipeline and its length."""
    splits = {0: [], 3: ["3", "5", "7"], 7: ["2", "3", "4", "5", "6", "7", "8"]}
    network = nn.Sequential(*MLP([64, 64, 48, 32, 10], nn.Tanh), nn.LogSoftmax(1))
    split_at = [f"network.{name}" for name in splits[delay]]
    pipeline = {"split_at": split_at, "device": soft_bounds(tau=4.0, backend=backend)}
    return network, Digits(batch_size=32), pipeline, {"max_epochs": 20}


def mnist(backend: Any, delay: int, root: str) -> tuple[nn.Module, Any, dict[str, Any], dict[str, Any]]:
    """LeNet-5, its data, its pipeline and its length."""
    splits = {0: [], 3: ["3", "7", "9"], 7: ["1", "3", "4", "7", "8", "9", "11"]}
    split_at = [f"network.{name}" for name in splits[delay]]
    pipeline = {"split_at": split_at, "device": soft_bounds_reference(tau=0.8, backend=backend)}
    length = {"max_epochs": 8, "limit_train_batches": 125, "limit_val_batches": 60}
    return LeNet5(), MNIST(root, batch_size=32), pipeline, length


def train(network: nn.Module, data: Any, pipeline: dict[str, Any], length: dict[str, Any]) -> list[dict[str, float]]:
    """Train once through an asynchronous pipeline; returns loss and accuracy by epoch."""
    curve = Curve()
    trainer = pl.Trainer(
        **length,
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
        lr_scheduler=lambda optimizer: LinearLR(optimizer, 1.0, 0.1, total_iters=length["max_epochs"] - 1),
    )
    trainer.fit(task, data)
    return curve.rows


def run(problem: str, backend: str, delay: int, seed: int, root: str) -> list[dict[str, float]]:
    """One run of the comparison."""
    pl.seed_everything(seed, verbose=False)
    return train(*(digits(backend, delay) if problem == "digits" else mnist(backend, delay, root)))


def draw(rows: list[Row]) -> Figure:
    """Training loss by epoch, mean and standard deviation over the seeds, both backends over each other."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure = Figure(figsize=(4 * len(DELAYS), 3.2 * len(problems)), layout="constrained")
    grid = figure.subplots(len(problems), len(DELAYS), squeeze=False)
    for (i, problem), (j, delay) in product(enumerate(problems), enumerate(DELAYS)):
        axes = grid[i, j]
        for backend in BACKENDS:
            losses = curves(select(rows, problem=problem, backend=backend, delay=delay), "loss")
            epochs, mean, std = np.arange(1, losses.shape[1] + 1), losses.mean(0), losses.std(0)
            axes.plot(epochs, mean, label=backend, linestyle="-" if backend == "aihwkit" else "--")
            axes.fill_between(epochs, mean - std, mean + std, alpha=0.25)
        axes.set(title=f"{problem}, first layer {delay} versions late", xlabel="epoch", ylabel="training loss")
        axes.set_yscale("log")
        axes.legend()
    return figure


def main() -> None:
    """Run what is missing, draw, and print final accuracies and losses."""
    parser = study_parser(__doc__, seeds=10)
    parser.add_argument("--png", type=writable, required=True, help="of the picture")
    parser.add_argument("--mnist", metavar="ROOT", help="folder of MNIST, in torchvision's layout; digits only without")
    args = parser.parse_args()
    problems = ["digits", "mnist"] if args.mnist else ["digits"]
    cases = [
        {"problem": problem, "backend": backend, "delay": delay, "seed": seed}
        for problem, backend, delay, seed in product(problems, BACKENDS, DELAYS, range(args.seeds))
    ]
    rows = sweep(partial(run, root=args.mnist), cases, args.csv, args.jobs)
    draw(rows).savefig(args.png, dpi=120)
    for problem, delay in product(problems, DELAYS):
        of_each = []
        for backend in BACKENDS:
            of_backend = select(rows, problem=problem, backend=backend, delay=delay)
            for metric in ("accuracy", "loss"):
                last = curves(of_backend, metric)[:, -1]
                of_each.append(f"{backend} {metric} {last.mean():.3f} ± {standard_error(last):.3f}")
        print(f"{problem:<7} delay {delay}  {'   '.join(of_each)}")


if __name__ == "__main__":
    main()
