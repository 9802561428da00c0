"""What the strategy costs in one process: time per step against plain Lightning on the same micro-batches.

Plain Lightning accumulates gradients over B micro-batches; the strategy runs as many in M stages. Under ``sync`` both
do the same. Under ``async`` every micro-batch updates, which is compared with ``sync`` and the B − 1 further updates.
All sides take turns in one run, and the medians over the turns are compared. The start is what the first step takes
longer than others, in steps: where stages are named, and where layers are measured (split_at=None). Usage:

    .venv/bin/python scripts/benchmarks/overhead.py --folder docs/results
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from machine import conditions, keep_freed_memory, write_measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aimc_pl.models import GPT, ResNet
from aimc_pl.schedule import ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Sequence[str]]] = {
    "MLP 8x1024, micro-batch 64": (mlp, lambda: images(64, 1024), ["2", "4", "6"]),
    "ResNet-8 32x32, micro-batch 32": (
        lambda: ResNet(8),
        lambda: images(32, 3, 32, 32),
        ["group2", "group3", "fc"],
    ),
    "GPT 4x128, micro-batch 8x128": (gpt, lambda: tokens(8, 128), ["blocks.1", "blocks.2", "blocks.3"]),
}
"""Network, one micro-batch, where stages begin."""


def cases(quick: bool) -> list[str]:
    """Networks."""
    return [*NETWORKS][:1] if quick else [*NETWORKS]


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


def run(name: str, turns: int, steps: int) -> list[dict[str, Any]]:
    """Turns of every side with so many timed steps; a row per turn."""
    make, microbatch, split_at = NETWORKS[name]
    microbatches = [microbatch() for _ in range(NUM_MICROBATCHES)]
    return [
        {"network": name, "turn": turn} | take_turn(make, microbatches, split_at, WARM_UP + steps + 1)
        for turn in range(turns)
    ]


def report(rows: Sequence[Row]) -> None:
    """Print the medians of one network, with ratios of steps and the steps that the start takes."""

    def middle(field: str) -> float:
        return median(row[field] for row in rows)

    plain, sync, each, update = (middle(field) for field in ("plain_ms", "sync_ms", "async_ms", "update_ms"))
    fair = sync + (NUM_MICROBATCHES - 1) * update
    print(
        f"{rows[0]['network']}: plain {plain:.2f} ms, sync {sync:.2f} ms ({sync / plain:.3f}), "
        f"async {each:.2f} ms ({each / fair:.3f}), update {update:.3f} ms, "
        f"start {middle('start_steps'):.2f} steps, {middle('start_steps_measuring'):.2f} with split_at=None",
        flush=True,
    )


def main() -> None:
    """Measure, report and write."""
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=at_least_one, default=40, help="timed steps of one turn")
    parser.add_argument("--turns", type=at_least_one, default=7, help="turns of each side")
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning suggests more loader processes; the batches are in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # The comparison is at equal micro-batches, for BatchNorm too.
    warnings.filterwarnings("ignore", message="BatchNorm computes its statistics per micro-batch")

    print(conditions(torch.get_num_threads()))
    turns, steps = (1, 1) if args.quick else (args.turns, args.steps)
    rows: list[dict[str, Any]] = []
    for name in cases(args.quick):
        of_network = run(name, turns, steps)
        report(of_network)
        rows += of_network
    write_measured(args.folder / "overhead.csv", rows)


if __name__ == "__main__":
    main()
