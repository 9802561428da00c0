"""This study trains the two networks of the published tables of residual learning (arXiv 2502.06309) on MNIST.

A fully connected network 784-256-128-10 with sigmoids, and LeNet-5, learn with digital layers and by four algorithms.
All layers are on soft-bounds devices: τ = 0.7, 1,200 states, steps that vary by 10 % from cycle to cycle, and products
with converters and noise. The learning rate falls from 0.5 to 0.05 for all algorithms, and was not tuned for any. The
study takes two hours on two cores. Runs that the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/mnist_algorithms.py --mnist data --folder docs/results
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.data import MNIST
from aimc_pl.devices import AnalogDevice, mixed_precision, residual_learning, soft_bounds_reference
from aimc_pl.models import MLP, LeNet5
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.tasks import Classifier

NETWORKS: dict[str, Callable[[], nn.Module]] = {"784-256-128-10": lambda: MLP([784, 256, 128, 10]), "LeNet-5": LeNet5}

DEVICE = soft_bounds_reference(tau=0.7, cycle_to_cycle=0.1)
ALGORITHMS: dict[str, AnalogDevice | None] = {
    "digital": None,
    "analog SGD": DEVICE,
    "Tiki-Taka version 1": residual_learning(DEVICE, gamma=0.0, transfer_lr=3.0),
    "residual learning": residual_learning(DEVICE, gamma=0.4, transfer_lr=3.0),
    "mixed precision": mixed_precision(DEVICE),
}


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of networks, seeds and algorithms."""
    epochs = 1 if quick else 10
    return [
        {"network": network, "algorithm": algorithm, "seed": seed, "epochs": epochs}
        for network, seed, algorithm in product(NETWORKS, range(num_seeds), ALGORITHMS)
    ]


def loaders(root: str | None) -> Sequence[DataLoader[Any]]:
    """Return loaders of the training and the test set; without a folder, loaders of a few random images."""
    if root is None:
        noise = DataLoader(TensorDataset(torch.randn(64, 1, 28, 28), torch.randint(10, (64,))), batch_size=32)
        return noise, noise
    data = MNIST(root, batch_size=32)
    data.setup("fit")
    return data.train_dataloader(), data.test_dataloader()


def run(network: str, algorithm: str, seed: int, epochs: int, root: str | None, quick: bool) -> list[dict[str, float]]:
    """Train once, and return the accuracy on the test set after the last epoch."""
    return train(NETWORKS[network], ALGORITHMS[algorithm], seed, epochs, root, quick)


def train(
    network: Callable[[], nn.Module],
    device: AnalogDevice | None,
    seed: int,
    epochs: int,
    root: str | None,
    quick: bool,
) -> list[dict[str, float]]:
    """Train a network on a device, at a rate that falls from 0.5 to 0.05, and return its accuracy on the test set."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(1, "none", 1, device),
        limit_train_batches=2 if quick else None,
        limit_val_batches=0,
        limit_test_batches=2 if quick else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Classifier(
        network(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: LinearLR(optimizer, 1.0, 0.1, total_iters=max(epochs - 1, 1)),
    )
    images, test_images = loaders(root)
    trainer.fit(task, images)
    (tested,) = trainer.test(task, test_images, verbose=False)
    return [{"accuracy": tested["test/accuracy"]}]


def report(rows: Sequence[Row]) -> None:
    """Print the mean accuracy on the test set and its 95 % interval."""
    for network, algorithm in product(NETWORKS, ALGORITHMS):
        if of_both := select(rows, network=network, algorithm=algorithm):
            accuracy = 100 * curves(of_both, "accuracy")[:, -1]
            interval = f" ± {half_width(accuracy):.2f}" if len(accuracy) > 1 else ""
            print(f"{network:<16}{algorithm:<22}{accuracy.mean():.2f}{interval}")


def main() -> None:
    """Run the missing cases and print the report."""
    parser = sweep_parser(__doc__, seeds=5)
    parser.add_argument("--mnist", metavar="ROOT", help="folder that holds MNIST in torchvision's layout")
    args = parser.parse_args()
    if not (args.mnist or args.quick):
        parser.error("--mnist ROOT is needed, except with --quick")
    settings = cases(args.seeds, args.quick)
    report(
        sweep(
            partial(run, root=args.mnist, quick=args.quick), settings, args.folder / "mnist_algorithms.csv", args.jobs
        )
    )


if __name__ == "__main__":
    main()
