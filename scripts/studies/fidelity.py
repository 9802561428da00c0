"""This study compares the weight changes of one batch on the mean-field tile with those on aihwkit's tiles.

The mean-field tile runs with expected and with sampled pulses. All cross-points of a tile start at the same weight and
see the same inputs and errors. The mean and the standard deviation of their changes are taken over tiles and
cross-points. Two sweeps beyond the usual cases show the limits: how far a batch moves a weight (the reach: the number
of pulses times the relative change of a step per pulse), and how coarse steps may be. The study takes a minute on two
cores. Usage:

    .venv/bin/python scripts/studies/fidelity.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from aihwkit.simulator.configs import SingleRPUConfig
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PowStepDevice,
    PulsedDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
)

from aimc_pl.devices import to_mean_field
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.studies.sweeps import sweep

SIZE, TRIALS = 64, 100
ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
KINDS: dict[str, tuple[type[PulsedDevice], dict[str, float]]] = {
    "constant step": (ConstantStepDevice, {}),
    "linear step": (LinearStepDevice, {"gamma_up": 0.5, "gamma_down": 0.3, "gamma_up_dtod": 0, "gamma_down_dtod": 0}),
    "soft bounds": (SoftBoundsDevice, {}),
    "soft bounds reference": (SoftBoundsReferenceDevice, {}),
    "exponential step": (ExpStepDevice, {}),
    "power step": (PowStepDevice, {"pow_gamma": 1.5, "pow_gamma_dtod": 0}),
}
BASE: dict[str, Any] = {"w0": 0.2, "rate": 0.02, "batch": 8, "states": 1200, "spread": 0.3, "length": 31}
USUAL: dict[str, dict[str, Any]] = {
    "small steps": {"states": 10_000},
    "usual": {},
    "far from zero": {"w0": -0.6, "batch": 4},
    "high rate": {"rate": 0.1},
    "cut trains": {"rate": 0.05, "length": 5},
    "noisy steps": {"spread": 2.0},
    "one sample": {"batch": 1, "w0": 0.5},
}
REACH: dict[str, dict[str, Any]] = {f"reach, rate {r}": {"rate": r, "batch": 32} for r in (0.01, 0.05, 0.2, 0.5, 1.0)}
COARSE: dict[str, dict[str, Any]] = {
    f"coarse, {n} states": {"states": n, "batch": 2, "rate": 0.05} for n in (400, 100, 40, 20, 10)
}


def cases(quick: bool) -> list[dict[str, str]]:
    """Return the usual cases for every device, and the cases of both sweeps for one device."""
    if quick:
        return [{"device": "linear step", "case": "usual"}, {"device": "soft bounds", "case": "cut trains"}]
    return [{"device": kind, "case": name} for kind, name in product(KINDS, USUAL)] + [
        {"device": "soft bounds", "case": name} for name in REACH | COARSE
    ]


def changes(config: Any, case: dict[str, Any], x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return the changes of the weights ``(TRIALS, SIZE²)``."""
    torch.manual_seed(0)
    tile = config.tile_class(SIZE, SIZE, config, False)
    tile.set_learning_rate(case["rate"])
    result = []
    for _ in range(TRIALS):
        tile.set_weights(torch.full((SIZE, SIZE), case["w0"]))
        tile.update(x[:, None].repeat(1, SIZE), error[:, None].repeat(1, SIZE))
        result.append(tile.get_weights()[0].flatten() - case["w0"])
    return torch.stack(result).double()


def run(device: str, case: str) -> list[dict[str, Any]]:
    """Compare the tiles in one case and return a row with the deviations in percent."""
    kind, options = KINDS[device]
    values = BASE | (USUAL | REACH | COARSE)[case]
    config = SingleRPUConfig(
        device=kind(w_max=1.0, w_min=-1.0, dw_min=2 / values["states"], dw_min_std=values["spread"], **ALIKE, **options)  # pyright: ignore[reportArgumentType]
    )
    config.update.desired_bl = values["length"]
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(values["batch"], generator=generator) * 0.9 + 0.1
    error = torch.randn(values["batch"], generator=generator) * 0.5 + 0.5
    pulses = values["rate"] * float((x * error.abs()).sum()) * values["states"] / 2
    row = values | {"pulses": round(pulses, 2), "reach": round(pulses * 2 / values["states"], 3)}
    theirs = changes(config, values, x, error)
    for label, sampled in (("mean_field", False), ("bits", True)):
        ours = changes(to_mean_field(config, sampled), values, x, error)
        row[f"{label}_mean_percent"] = round(100 * float(ours.mean() / theirs.mean() - 1), 2)
        row[f"{label}_std_percent"] = round(100 * float(ours.std() / theirs.std() - 1), 2)
        # Only trials are independent, because the cross-points of a row or column share its pulses.
        error_of_mean = (theirs.mean(1).var() + ours.mean(1).var()).sqrt() / TRIALS**0.5
        row[f"{label}_mean_error_percent"] = round(100 * float(error_of_mean / theirs.mean().abs()), 2)
    return [row]


def report(rows: Sequence[Row]) -> None:
    """Print a line per case."""
    print(f"{'device':<24}{'case':<22}{'reach':>7}   mean field: mean   std %     bits: mean   std %   (± mean)")
    for r in rows:
        print(
            f"{r['device']:<24}{r['case']:<22}{r['reach']:>7}{r['mean_field_mean_percent']:>19}"
            f"{r['mean_field_std_percent']:>8}{r['bits_mean_percent']:>15}{r['bits_std_percent']:>8}"
            f"{r['mean_field_mean_error_percent']:>10}"
        )


def main() -> None:
    """Run the missing cases and print the report."""
    args = study_parser(__doc__).parse_args()
    report(sweep(run, cases(args.quick), args.folder / "fidelity.csv", jobs=1 if args.quick else None))


if __name__ == "__main__":
    main()
