"""What the strategy costs in one process: time per step against plain Lightning on the same micro-batches.

Plain Lightning accumulates gradients over B micro-batches; the strategy runs ``sync`` with B micro-batches in M stages.
Both sides take turns in one run, and the medians over the turns are compared. Usage:

    .venv/bin/python scripts/benchmark_overhead.py --csv docs/results/benchmark_overhead.csv
"""

import argparse
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from benchmarking import keep_freed_memory, other_load
from tables import write_csv
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aimc_pl.models import ResNet
from aimc_pl.strategies import AnalogPipelineStrategy


class Task(L.LightningModule):
    """Cross-entropy of a network, without logging."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Timer(L.Callback):
    """Seconds from the end of the first steps to the end of the last."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock after the warm-up."""
        if trainer.global_step <= self.warm_up:
            self._start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the clock."""
        self.seconds = time.perf_counter() - self._start


def milliseconds_per_step(
    network: nn.Module, strategy: Any, batches: list[Any], accumulate: int, warm_up: int
) -> float:
    """Train on the batches once and time a step."""
    timer = Timer(warm_up)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(network), DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    return 1e3 * timer.seconds / (len(batches) // accumulate - warm_up)


def main() -> None:
    """Print a line per network."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of one turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    args = parser.parse_args()
    # Lightning suggests more loader processes; the batches are in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # The comparison is at equal micro-batches, for BatchNorm too.
    warnings.filterwarnings("ignore", message="BatchNorm computes its statistics per micro-batch")

    stages, microbatches, warm_up = 4, 4, 3
    cases = {
        "MLP 8x1024, micro-batch 64": (
            lambda: nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8))),
            (64, 1024),
            ["2", "4", "6"],
        ),
        "ResNet-8 32x32, micro-batch 32": (lambda: ResNet(8), (32, 3, 32, 32), ["group2", "group3", "fc"]),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, other load {other_load():.0%}")
    print(f"{'network':<32}{'plain ms':>10}{'sync ms':>10}{'ratio':>8}")
    rows: list[dict[str, Any]] = []
    for name, (make, shape, split_at) in cases.items():
        steps = args.steps + warm_up
        small = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(microbatches)]
        whole = [torch.cat(parts) for parts in zip(*small, strict=True)]
        plain, piped = [], []
        for _ in range(args.turns):
            plain.append(milliseconds_per_step(make(), "auto", small * steps, microbatches, warm_up))
            strategy = AnalogPipelineStrategy(stages, "sync", microbatches, split_at=split_at)
            piped.append(milliseconds_per_step(make(), strategy, [tuple(whole)] * steps, 1, warm_up))
        print(
            f"{name:<32}{median(plain):>10.1f}{median(piped):>10.1f}{median(piped) / median(plain):>8.3f}", flush=True
        )
        rows += [
            {"network": name, "turn": i, "plain_ms": a, "sync_ms": b}
            for i, (a, b) in enumerate(zip(plain, piped, strict=True))
        ]
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
