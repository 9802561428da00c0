"""This benchmark compares one training step on the mean-field tile with one on aihwkit's tiles and in plain torch.

All sides train the same network on soft-bounds reference devices with the same batches. They take turns in one run, and
medians over all steps are compared. The benchmark takes two minutes on two cores. The number of aihwkit's pulses, and
with it aihwkit's time, depends on the learning rate. Usage:

    .venv/bin/python scripts/benchmarks/tile.py --folder docs/results

On a GPU (``--device cuda``) there is one case, ResNet-18 at batch 128, aihwkit is left out, and the file is
``tile_gpu.csv``.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from aihwkit.optim import AnalogSGD
from machine import conditions, keep_freed_memory, write_measured
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from aimc_pl.devices import convert_to_analog, soft_bounds_reference
from aimc_pl.models import MLP, LeNet5, ResNet
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

Network = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Network, tuple[int, ...]]] = {
    "MLP 784-256-128-10, batch 10": (lambda: MLP([784, 256, 128, 10]), (10, 1, 28, 28)),
    "LeNet-5, batch 32": (LeNet5, (32, 1, 28, 28)),
    "ResNet-8, batch 32": (lambda: ResNet(8), (32, 3, 32, 32)),
}
GPU_NETWORKS: dict[str, tuple[Network, tuple[int, ...]]] = {
    "ResNet-18, batch 128": (lambda: resnet18(num_classes=10), (128, 3, 32, 32)),
}
WARM_UP = 2
"""Number of steps at the start of every turn that are not timed."""


def cases(device: str, quick: bool) -> list[tuple[str, bool]]:
    """Return the networks, each once with converters and noise and once with perfect products."""
    names = [*(NETWORKS if device == "cpu" else GPU_NETWORKS)]
    return [(name, perfect_io) for name in (names[:1] if quick else names) for perfect_io in (False, True)]


class Side:
    """A network with its optimizer and the times of its steps."""

    def __init__(self, make: Network, backend: Any, perfect_io: bool, device: str, learning_rate: float) -> None:
        torch.manual_seed(0)
        self.network = make()
        if backend == "torch":
            self.network.to(device)
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=learning_rate)
        else:
            convert_to_analog(self.network, soft_bounds_reference(perfect_io=perfect_io, backend=backend))
            self.network.to(device)
            self.optimizer = AnalogSGD(self.network.parameters(), lr=learning_rate)
        self.times: list[float] = []

    def step(self, x: torch.Tensor, y: torch.Tensor, is_timed: bool) -> None:
        """Make one forward, backward and update, and keep the time in milliseconds if ``is_timed``."""
        _wait(x.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()
        _wait(x.device)
        if is_timed:
            self.times.append(1e3 * (time.perf_counter() - start))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(name: str, perfect_io: bool, device: str, learning_rate: float, turns: int, steps: int) -> Row:
    """Let the sides take turns with the same batch, and return a row with the median times of their steps."""
    make, shape = (NETWORKS | GPU_NETWORKS)[name]
    on_cpu = device == "cpu"
    backends = ["torch", "mean_field", *(["aihwkit"] if on_cpu else [])]
    sides = {backend: Side(make, backend, perfect_io, device, learning_rate) for backend in backends}
    x = torch.randn(shape, device=device)
    y = torch.randint(10, shape[:1], device=device)
    for _ in range(turns):
        for side in sides.values():
            for number in range(WARM_UP + steps):
                side.step(x, y, is_timed=number >= WARM_UP)
    times = {backend: median(side.times) for backend, side in sides.items()}
    processor = device if on_cpu else torch.cuda.get_device_name(device)
    row = {"network": name, "perfect_io": perfect_io, "device": processor}
    row |= {f"{backend}_ms": round(value, 3) for backend, value in times.items()}
    row["over_torch"] = round(times["mean_field"] / times["torch"], 2)
    if on_cpu:
        row["aihwkit_over_mean_field"] = round(times["aihwkit"] / times["mean_field"], 2)
    row["images_per_second"] = round(1e3 * shape[0] / times["mean_field"])
    return row


def report(rows: Sequence[Row]) -> None:
    """Print a line for every network, with and without perfect products."""
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def main() -> None:
    """Measure, write the rows and print the report."""
    parser = study_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=at_least_one, default=5, help="number of turns of each side")
    parser.add_argument("--steps", type=at_least_one, default=10, help="number of timed steps in a turn")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    print(f"{conditions(torch.get_num_threads())}, {args.device}, milliseconds per step")
    turns, steps = (1, 1) if args.quick else (args.turns, args.steps)
    rows = [
        run(name, perfect_io, args.device, args.learning_rate, turns, steps)
        for name, perfect_io in track(cases(args.device, args.quick))
    ]
    write_measured(args.folder / ("tile.csv" if args.device == "cpu" else "tile_gpu.csv"), rows)
    report(rows)


if __name__ == "__main__":
    main()
