"""This benchmark compares updates with residual learning and in mixed precision with those of analog SGD, in one run.

An update with residual learning also reads a column of one crossbar and moves a column of the other. An update in mixed
precision computes the gradient digitally, makes a digital step, and sends whole pulses. All take turns on the same
device, and medians are compared. The benchmark takes two minutes on one core. Usage:

    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmarks/updates.py --folder docs/results
"""

import time
from itertools import product
from statistics import median

import torch
from machine import conditions, keep_freed_memory, write_measured
from rich.progress import track
from torch import nn

from aimc_pl.devices import AnalogDevice, convert_to_analog, mixed_precision, residual_learning, soft_bounds
from aimc_pl.studies.arguments import at_least_one, study_parser
from aimc_pl.studies.rows import Row

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "10x128": (nn.Linear(128, 10), (128,)),
    "128x256": (nn.Linear(256, 128), (256,)),
    "512x512": (nn.Linear(512, 512), (512,)),
    "convolution 16 to 32, 14x14": (nn.Conv2d(16, 32, 3, padding=1), (16, 14, 14)),
}


def times(name: str, batch: int, device: AnalogDevice, turns: int) -> list[float]:
    """Return the median times in milliseconds of an update with analog SGD, residual learning and mixed precision."""
    layer, shape = LAYERS[name]
    updates = []
    for algorithm in (device, residual_learning(device), mixed_precision(device)):
        torch.manual_seed(0)
        network = nn.Sequential(layer)
        convert_to_analog(network, algorithm)
        x = torch.rand(batch, *shape)
        error = torch.randn(network(x).shape) / batch  # as of a loss that is a mean over the batch
        tile = network.get_submodule("0.analog_module")
        updates.append((getattr(tile, "update" if x.dim() == 2 else "update_indexed"), x, error))
    measured: list[list[float]] = [[] for _ in updates]
    for turn, (side, (update, x, error)) in product(range(turns), enumerate(updates)):
        start = time.perf_counter()
        update(x, error)
        if turn >= turns // 10:
            measured[side].append(1e3 * (time.perf_counter() - start))
    return [*map(median, measured)]


def main() -> None:
    """Measure, write the rows and print the ratios."""
    parser = study_parser(__doc__)
    parser.add_argument("--turns", type=at_least_one, default=100, help="number of updates of each side")
    args = parser.parse_args()
    if not args.quick:
        keep_freed_memory()
    print(f"{conditions(torch.get_num_threads())}, milliseconds per update")
    rows: list[Row] = []
    names, batches = ([*LAYERS][:1], [10]) if args.quick else ([*LAYERS], [10, 128])
    for name, batch, vary, perfect_io in track([*product(names, batches, (0.0, 0.3), (False, True))]):
        device = soft_bounds(device_to_device=vary, perfect_io=perfect_io)
        sgd, residual, mixed = times(name, batch, device, 10 if args.quick else args.turns)
        rows.append(
            {
                "layer": name,
                "batch": batch,
                "device_to_device": vary,
                "perfect_io": perfect_io,
                "analog_sgd_ms": round(sgd, 3),
                "residual_learning_ms": round(residual, 3),
                "mixed_precision_ms": round(mixed, 3),
                "residual_over_sgd": round(residual / sgd, 2),
                "mixed_over_sgd": round(mixed / sgd, 2),
            }
        )
    write_measured(args.folder / "updates.csv", rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
