"""Digits on devices with few states: expected pulses, sampled pulses, and aihwkit's tiles.

A single array of four linear layers, without pipeline delay, 20 epochs, mean over the seeds. Five minutes on two cores.
Usage:

    .venv/bin/python scripts/coarse_steps.py --csv docs/results/coarse_steps.csv
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
from compare_backends import train
from rich.progress import track
from tables import write_csv
from torch import nn

from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP

STATES = (25, 50, 100, 400)
BACKENDS: tuple[Any, ...] = ("aihwkit", "mean_field", "bits")


def main() -> None:
    """Print the means and write every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for states, backend, seed in track([*product(STATES, BACKENDS, range(args.seeds))]):
        pl.seed_everything(seed, verbose=False)
        pipeline = {"split_at": [], "device": soft_bounds(tau=4.0, num_states=states, backend=backend)}
        points = train(MLP([64, 64, 48, 32, 10], nn.Tanh), Digits(batch_size=32), pipeline, {"max_epochs": 20})
        loss, accuracy = points[-1]
        rows.append({"states": states, "backend": backend, "seed": seed, "loss": loss, "accuracy": accuracy})
    write_csv(args.csv, rows)
    for states, backend in product(STATES, BACKENDS):
        mine = [row for row in rows if (row["states"], row["backend"]) == (states, backend)]
        loss, accuracy = mean(row["loss"] for row in mine), mean(row["accuracy"] for row in mine)
        print(f"{states:>4} states  {backend:<11} training loss {loss:.3f}  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
