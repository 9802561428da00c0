"""This benchmark compares aihwkit's presets of training algorithms on the mean-field tile and on aihwkit's tiles.

One Linear layer takes steps of SGD on both kinds of tiles, which take turns, and medians are compared. The presets of
Tiki-Taka version 2, with and without choppers, and of AGAD transfer a column after every vector. The benchmark takes
a minute on one core. Usage:

    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/presets.py --folder docs/results
"""

import time
from itertools import product
from statistics import median

import torch
from machine import conditions, keep_freed_memory, write_measured
from rich.progress import track
from torch import nn

from aimc_pl.devices import (
    agad,
    chopped_tiki_taka,
    convert_to_analog,
    make_analog_aware,
    tiki_taka,
    tiki_taka_v2,
)
from aimc_pl.devices.catalogue import Backend
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

PRESETS = {
    "tiki_taka": tiki_taka,
    "tiki_taka_v2": tiki_taka_v2,
    "chopped_tiki_taka": chopped_tiki_taka,
    "agad": agad,
}
LAYERS = {"10x128": (10, 128), "32x64": (32, 64), "128x256": (128, 256)}
BATCH = 32


class Side:
    """A layer on one kind of tiles, with its optimizer and the times of its steps."""

    def __init__(self, preset: str, backend: Backend, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(size[1], size[0]))
        convert_to_analog(self.network, PRESETS[preset](backend=backend))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        make_analog_aware(self.optimizer)
        self.times: list[float] = []

    def step(self, x: torch.Tensor, error: torch.Tensor) -> None:
        """Take a step from inputs ``(batch, in)`` and gradients of the outputs ``(batch, out)``."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.network(x).backward(error)
        self.optimizer.step()
        self.times.append(1e3 * (time.perf_counter() - start))


def times(preset: str, size: tuple[int, int], turns: int) -> list[float]:
    """Return the median times in milliseconds of a step on aihwkit's tile and on the mean-field tile."""
    sides = [Side(preset, "aihwkit", size), Side(preset, "mean_field", size)]
    x, error = torch.rand(BATCH, size[1]), torch.randn(BATCH, size[0]) / BATCH
    for _, side in product(range(turns), sides):
        side.step(x, error)
    return [median(side.times[turns // 10 :]) for side in sides]


def main() -> None:
    """Measure, write the rows and print the ratios."""
    parser = study_parser(__doc__)
    parser.add_argument("--turns", type=at_least_one, default=30, help="number of steps of each side")
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    print(f"{conditions(torch.get_num_threads())}, milliseconds per step")
    names = [*LAYERS][: 1 if args.quick else None]
    rows: list[Row] = []
    for preset, name in track([*product(PRESETS, names)]):
        aihwkit, mean_field = times(preset, LAYERS[name], 2 if args.quick else args.turns)
        rows.append(
            {
                "preset": preset,
                "layer": name,
                "batch": BATCH,
                "aihwkit_ms": round(aihwkit, 3),
                "mean_field_ms": round(mean_field, 3),
                "aihwkit_over_mean_field": round(aihwkit / mean_field, 2),
            }
        )
    write_measured(args.folder / "presets.csv", rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
