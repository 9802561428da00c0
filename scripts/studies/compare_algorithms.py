"""This study compares learning curves of training algorithms on the mean-field tile with those on aihwkit's tiles.

A network of two linear layers on soft-bounds devices learns handwritten digits in one stage, once for each of aihwkit's
compounds that transfer between crossbars or program digital steps. The study takes ten minutes on two cores. Runs that
the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/compare_algorithms.py --folder docs/results
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import lightning.pytorch as pl
import numpy as np
from compare_backends import BACKENDS, train
from matplotlib.figure import Figure
from scipy.stats import ttest_ind
from torch import nn

from aimc_pl.data import Digits
from aimc_pl.devices import (
    AnalogDevice,
    chopped_transfer,
    dynamic_transfer,
    mixed_precision,
    residual_learning,
    soft_bounds,
)
from aimc_pl.figures import BACKENDS as BACKEND_COLORS
from aimc_pl.figures import styled
from aimc_pl.models import MLP
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width, standard_error
from aimc_pl.studies.sweeps import sweep

EPOCHS = 10
ALGORITHMS: dict[str, Callable[[AnalogDevice], AnalogDevice]] = {
    "Tiki-Taka version 1": partial(residual_learning, gamma=0.0, transfer_lr=3.0),
    "residual learning": partial(residual_learning, gamma=0.4),
    "with a digital buffer": partial(residual_learning, gamma=0.4, digital_buffer=True),
    "choppers": partial(chopped_transfer, transfer_lr=3.0),
    "AGAD": partial(dynamic_transfer, chop_prob=0.5, transfer_lr=3.0),
    "mixed precision": mixed_precision,
}


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of seeds, algorithms and backends. A quick run has two algorithms."""
    algorithms, epochs = ([*ALGORITHMS][:2], 1) if quick else (ALGORITHMS, EPOCHS)
    return [
        {"algorithm": algorithm, "backend": backend, "seed": seed, "epochs": epochs}
        for seed, algorithm, backend in product(range(num_seeds), algorithms, BACKENDS)
    ]


def run(algorithm: str, backend: Any, seed: int, epochs: int) -> list[dict[str, float]]:
    """Train once and return the training loss and the validation accuracy of every epoch."""
    pl.seed_everything(seed, verbose=False)
    device = ALGORITHMS[algorithm](soft_bounds(tau=0.6, backend=backend))
    network = nn.Sequential(*MLP([64, 32, 10], nn.Tanh), nn.LogSoftmax(1))
    return train(network, Digits(batch_size=32), {"split_at": [], "device": device}, epochs)


def losses_of(rows: Sequence[Row], algorithm: str) -> list[np.ndarray]:
    """Return the training losses ``(seeds, epochs)`` on aihwkit's tiles and on the mean-field tile."""
    return [curves(select(rows, algorithm=algorithm, backend=backend), "loss") for backend in BACKENDS]


def report(rows: Sequence[Row]) -> None:
    """Print the final losses on aihwkit's tiles and on the mean-field tile, and their difference, with 95 % intervals.

    The intervals are Student's, and Welch's for the difference.
    """
    for algorithm in ALGORITHMS:
        if not select(rows, algorithm=algorithm):
            continue
        theirs, ours = (losses[:, -1] for losses in losses_of(rows, algorithm))
        losses = (f"{each.mean():.3f} ± {half_width(each):.3f}" for each in (theirs, ours))
        print(f"{algorithm:<22}", *losses, sep="  ")
        if len(ours) > 1:
            low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
            print(f"{'':<22}  difference {low:+.3f} to {high:+.3f}")


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the training loss by epoch, mean and standard error over the seeds, with both backends in one plot."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for axes, algorithm in zip(figure.subplots(2, 3, sharex=True).flat, ALGORITHMS, strict=True):
        if not select(rows, algorithm=algorithm):
            continue
        for backend, losses in zip(BACKENDS, losses_of(rows, algorithm), strict=True):
            epochs, mean = np.arange(1, losses.shape[1] + 1), losses.mean(0)
            error = np.array([standard_error(of_epoch) for of_epoch in losses.T])
            style = {"color": BACKEND_COLORS[backend], "linestyle": "-" if backend == "aihwkit" else "--"}
            axes.plot(epochs, mean, label=backend.replace("_", "-"), **style)
            axes.fill_between(epochs, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
        axes.set(title=algorithm, xlabel="epoch", ylabel="training loss", yscale="log")
        axes.legend()
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=10).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "compare_algorithms.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "compare_algorithms.png", dpi=120)


if __name__ == "__main__":
    main()
