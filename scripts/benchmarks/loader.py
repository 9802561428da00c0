"""This benchmark tells whether loading images is the bottleneck of training.

It compares the images per second of the in-memory loader, of torchvision's usual loader and of the training step of a
digital ResNet-8. The images are random ones of CIFAR-10's size, shifted, flipped and normalised, in mini-batches of 128
and in one process. Usage:

    .venv/bin/python scripts/benchmarks/loader.py --folder docs/results
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from machine import conditions, write_measured
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from aimc_pl.data.images import ImageSet, _as_is
from aimc_pl.models import ResNet
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

BATCH = 128


class PerSample(Dataset[tuple[Tensor, int]]):
    """A data set that transforms its images one by one, as torchvision's data sets do."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        return self.transform(self.images[index]), 0


def cases(num_batches: int) -> dict[str, tuple[Iterable[Any], Callable[[Any], object]]]:
    """Return the batches of each case, one more than are timed, and the function to call with each batch."""
    torch.manual_seed(0)
    images = torch.randint(0, 255, ((num_batches + 1) * BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    mean = torch.full((3,), 0.5)
    in_memory = DataLoader(ImageSet(images, labels, mean, mean / 2, augment=True), BATCH, True, collate_fn=_as_is)
    per_sample = DataLoader(PerSample(images), BATCH, True)
    network = ResNet(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()

    def only_load(batch: Any) -> None:
        pass

    return {
        "in-memory loader": (in_memory, only_load),
        "per-sample loader": (per_sample, only_load),
        "digital ResNet-8 step": ([*in_memory], step),
    }


def run(what: str, batches: Iterable[Any], do: Callable[[Any], object]) -> Row:
    """Time one pass over the batches. The first batch is a warm-up and is not timed."""
    iterator = iter(batches)
    do(next(iterator))
    start, count = time.perf_counter(), 0
    for batch in iterator:
        do(batch)
        count += len(batch[0])
    return {"what": what, "images_per_second": count / (time.perf_counter() - start)}


def report(rows: Sequence[Row]) -> None:
    """Print the images per second of every case."""
    for row in rows:
        print(f"{row['what']:<24}{row['images_per_second']:>10.0f} images/s")


def main() -> None:
    """Measure, write the rows and print the report."""
    parser = study_parser(__doc__)
    parser.add_argument("--batches", type=at_least_one, default=60, help="number of timed batches")
    args = parser.parse_args()
    print(conditions(torch.get_num_threads()))
    rows = [run(what, *case) for what, case in cases(1 if args.quick else args.batches).items()]
    write_measured(args.folder / "loader.csv", rows)
    report(rows)


if __name__ == "__main__":
    main()
