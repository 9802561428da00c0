"""This study measures the test accuracy on handwritten digits under three schedules, with several seeds.

The network has four stages on soft-bounds devices, as in configs/digits_*.yaml. The study takes six minutes on two
cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/digits_accuracy.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import lightning as L
import torch

from aimc_pl.callbacks import ClockMonitor
from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.sweeps import sweep
from aimc_pl.tasks import Classifier

SCHEDULES: tuple[Any, ...] = ("none", "sync", "async")


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of schedules and seeds."""
    return [
        {"schedule": schedule, "seed": seed, "epochs": 1 if quick else 20}
        for schedule, seed in product(SCHEDULES, range(num_seeds))
    ]


def run(schedule: Any, seed: int, epochs: int) -> list[dict[str, Any]]:
    """Train once and return the test accuracy, the clock cycles and the speedup over no pipeline."""
    L.seed_everything(seed, verbose=False)
    clock = ClockMonitor()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(
            4,
            schedule,
            4,
            device=soft_bounds(tau=4.0, num_states=1200),
            split_at=["network.3", "network.5", "network.7"],
        ),
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task, data = Classifier(MLP([64, 64, 48, 32, 10], torch.nn.Tanh)), Digits(batch_size=32)
    trainer.fit(task, data)
    accuracy = trainer.test(task, data, verbose=False)[0]["test/accuracy"]
    return [{"accuracy": accuracy, "cycles": clock.cycles, "speedup": clock.speedup}]


def report(rows: Sequence[Row]) -> None:
    """Print the mean accuracy, clock cycles and speedup of every schedule."""
    for schedule in SCHEDULES:
        accuracy, cycles, speedup = (
            curves(select(rows, schedule=schedule), field).mean() for field in ("accuracy", "cycles", "speedup")
        )
        print(f"{schedule:<6} accuracy {accuracy:.4f}  cycles {cycles:.0f}  speedup {speedup:.2f}")


def main() -> None:
    """Run the missing cases and print the report."""
    args = sweep_parser(__doc__, seeds=10).parse_args()
    report(sweep(run, cases(args.seeds, args.quick), args.folder / "digits_accuracy.csv", args.jobs))


if __name__ == "__main__":
    main()
