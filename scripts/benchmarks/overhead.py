"""This benchmark measures what the strategy costs in one process, against plain Lightning on the same micro-batches.

Plain Lightning accumulates gradients over B micro-batches, and the strategy runs as many in M stages. Under ``sync``
both do the same work. Under ``async`` every stage updates after every micro-batch; its time is compared with that of
``sync`` plus that of (B − 1)M more updates of a stage. All sides take turns, step by step, and medians of ratios are
reported. The start is the extra time of the first step, in units of a later step. It is measured where the boundaries
are named, and where the strategy finds them by measuring the layers (split_at=None). Usage:

    .venv/bin/python scripts/benchmarks/overhead.py --folder docs/results
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import itemgetter
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from machine import conditions, keep_freed_memory, write_measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aimc_pl.models import GPT, ResNet
from aimc_pl.schedule import ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

NUM_STAGES, NUM_MICROBATCHES = 4, 4

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """Return an MLP of eight layers of 1,024 features."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8)))


def gpt() -> nn.Module:
    """Return a GPT of four layers, 128 wide."""
    return GPT(vocab_size=128, num_layers=4, width=128, num_heads=4, context=128)


def images(*shape: int) -> Batch:
    """Return a micro-batch of random images or features with labels of ten classes."""
    return torch.randn(shape), torch.randint(10, shape[:1])


def tokens(*shape: int) -> Batch:
    """Return a micro-batch of random token sequences."""
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
"""By name: the network, one micro-batch, and the modules with which stages begin."""


def cases(quick: bool) -> list[str]:
    """Return the names of the networks to measure."""
    return [*NETWORKS][:1] if quick else [*NETWORKS]


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return plain SGD."""
    return torch.optim.SGD(parameters, lr=1e-3)


class Task(L.LightningModule):
    """Cross-entropy of a network, without logging."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss, a mean over samples or over tokens."""
        return F.cross_entropy(self.network(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer of all layers."""
        return make_optimizer(self.parameters())


def hand_over() -> None:
    """Give the other sides their turns, and return when the turn of this side comes again."""
    driver = getcurrent().parent
    assert driver is not None
    driver.switch()


class Turn(L.Callback):
    """A callback that gives the other sides their turns before the first step and after every step.

    Args:
        num_batches: number of batches of one step.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hand over once everything is set up."""
        hand_over()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand over after the last batch of a step."""
        if (batch_idx + 1) % self.num_batches == 0:
            hand_over()


def fit(network: nn.Module, strategy: Any, batches: list[Any], accumulate: int = 1) -> greenlet:
    """Return a fit that has been started and waits before its first step. It also waits after every step."""
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[Turn(accumulate)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType], a list is a data set
    side = greenlet(lambda: trainer.fit(Task(network), loader))
    side.switch()
    return side


def updates(network: nn.Module, split_at: Sequence[str]) -> greenlet:
    """Return a side that repeats the updates after one micro-batch, and nothing else.

    In each stage it makes a step of the optimizer and clears the gradients.
    """
    parameters = [*network.parameters()]
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    starts = [numbers[id(next(network.get_submodule(name).parameters()))] for name in split_at]
    optimizers = [make_optimizer(parameters[start:end]) for start, end in pairwise([0, *starts, len(parameters)])]
    gradients = [torch.full_like(parameter, 1e-6) for parameter in parameters]

    def update() -> None:
        while True:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            hand_over()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    side = greenlet(update)
    side.switch()
    return side


def run(name: str, steps: int) -> list[dict[str, Any]]:
    """Let every side make ``steps`` steps in turns, and return a row per step with the milliseconds of each side."""
    make, microbatch, split_at = NETWORKS[name]
    microbatches = [microbatch() for _ in range(NUM_MICROBATCHES)]
    whole = tuple(torch.cat(parts) for parts in zip(*microbatches, strict=True))
    names = [f"network.{name}" for name in split_at]

    def piped(schedule: ScheduleName, split_at: Sequence[str] | None) -> greenlet:
        strategy = AnalogPipelineStrategy(NUM_STAGES, schedule, NUM_MICROBATCHES, split_at=split_at)
        return fit(make(), strategy, [whole] * (steps + 1))

    sides = {
        "plain_ms": fit(make(), "auto", [*microbatches] * (steps + 1), NUM_MICROBATCHES),
        "sync_ms": piped("sync", names),
        "async_ms": piped("async", names),
        "measured_ms": piped("sync", None),
        "update_ms": updates(make(), split_at),
    }
    rows = [
        {"network": name, "step": step} | {side: time_turn(turn) for side, turn in sides.items()}
        for step in range(steps)
    ]
    for turn in sides.values():
        turn.throw()
    return rows


def time_turn(side: greenlet) -> float:
    """Return the milliseconds of one step of a side."""
    start = time.perf_counter()
    side.switch()
    return 1e3 * (time.perf_counter() - start)


def report(rows: Sequence[Row]) -> None:
    """Print the medians for one network, the ratios between sides, and the extra time of the first step."""
    first, later = rows[0], rows[1:] or rows

    def middle(number: Callable[[Row], float]) -> float:
        return median(map(number, later))

    plain, sync, each, update = (middle(itemgetter(side)) for side in ("plain_ms", "sync_ms", "async_ms", "update_ms"))
    over_plain = middle(lambda row: row["sync_ms"] / row["plain_ms"])
    over_sync = middle(lambda row: row["async_ms"] / (row["sync_ms"] + (NUM_MICROBATCHES - 1) * row["update_ms"]))
    print(
        f"{first['network']}: plain {plain:.2f} ms, sync {sync:.2f} ms ({over_plain:.3f}), "
        f"async {each:.2f} ms ({over_sync:.3f}), update {update:.3f} ms, "
        f"start {first['sync_ms'] / sync - 1:.2f} steps, {first['measured_ms'] / sync - 1:.2f} with split_at=None",
        flush=True,
    )


def main() -> None:
    """Measure, print the report and write the rows."""
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=at_least_one, default=200, help="number of steps of each side")
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning suggests more worker processes for the loader, but the batches are in memory already.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Both sides see the same micro-batches, and so does BatchNorm.
    warnings.filterwarnings("ignore", message="BatchNorm computes its statistics per micro-batch")

    print(conditions(torch.get_num_threads()))
    steps = 2 if args.quick else args.steps
    rows: list[dict[str, Any]] = []
    for name in cases(args.quick):
        of_network = run(name, steps)
        report(of_network)
        rows += of_network
    write_measured(args.folder / "overhead.csv", rows)


if __name__ == "__main__":
    main()
