"""One training step on the mean-field tile against aihwkit's tiles and against plain torch.

All sides train the same network on soft-bounds reference devices with the same batches. They take turns in one run, and
medians over all steps are compared. Two minutes on two cores; the pulses of aihwkit, and so its time, depend on the
learning rate. Usage:

    .venv/bin/python scripts/benchmark_tile.py --csv docs/results/benchmark_tile.csv

On a GPU (``--device cuda``) there is one case, ResNet-18 at batch 128, and no aihwkit.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from aihwkit.optim import AnalogSGD
from benchmarking import conditions, keep_freed_memory
from rich.progress import track
from tables import write_csv
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from aimc_pl.devices import convert_to_analog, soft_bounds_reference
from aimc_pl.models import MLP, LeNet5, ResNet

Network = Callable[[], nn.Module]
CASES: dict[str, tuple[Network, tuple[int, ...]]] = {
    "MLP 784-256-128-10, batch 10": (lambda: MLP([784, 256, 128, 10]), (10, 1, 28, 28)),
    "LeNet-5, batch 32": (LeNet5, (32, 1, 28, 28)),
    "ResNet-8, batch 32": (lambda: ResNet(8), (32, 3, 32, 32)),
}
GPU_CASES: dict[str, tuple[Network, tuple[int, ...]]] = {
    "ResNet-18, batch 128": (lambda: resnet18(num_classes=10), (128, 3, 32, 32)),
}


class Side:
    """A network with its optimizer, and the times of its steps."""

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

    def step(self, x: torch.Tensor, y: torch.Tensor, count: bool) -> None:
        """One forward, backward and update; ``count`` its time in milliseconds."""
        _wait(x.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()
        _wait(x.device)
        if count:
            self.times.append(1e3 * (time.perf_counter() - start))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print a line per network and kind of products, and write them."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=12, help="steps of one turn, of which the first two are not timed")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    print(f"{conditions(torch.get_num_threads())}, {args.device}, milliseconds per step")
    rows: list[dict[str, Any]] = []
    for (name, (make, shape)), perfect_io in track(
        [(case, perfect) for case in (CASES if on_cpu else GPU_CASES).items() for perfect in (False, True)]
    ):
        backends = ["torch", "mean_field", *(["aihwkit"] if on_cpu else [])]
        sides = {b: Side(make, b, perfect_io, args.device, args.learning_rate) for b in backends}
        x = torch.randn(shape, device=args.device)
        y = torch.randint(10, shape[:1], device=args.device)
        for _ in range(args.turns):
            for side in sides.values():
                for i in range(args.steps):
                    side.step(x, y, count=i > 1)
        times = {backend: median(side.times) for backend, side in sides.items()}
        row = {"network": name, "perfect_io": perfect_io, "device": args.device}
        row |= {f"{backend}_ms": round(value, 3) for backend, value in times.items()}
        row["over_torch"] = round(times["mean_field"] / times["torch"], 2)
        if on_cpu:
            row["aihwkit_over_mean_field"] = round(times["aihwkit"] / times["mean_field"], 2)
        row["images_per_second"] = round(1e3 * shape[0] / times["mean_field"])
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
