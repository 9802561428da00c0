"""This study measures the test accuracy of the shipped digits configs, with many seeds.

The network has four stages on soft-bounds devices, as in configs/digits_*.yaml, and is compared with the same network
without analog layers. ``none`` is not run, because it ends at the weights of ``sync``. The study takes eight minutes
on two cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/digits_accuracy.py --folder docs/results
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from aimc_pl.callbacks import ClockMonitor
from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.sweeps import sweep
from aimc_pl.tasks import Classifier

RUNS: dict[str, Any] = {"async": "async", "sync": "sync", "digital": "sync"}
"""The schedule of each kind of run. All layers are analog, except in the runs ``digital``."""

NUM_REFERENCES = 5
"""The number of seeds of the runs ``sync`` and ``digital``, with which ``async`` is compared."""

EPOCHS = 20
LEARNING_RATE = 0.2
GOAL = 0.94


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return the kinds of runs with their seeds."""
    seeds = {kind: num_seeds if kind == "async" else min(num_seeds, NUM_REFERENCES) for kind in RUNS}
    return [{"run": kind, "seed": s, "epochs": 1 if quick else EPOCHS} for kind in RUNS for s in range(seeds[kind])]


def run(run: str, seed: int, epochs: int) -> list[dict[str, Any]]:
    """Train once and return the test accuracy, the clock cycles and the speedup over no pipeline."""
    L.seed_everything(seed, verbose=False)
    clock = ClockMonitor()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(
            4,
            RUNS[run],
            4,
            device=None if run == "digital" else soft_bounds(tau=4.0, num_states=1200),
            split_at=["network.3", "network.5", "network.7"],
        ),
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = MLP([64, 64, 48, 32, 10], torch.nn.Tanh)
    task = Classifier(
        network,
        optimizer=partial(SGD, lr=LEARNING_RATE),
        # A partial has no type of a class, but is called like one.
        lr_scheduler=partial(CosineAnnealingLR, T_max=epochs),  # pyright: ignore[reportArgumentType]
    )
    data = Digits(batch_size=32)
    trainer.fit(task, data)
    accuracy = trainer.test(task, data, verbose=False)[0]["test/accuracy"]
    return [{"accuracy": accuracy, "cycles": clock.cycles, "speedup": clock.speedup}]


def report(rows: Sequence[Row]) -> None:
    """Print the accuracies of every kind of run, its clock cycles and its speedup."""
    for kind in RUNS:
        accuracy, cycles, speedup = (curves(select(rows, run=kind), key) for key in ("accuracy", "cycles", "speedup"))
        print(
            f"{kind:<8} accuracy {accuracy.mean():.4f}, from {accuracy.min():.4f} to {accuracy.max():.4f}, "
            f"{(accuracy >= GOAL).sum()} of {len(accuracy)} at least {GOAL}; "
            f"{cycles.mean():.0f} clock cycles, speedup {speedup.mean():.2f}"
        )


def main() -> None:
    """Run the missing cases and print the report."""
    args = sweep_parser(__doc__, seeds=20).parse_args()
    report(sweep(run, cases(args.seeds, args.quick), args.folder / "digits_accuracy.csv", args.jobs))


if __name__ == "__main__":
    main()
