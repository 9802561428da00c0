"""This study asks which remedies against stale weights help by how much, alone and in pairs.

A residual network of 16 layers, 16 wide, learns handwritten digits by analog SGD, by residual learning and in mixed
precision, through an asynchronous pipeline of 4 to 16 stages. The pipeline itself is changed too: in full duplex,
staleness is twice as large; with one layer in all stages but the last, fewer layers are stale, but the last stage takes
longest. One stage, which makes the same updates without delay, is what all are compared with. For each combination, the
learning rate is the one with the lowest loss on validation images, for a seed that counts for nothing else. The grid of
rates grows until its best is inside. Losses and accuracies are those of the test images at the end of a run. Runs that
the CSV file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/staleness_remedies.py --folder docs/results
"""

from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aimc_pl.callbacks import ClockMonitor
from aimc_pl.data import Digits
from aimc_pl.devices import AnalogDevice, mixed_precision, residual_learning, soft_bounds
from aimc_pl.figures import BLACK, GREY, THINGS, styled
from aimc_pl.optim import AsyncNAdam, SpikeCompensatedSGD
from aimc_pl.strategies import Accumulation, AnalogPipelineStrategy, Remedy, StageLearningRate, SyncStart
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.studies.tuning import tune
from aimc_pl.tasks import Classifier

STAGES = (4, 8, 12, 16)
DEPTH = 16
WIDTH = 16
BATCH_SIZE = 64
NUM_MICROBATCHES = 8
EPOCHS = 3
TUNING_SEED = 100
MATERIAL = soft_bounds(tau=2.0, perfect_io=True)


class Algorithm(NamedTuple):
    """How the layers learn."""

    device: AnalogDevice
    momentum: float
    rates: tuple[float, ...]
    """The learning rates from which each grid grows, by factors of 2."""


ALGORITHMS = {
    "analog SGD": Algorithm(MATERIAL, 0.0, (0.1, 0.2, 0.4)),
    "residual learning": Algorithm(residual_learning(MATERIAL, gamma=0.4, transfer_lr=0.01), 0.0, (0.1, 0.2, 0.4)),
    "mixed precision": Algorithm(mixed_precision(MATERIAL), 0.9, (0.025, 0.05, 0.1)),
}
REMEDIES: dict[str, Callable[[int], Remedy]] = {
    "lower rates": lambda mini_batches: StageLearningRate(0.5),
    "accumulation": lambda mini_batches: Accumulation(4),
    "start in sync": lambda mini_batches: SyncStart(mini_batches),
}
"""The remedies, as functions of the number of mini-batches in an epoch."""

OPTIMIZERS: dict[str, Callable[[Any, float, int], torch.optim.Optimizer]] = {
    "spike compensation": lambda parameters, rate, num_stages: SpikeCompensatedSGD(parameters, rate),
    "AsyncNAdam": lambda parameters, rate, num_stages: AsyncNAdam(parameters, num_stages, rate),
}
"""The optimizers that make up for staleness, as functions of the parameters, the rate and the number of stages."""

FULL_DUPLEX = "full duplex"
SMALL_STAGES = "small first stages"
BEST_PAIR = "lower rates + start in sync"

ADAM_RATES = (0.005, 0.01, 0.02)


class Setting(NamedTuple):
    """What a learning rate is tuned for."""

    algorithm: str
    num_stages: int
    remedies: str


def settings(quick: bool) -> list[Setting]:
    """Return the settings: without delay, without a remedy, and with one or two of those that suit the algorithm.

    A quick run has one algorithm in four stages, and one remedy.
    """
    algorithms, stages = (["mixed precision"], STAGES[:1]) if quick else (ALGORITHMS, STAGES)
    found: list[Setting] = []
    for algorithm in algorithms:
        names = [*REMEDIES, *OPTIMIZERS] if algorithm == "mixed precision" else [*REMEDIES]
        pairs = [" + ".join(pair) for pair in combinations(names, 2) if not set(pair) >= set(OPTIMIZERS)]
        if quick:
            names, pairs = names[:1], []
        undelayed = [name for name in names if name in OPTIMIZERS]
        found += [Setting(algorithm, 1, name) for name in ("none", *undelayed)]
        found += [Setting(algorithm, m, name) for m in stages for name in ("none", *names, *pairs)]
        if not quick:
            found += [Setting(algorithm, m, FULL_DUPLEX) for m in stages]
            found += [Setting(algorithm, m, SMALL_STAGES) for m in stages if m < DEPTH]
    return found


def first_rates(setting: Setting) -> tuple[float, ...]:
    """Return the learning rates from which the grid of a setting grows."""
    return ADAM_RATES if "AsyncNAdam" in setting.remedies else ALGORITHMS[setting.algorithm].rates


class Residual(nn.Module):
    """A residual layer: x + tanh(Wx)/√depth."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``(batch, width)`` of inputs of the same shape."""
        return x + torch.tanh(self.linear(x)) * DEPTH**-0.5


def run(
    algorithm: str,
    num_stages: int,
    remedies: str,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train once, and return loss and accuracy at the end, and the clock cycles.

    The images are those of validation for the seed of the tuning, and test images for all others.
    """
    pl.seed_everything(seed, verbose=False)
    device, momentum, _ = ALGORITHMS[algorithm]
    data = Digits(batch_size=BATCH_SIZE, drop_last=True)
    data.setup("fit")
    names = remedies.split(" + ")
    mini_batches = len(data.train_dataloader())
    optimizers = [OPTIMIZERS[name] for name in names if name in OPTIMIZERS]

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if optimizers:
            return optimizers[0](parameters, learning_rate, num_stages)
        return torch.optim.SGD(parameters, learning_rate, momentum)

    later = range(1, num_stages)
    first_layers = later if SMALL_STAGES in names else [stage * DEPTH // num_stages for stage in later]
    clock = ClockMonitor()
    strategy = AnalogPipelineStrategy(
        num_stages,
        "async",
        NUM_MICROBATCHES,
        device=device,
        duplex="full" if FULL_DUPLEX in names else "half",
        split_at=[f"network.{1 + layer}" for layer in first_layers],
        remedies=[REMEDIES[name](mini_batches) for name in names if name in REMEDIES],
        on_nonfinite="warn",  # a rate that is too large is not the best one
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=strategy,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    inner = (Residual() for _ in range(DEPTH - 2))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *inner, nn.Linear(WIDTH, 10))
    task = Classifier(network, optimizer=optimizer)
    trainer.fit(task, data.train_dataloader())
    images = data.val_dataloader() if seed == TUNING_SEED else data.test_dataloader()
    (result,) = trainer.test(task, images, verbose=False)
    return [{"loss": result["test/loss"], "accuracy": result["test/accuracy"], "cycles": clock.cycles}]


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw, for each algorithm, how far the loss is above that of the same seed without delay, by number of stages."""
    drawn = ["none", *REMEDIES, *OPTIMIZERS, FULL_DUPLEX, SMALL_STAGES, BEST_PAIR]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, algorithm in zip(figure.subplots(1, len(ALGORITHMS), sharey=True), ALGORITHMS, strict=True):
        prompt = select(rows, algorithm=algorithm, num_stages=1, remedies="none")
        for place, name in enumerate(drawn):
            mine = {m: select(rows, algorithm=algorithm, num_stages=m, remedies=name) for m in STAGES}
            above = {m: losses_of(each) - losses_of(prompt) for m, each in mine.items() if prompt and each}
            axes.errorbar(
                [m + 0.16 * (place - 4) for m in above],
                [values.mean() for values in above.values()],
                [half_width(values) for values in above.values()],
                label=name.replace("none", "no remedy"),
                color=(BLACK, *THINGS, GREY, BLACK)[place],
                linestyle="--" if name in (FULL_DUPLEX, SMALL_STAGES) else "-",
                marker="*" if name == BEST_PAIR else ".",
                linewidth=1.2,
                capsize=2,
            )
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set(xlabel="stages", title=algorithm, xticks=STAGES)
    figure.axes[0].set(ylabel="test loss above training without delay")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def losses_of(rows: Sequence[Row]) -> np.ndarray:
    """Return the loss of each seed."""
    return curves(rows, "loss")[:, -1]


def mean_loss(rows: Sequence[Row]) -> float:
    """Return the mean loss of some runs; infinity if one is not finite."""
    losses = [float(row["loss"]) for row in rows]
    return float(np.mean(losses)) if np.isfinite(losses).all() else float("inf")


def report(rows: Sequence[Row]) -> None:
    """Print, for each algorithm and remedy, a line of a table with what is lost to training without delay.

    A cell has the loss above that of the same seed without delay, the points of accuracy below it, and the clock cycles
    relative to those of one stage.
    """
    for algorithm in ALGORITHMS:
        prompt = select(rows, algorithm=algorithm, num_stages=1, remedies="none")
        if not prompt:
            continue
        losses, accuracies = losses_of(prompt), curves(prompt, "accuracy")[:, -1]
        print(f"\n{algorithm} without delay: loss {shown(losses, 3)}, accuracy {shown(100 * accuracies, 1)} %\n")
        stages = [m for m in (1, *STAGES) if select(rows, num_stages=m)]
        cycles = curves(prompt, "cycles")[:, -1]
        header = ["| remedy", *(f"{m} stage{'s' * (m > 1)}" for m in stages)]
        print(" | ".join(header) + " |\n" + "| --- " * len(header) + "|")
        for name in dict.fromkeys(row["remedies"] for row in select(rows, algorithm=algorithm)):
            cells = []
            for m in stages:
                mine = select(rows, algorithm=algorithm, num_stages=m, remedies=name)
                if len(mine) < len(prompt):
                    cells.append("not run")
                    continue
                above = losses_of(mine) - losses
                below = accuracies - curves(mine, "accuracy")[:, -1]
                longer = (curves(mine, "cycles")[:, -1] / cycles).mean()
                cells.append(f"{shown(above, 3)}; {shown(100 * below, 1)} points; {longer:.2f}")
            print(f"| {name} | " + " | ".join(cells) + " |")


def shown(values: np.ndarray, digits: int) -> str:
    """Return a mean and half the width of its interval as text."""
    return f"{values.mean():.{digits}f} ± {half_width(values):.{digits}f}"


def main() -> None:
    """Tune the learning rates, run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=5).parse_args()
    path, epochs = args.folder / "staleness_remedies.csv", 1 if args.quick else EPOCHS
    chosen: dict[Setting, float] = {}
    by_grid = sorted(settings(args.quick), key=first_rates)
    for first, group in groupby(by_grid, key=first_rates):
        of_grid = list(group)
        cases = [setting._asdict() | {"epochs": epochs} for setting in of_grid]
        grid = first[:1] if args.quick else first
        found = tune(run, cases, [TUNING_SEED], grid, lambda rows: -mean_loss(rows), path, args.jobs)
        chosen |= dict(zip(of_grid, found, strict=True))
    best = [
        setting._asdict() | {"epochs": epochs, "learning_rate": chosen[setting], "seed": seed}
        for seed in range(args.seeds)
        for setting in settings(args.quick)
    ]
    rows = sweep(run, best, path, args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "staleness_remedies.png", dpi=110)


if __name__ == "__main__":
    main()
