"""What the strategy costs in one process: time per step against plain Lightning on the same micro-batches.

Plain Lightning accumulates gradients over B micro-batches; the strategy runs as many in M stages. Under ``sync`` both
do the same. Under ``async`` every micro-batch updates, which is compared with ``sync`` and the B − 1 further updates.
All sides take turns in one run, and the medians over the turns are compared. The start is what the first step takes
longer than others, in steps: where stages are named, and where layers are measured (split_at=None). Usage:

    .venv/bin/python scripts/benchmark_overhead.py --csv docs/results/benchmark_overhead.csv
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from benchmarking import conditions, keep_freed_memory
from tables import write_csv
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aimc_pl.models import GPT, ResNet
from aimc_pl.schedule import ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy

NUM_STAGES, NUM_MICROBATCHES, WARM_UP = 4, 4, 3

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """Eight layers of 1,024."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8)))


def gpt() -> nn.Module:
    """Four layers, 128 wide."""
    return GPT(vocab_size=128, num_layers=4, width=128, num_heads=4, context=128)


def images(*shape: int) -> Batch:
    """A micro-batch of ten classes."""
    return torch.randn(shape), torch.randint(10, shape[:1])


def tokens(*shape: int) -> Batch:
    """A micro-batch of sequences."""
    return torch.randint(128, shape), torch.randint(128, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Sequence[str]]] = {
    "MLP 8x1024, micro-batch 64": (mlp, lambda: images(64, 1024), ["2", "4", "6"]),
    "ResNet-8 32x32, micro-batch 32": (
        lambda: ResNet(8),
        lambda: images(32, 3, 32, 32),
        ["group2", "group3", "fc"],
    ),
    "GPT 4x128, micro-batch 8x128": (gpt, lambda: tokens(8, 128), ["blocks.1", "blocks.2", "blocks.3"]),
}
"""Network, one micro-batch, where stages begin."""


class Task(L.LightningModule):
    """Cross-entropy of a network, without logging."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Batch) -> Tensor:
        """The loss, over samples or over tokens."""
        return F.cross_entropy(self.network(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Timer(L.Callback):
    """When the first batch began, and every batch ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Once."""
        if not self.times:
            self.times.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Each time."""
        self.times.append(time.perf_counter())


def train(network: nn.Module, strategy: Any, batches: list[Any], accumulate: int = 1) -> tuple[float, float]:
    """Train on the batches once; returns the milliseconds of the first step and the mean of those after the warm-up."""
    timer = Timer()
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
    times = timer.times[::accumulate]
    steps = [1e3 * (end - start) for start, end in pairwise(times)]
    # With the last step the pipeline drains.
    return steps[0], mean(steps[WARM_UP:-1] or steps)


def time_update(network: nn.Module, repeats: int = 20) -> float:
    """Milliseconds of the optimizer's step alone."""
    optimizer = Task(network).configure_optimizers()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    optimizer.step()
    start = time.perf_counter()
    for _ in range(repeats):
        optimizer.step()
    return 1e3 * (time.perf_counter() - start) / repeats


def take_turn(
    make: Callable[[], nn.Module], microbatches: Sequence[Batch], split_at: Sequence[str], steps: int
) -> dict[str, float]:
    """Every side once."""
    whole = tuple(torch.cat(parts) for parts in zip(*microbatches, strict=True))
    names = [f"network.{name}" for name in split_at]

    def piped(schedule: ScheduleName, split_at: Sequence[str] | None, steps: int) -> tuple[float, float]:
        strategy = AnalogPipelineStrategy(NUM_STAGES, schedule, NUM_MICROBATCHES, split_at=split_at)
        return train(make(), strategy, [whole] * steps)

    _, plain = train(make(), "auto", [*microbatches] * steps, NUM_MICROBATCHES)
    first, sync = piped("sync", names, steps)
    measuring, _ = piped("sync", None, 1)
    _, each = piped("async", names, steps)
    return {
        "plain_ms": plain,
        "sync_ms": sync,
        "async_ms": each,
        "update_ms": time_update(make()),
        "start_steps": first / sync - 1,
        "start_steps_measuring": measuring / sync - 1,
    }


def main() -> None:
    """Print a line per network."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of one turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="one short turn of the first network")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning suggests more loader processes; the batches are in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # The comparison is at equal micro-batches, for BatchNorm too.
    warnings.filterwarnings("ignore", message="BatchNorm computes its statistics per micro-batch")

    print(conditions(torch.get_num_threads()))
    print(f"{'network':<32}  plain ms   sync ms  ratio  async ms  ratio  update ms  start  split_at=None")
    turns, timed, cases = (1, 2, [*CASES][:1]) if args.quick else (args.turns, args.steps, [*CASES])
    rows: list[dict[str, Any]] = []
    for name in cases:
        make, microbatch, split_at = CASES[name]
        microbatches = [microbatch() for _ in range(NUM_MICROBATCHES)]
        own = [take_turn(make, microbatches, split_at, WARM_UP + timed + 1) for _ in range(turns)]
        rows += [{"network": name, "turn": turn} | values for turn, values in enumerate(own)]
        plain, sync, each, update, start, measuring = (median(turn[key] for turn in own) for key in own[0])
        fair = sync + (NUM_MICROBATCHES - 1) * update
        print(
            f"{name:<32}{plain:>10.2f}{sync:>10.2f}{sync / plain:>7.3f}{each:>10.2f}{each / fair:>7.3f}{update:>11.3f}"
            f"{start:>7.2f}{measuring:>15.2f}",
            flush=True,
        )
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
