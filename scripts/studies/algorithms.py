"""This study compares training algorithms for analog layers on handwritten digits.

A network of four linear layers on soft-bounds devices of a narrow range (τ = 0.6) learns by analog SGD and by residual
learning, with and without a digital buffer, for several weights γ of the second crossbar and several rates β of the
transfers. The same network with digital layers is the control. A run takes 20 epochs in one stage. The study takes 15
minutes on two cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/algorithms.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import lightning.pytorch as pl
from compare_backends import train
from torch import nn

from aimc_pl.data import Digits
from aimc_pl.devices import AnalogDevice, residual_learning, soft_bounds
from aimc_pl.models import MLP
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep

GAMMAS = (0.0, 0.1, 0.4)
RATES = (0.1, 0.3, 1.0, 3.0)
SETTINGS: list[dict[str, Any]] = [
    {"algorithm": "digital", "gamma": "", "transfer_lr": ""},
    {"algorithm": "analog SGD", "gamma": "", "transfer_lr": ""},
    *({"algorithm": "residual learning", "gamma": g, "transfer_lr": rate} for g, rate in product(GAMMAS, RATES)),
    *({"algorithm": "with a digital buffer", "gamma": GAMMAS[-1], "transfer_lr": rate} for rate in RATES),
]


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of settings and seeds."""
    settings, epochs = (SETTINGS[1:3], 1) if quick else (SETTINGS, 20)
    return [setting | {"seed": seed, "epochs": epochs} for setting, seed in product(settings, range(num_seeds))]


def device_of(algorithm: str, gamma: Any, transfer_lr: Any) -> AnalogDevice | None:
    """Return the device of all layers; ``None`` for digital ones."""
    device = soft_bounds(tau=0.6)
    if algorithm == "digital":
        return None
    if algorithm == "analog SGD":
        return device
    return residual_learning(device, gamma, transfer_lr, digital_buffer=algorithm == "with a digital buffer")


def run(algorithm: str, gamma: Any, transfer_lr: Any, seed: int, epochs: int) -> list[dict[str, float]]:
    """Train once and return the training loss and the validation accuracy of the last epoch."""
    pl.seed_everything(seed, verbose=False)
    pipeline = {"split_at": [], "device": device_of(algorithm, gamma, transfer_lr)}
    network = nn.Sequential(*MLP([64, 64, 48, 32, 10], nn.Tanh), nn.LogSoftmax(1))
    *_, last = train(network, Digits(batch_size=32), pipeline, epochs)
    return [{"loss": last["loss"], "accuracy": last["accuracy"]}]


def report(rows: Sequence[Row]) -> None:
    """Print the mean of loss and accuracy for every setting, with 95 % intervals."""
    for setting in SETTINGS:
        if of_setting := select(rows, **setting):
            loss, accuracy = curves(of_setting, "loss")[:, -1], curves(of_setting, "accuracy")[:, -1]
            name = " ".join(str(value) for value in setting.values())
            print(
                f"{name:<34} training loss {loss.mean():.3f} ± {half_width(loss):.3f}  "
                f"accuracy {accuracy.mean():.3f} ± {half_width(accuracy):.3f}"
            )


def main() -> None:
    """Run the missing cases and print the report."""
    args = sweep_parser(__doc__, seeds=5).parse_args()
    report(sweep(run, cases(args.seeds, args.quick), args.folder / "algorithms.csv", args.jobs))


if __name__ == "__main__":
    main()
