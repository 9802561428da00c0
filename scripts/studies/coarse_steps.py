"""This study trains on handwritten digits with devices of few states, with three ways to simulate their pulses.

The number of states is a device's dynamic range divided by its mean step. The ways are expected pulses
(``mean_field``), sampled pulses (``bits``) and aihwkit's own tiles (``aihwkit``). The network has four linear layers
and one stage, so that no update is delayed. A run takes 20 epochs, and the report shows means over the seeds. The study
takes five minutes on two cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/coarse_steps.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import lightning.pytorch as pl
from compare_backends import train
from torch import nn

from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.sweeps import sweep

STATES = (25, 50, 100, 400)
BACKENDS: tuple[Any, ...] = ("aihwkit", "mean_field", "bits")


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of states, backends and seeds."""
    states, epochs = (STATES[-1:], 1) if quick else (STATES, 20)
    return [
        {"states": n, "backend": backend, "seed": seed, "epochs": epochs}
        for n, backend, seed in product(states, BACKENDS, range(num_seeds))
    ]


def run(states: int, backend: Any, seed: int, epochs: int) -> list[dict[str, float]]:
    """Train once and return the loss and the accuracy of the last epoch."""
    pl.seed_everything(seed, verbose=False)
    pipeline = {"split_at": [], "device": soft_bounds(tau=4.0, num_states=states, backend=backend)}
    *_, last = train(MLP([64, 64, 48, 32, 10], nn.Tanh), Digits(batch_size=32), pipeline, epochs)
    return [{"loss": last["loss"], "accuracy": last["accuracy"]}]


def report(rows: Sequence[Row]) -> None:
    """Print the mean loss and accuracy for every number of states and every backend."""
    for states, backend in product([n for n in STATES if select(rows, states=n)], BACKENDS):
        loss, accuracy = (
            curves(select(rows, states=states, backend=backend), field).mean() for field in ("loss", "accuracy")
        )
        print(f"{states:>4} states  {backend:<11} training loss {loss:.3f}  accuracy {accuracy:.3f}")


def main() -> None:
    """Run the missing cases and print the report."""
    args = sweep_parser(__doc__, seeds=3).parse_args()
    report(sweep(run, cases(args.seeds, args.quick), args.folder / "coarse_steps.csv", args.jobs))


if __name__ == "__main__":
    main()
