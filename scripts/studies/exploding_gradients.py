"""This study trains an EfficientNet-B0 in four stages, and measures how far every update moves the weights.

A run has five mini-batches of 32 random images, in four micro-batches each, and starts from random weights with SGD. It
ends early when gradients are no longer finite. The change that an update makes to a weight is the distance that it
moves the weight, divided by the norm of the weight; the largest change over the layers of the stage is recorded. The
study takes a minute on two cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/exploding_gradients.py --folder docs/results
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models import efficientnet_b0

from aimc_pl.callbacks.attach import attach
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Event, Observer
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, select
from aimc_pl.studies.sweeps import sweep

SETTINGS: list[dict[str, Any]] = [
    {"schedule": "async", "lr": 0.003, "clip": 0.0},
    {"schedule": "async", "lr": 0.003, "clip": 1.0},
    {"schedule": "async", "lr": 0.001, "clip": 0.0},
    {"schedule": "async", "lr": 0.0003, "clip": 0.0},
    {"schedule": "sync", "lr": 0.003, "clip": 0.0},
]
"""Schedules, learning rates, and norms to which gradients are clipped (0 means no clipping)."""

SPLIT_AT = ["network.features.2", "network.features.4", "network.features.6"]
"""The boundaries are named, because boundaries found by measuring may differ from run to run."""


class Task(pl.LightningModule):
    """Cross-entropy of an EfficientNet-B0 with ten classes."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.network = efficientnet_b0(num_classes=10)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), self.lr)


class Changes(pl.Callback, Observer):
    """An observer of the pipeline that measures the change of every update."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._before: dict[int, list[Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to observe the pipeline."""
        attach(self, trainer)

    def on_backward(self, event: Event) -> None:
        """Keep a copy of the weights that the next update changes."""
        self._before[event.stage.index] = [weight.detach().clone() for weight in event.stage.parameters]

    def on_update(self, event: Event) -> None:
        """Record the largest change of a weight. Vectors, such as biases, do not count."""
        pairs = zip(event.stage.parameters, self._before[event.stage.index], strict=True)
        change = max(((new - old).norm() / old.norm()).item() for new, old in pairs if old.dim() > 1)
        self.rows.append({"stage": event.stage.index, "microbatch": event.microbatch, "change": change})


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of settings and seeds."""
    settings, num_batches = (SETTINGS[:1], 1) if quick else (SETTINGS, 5)
    return [setting | {"seed": seed, "num_batches": num_batches} for seed in range(num_seeds) for setting in settings]


def run(schedule: Any, lr: float, clip: float, seed: int, num_batches: int) -> list[dict[str, Any]]:
    """Train once and return a row per update, which also says whether all gradients of the run were finite."""
    pl.seed_everything(seed, verbose=False)
    batches = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(num_batches)]
    changes = Changes()
    trainer = pl.Trainer(
        strategy=AnalogPipelineStrategy(4, schedule, 4, split_at=SPLIT_AT),
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=clip or None,
        callbacks=[changes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    is_finite = True
    try:
        trainer.fit(Task(lr), DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType], a list is a data set
    except UsageError as error:
        if "not finite" not in str(error):
            raise
        is_finite = False
    return [row | {"is_finite": int(is_finite)} for row in changes.rows]


def report(rows: Sequence[Row]) -> None:
    """Print, per setting and seed, the largest change in each of the first four micro-batches and in the whole run."""
    for setting in SETTINGS:
        for seed in sorted({str(row["seed"]) for row in rows}):
            changes: dict[int, float] = {}
            chosen = select(rows, seed=seed, **setting)
            for row in chosen:
                number = int(row["microbatch"])
                changes[number] = max(float(row["change"]), changes.get(number, 0.0))
            if chosen:
                first = ", ".join(f"{change:.2g}" for change in [*changes.values()][:4])
                end = "finite" if int(chosen[0]["is_finite"]) else "not finite"
                print(
                    f"{setting['schedule']:<6} lr {setting['lr']:<6} clip {setting['clip']} seed {seed}: "
                    f"{first}; largest {max(changes.values()):.2g}, {end} with micro-batch {max(changes)}"
                )


def main() -> None:
    """Run the missing cases and print the report."""
    args = sweep_parser(__doc__, seeds=3).parse_args()
    report(sweep(run, cases(args.seeds, args.quick), args.folder / "exploding_gradients.csv", args.jobs))


if __name__ == "__main__":
    main()
