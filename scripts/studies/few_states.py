"""This study trains on devices of 4 and of 16 states, with several crossbars for a layer and in mixed precision.

The network of ``mnist_algorithms.py``, 784-256-128-10, learns MNIST with all layers on soft-bounds devices: τ = 0.7,
steps that vary by 10 % from cycle to cycle, and products with converters and noise. Multi-tile residual learning
(arXiv 2510.02516) was published for such devices. The learning rate falls from 0.5 to 0.05 for all algorithms. γ = 0.5
was chosen among 0.5 and one over the number of states, by one seed that is not reported. The study takes an hour on two
cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/few_states.py --mnist data --folder docs/results
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

from mnist_algorithms import NETWORKS, train

from aimc_pl.devices import AnalogDevice, mixed_precision, residual_learning, soft_bounds_reference
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep

STATES = (4, 16)


def tiles(device: AnalogDevice, number: int) -> AnalogDevice:
    """Return multi-tile residual learning. Each crossbar is transferred a quarter as often as the one after it."""
    periods = [4.0**n for n in range(number - 1)]
    return residual_learning(device, gamma=0.5, transfer_every=periods, num_crossbars=number)


ALGORITHMS: dict[str, Callable[[AnalogDevice], AnalogDevice]] = {
    "Tiki-Taka version 1": partial(residual_learning, gamma=0.0, transfer_lr=3.0),
    "Tiki-Taka version 2": partial(residual_learning, gamma=0.0, transfer_lr=3.0, digital_buffer=True),
    "4 crossbars": partial(tiles, number=4),
    "6 crossbars": partial(tiles, number=6),
    "mixed precision": mixed_precision,
}


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of seeds, numbers of states and algorithms."""
    epochs = 1 if quick else 10
    return [
        {"states": states, "algorithm": algorithm, "seed": seed, "epochs": epochs}
        for seed, states, algorithm in product(range(num_seeds), STATES, ALGORITHMS)
    ]


def run(states: int, algorithm: str, seed: int, epochs: int, root: str | None, quick: bool) -> list[dict[str, float]]:
    """Train once, and return the accuracy on the test set after the last epoch."""
    device = soft_bounds_reference(tau=0.7, num_states=states, cycle_to_cycle=0.1)
    return train(NETWORKS["784-256-128-10"], ALGORITHMS[algorithm](device), seed, epochs, root, quick)


def report(rows: Sequence[Row]) -> None:
    """Print the mean accuracy on the test set and its 95 % interval."""
    for states, algorithm in product(STATES, ALGORITHMS):
        if of_both := select(rows, states=states, algorithm=algorithm):
            accuracy = 100 * curves(of_both, "accuracy")[:, -1]
            interval = f" ± {half_width(accuracy):.2f}" if len(accuracy) > 1 else ""
            print(f"{states:>3} states  {algorithm:<22}{accuracy.mean():.2f}{interval}")


def main() -> None:
    """Run the missing cases and print the report."""
    parser = sweep_parser(__doc__, seeds=5)
    parser.add_argument("--mnist", metavar="ROOT", help="folder that holds MNIST in torchvision's layout")
    args = parser.parse_args()
    if not (args.mnist or args.quick):
        parser.error("--mnist ROOT is needed, except with --quick")
    settings = cases(args.seeds, args.quick)
    report(sweep(partial(run, root=args.mnist, quick=args.quick), settings, args.folder / "few_states.csv", args.jobs))


if __name__ == "__main__":
    main()
