"""This study counts updates to a target, as ``paper_stages.py`` does, for devices that differ in one property.

One property of the devices is varied at a time. The network is the same residual one, with 16 layers in 1, 4 and 16
stages, and its devices are updated by pulses. For every number of stages, device and seed the best learning rate of a
grid counts. Usage:

    .venv/bin/python scripts/studies/paper_devices.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from paper_stages import EVERY, alone, count_updates, relative, updates_to
from torch import Tensor

from aimc_pl.figures import GREY, shade, styled
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row
from aimc_pl.studies.statistics import extents, half_width
from aimc_pl.studies.sweeps import sweep

STAGES = (1, 4, 16)
BASE = {"tau": 2.0, "step": 2.0**-8, "cycle_to_cycle": 0.3, "write_noise": 0.0, "io_bits": None}
"""The device of which one property at a time is varied. It has 1,024 steps in the range 2τ."""

LEARNING_RATES = tuple(1.28 / 2**k for k in range(7))
TARGETS = (("accuracy", 0.8), ("loss", 0.5))
LABELS = {
    "step": "Δw_min, in units of the range",
    "cycle_to_cycle": "cycle-to-cycle spread of a step",
    "write_noise": "write noise, in Δw_min",
    "io_bits": "bits of the input converters",
}

SWEEPS: dict[str, Sequence[Any]] = {
    "step": [BASE["tau"] * 2 * 2.0**-k for k in range(3, 11)],
    "cycle_to_cycle": [0.0, 0.5, 1.0, 2.0],
    "write_noise": [0.0, 2.0, 5.0, 10.0],
    "io_bits": [3.0, 4.0, 5.0, 7.0],
}


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of properties and numbers of stages. A quick run gives up after 20 updates."""
    length = {"num_seeds": num_seeds, "num_updates": 20 if quick else 2000}
    return [{"sweep": name, "num_stages": m} | length for name, m in product(SWEEPS, STAGES)]


def run(sweep: str, num_stages: int, num_seeds: int, num_updates: int) -> list[dict[str, Any]]:
    """Train 16 layers on devices that differ in the property ``sweep``, with every learning rate.

    For each device, seed and target, the fewest updates and their learning rate are returned. The updates are infinite
    if no rate reaches the target.
    """
    devices = [BASE | {sweep: value} for value in SWEEPS[sweep]]
    which, rate, seed = (
        torch.tensor(column)
        for column in zip(*product(range(len(devices)), LEARNING_RATES, range(num_seeds)), strict=True)
    )
    columns = {
        key: None if value is None else torch.tensor([device[key] for device in devices])[which].view(-1, 1, 1)
        for key, value in devices[0].items()
    }

    def fastest(reached: Tensor) -> Any:
        return reached.view(len(devices), len(LEARNING_RATES), num_seeds, len(TARGETS)).min(1)

    updates, best = fastest(
        count_updates(
            16,
            num_stages,
            "half",
            columns,
            rate,
            seed,
            TARGETS,
            num_updates,
            lambda reached: bool(fastest(reached).values.isfinite().all()),
        )
    )
    return [
        {
            **devices[d],
            "seed": s,
            "metric": metric,
            "target": value,
            "updates": float(updates[d, s, t]),
            "learning_rate": LEARNING_RATES[int(best[d, s, t])],
        }
        for d, s in product(range(len(devices)), range(num_seeds))
        for t, (metric, value) in enumerate(TARGETS)
    ]


def report(rows: Sequence[Row]) -> None:
    """Print how many updates one stage takes to every target, and how many times as many several stages take."""
    for (name, values), (metric, target) in product(SWEEPS.items(), TARGETS):
        for value in values:
            where = {"sweep": name, name: value}
            one = alone(rows, metric, target, **where)
            ratios = ((m, relative(rows, metric, target, m, **where)) for m in STAGES[1:])
            line = ", ".join(f"{m} stages {r.mean():.2f} ± {half_width(r):.2f} times" for m, r in ratios)
            print(f"{name:<14} {value:<8.4g} {metric} {target}  {one.mean():.0f} updates with one stage, {line}")


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the updates to every target against each property of the device."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, len(SWEEPS) // 2, sharey=True)
    for axes, (name, values) in zip(grid.flat, SWEEPS.items(), strict=True):
        reached = set[float]()
        lines = [*product(enumerate(STAGES), zip(TARGETS, ("-", "--"), strict=True))]
        for index, ((color, num_stages), ((metric, target), style)) in enumerate(lines):
            where = {"sweep": name, "num_stages": num_stages}
            updates = [updates_to(rows, metric, target, **where | {name: value}) for value in values]
            means, errors = [u.mean() for u in updates], extents(updates)
            reached |= {value for value, mean in zip(values, means, strict=True) if mean < float("inf")}
            label = f"{num_stages} stage{'s' * (num_stages > 1)}, {metric} {target}"
            beside = 0.1 * (index - (len(lines) - 1) / 2)  # bars at one place would hide each other
            axes.errorbar(
                [x + beside for x in range(len(values))],
                means,
                errors,
                color=shade(color, len(STAGES)),
                linestyle=style,
                marker=".",
                label=label,
            )
        axes.set(yscale="log", ylim=(EVERY, 3000), xlabel=LABELS[name])
        texts = [f"1/{2 * BASE['tau'] / value:.0f}" if name == "step" else f"{value:g}" for value in values]
        axes.set_xticks(range(len(values)), texts)
        axes.set_xlim(-0.4, len(values) - 0.6)
        for x in (x for x, value in enumerate(values) if value not in reached):
            axes.text(x, 200, "not reached by all seeds", color=GREY, rotation=90, ha="center", va="center")
    for axes in grid[:, 0]:
        axes.set_ylabel("updates, best learning rate")
    title = "bars show the range of the seeds"
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STAGES), title=title)
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=3).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "paper_devices.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "paper_devices.png", dpi=110)


if __name__ == "__main__":
    main()
