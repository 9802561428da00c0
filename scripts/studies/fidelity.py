"""This study compares the weight changes of one batch on the mean-field tile with those on aihwkit's tiles.

The mean-field tile runs with expected and with sampled pulses. In most cases, all cross-points of a tile start at the
same weight and see the same inputs and errors. The mean and the standard deviation of their changes are taken over
trials and cross-points. Two sweeps beyond the usual cases show the limits: how far a batch moves a weight (the reach:
the number of pulses times the relative change of a step per pulse), and how coarse steps may be. Other cases vary the
cross-points, add write noise, use the patches and errors of a convolution that learns digits, or look at the weights
after 5,000 updates. The study takes a few minutes on two cores. Usage:

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
    PiecewiseStepDevice,
    PowStepDevice,
    PulsedDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from aimc_pl.devices import to_mean_field
from aimc_pl.devices.mean_field import Convolution
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.studies.sweeps import sweep

SIZE, TRIALS = 64, 100
RUNS = 8
"""How often the runs of many updates are repeated."""

KERNEL = 3
CONVOLUTION = Convolution((KERNEL, KERNEL), (1, 1), (0, 0), (1, 1))
"""The convolution of the cases with patches."""

ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
KINDS: dict[str, tuple[type[PulsedDevice], dict[str, Any]]] = {
    "constant step": (ConstantStepDevice, {}),
    "linear step": (LinearStepDevice, {"gamma_up": 0.5, "gamma_down": 0.3, "gamma_up_dtod": 0, "gamma_down_dtod": 0}),
    "soft bounds": (SoftBoundsDevice, {}),
    "soft bounds reference": (SoftBoundsReferenceDevice, {}),
    "exponential step": (ExpStepDevice, {}),
    "power step": (PowStepDevice, {"pow_gamma": 1.5, "pow_gamma_dtod": 0}),
    "piecewise step": (PiecewiseStepDevice, {"piecewise_up": [1.4, 1.0, 0.2], "piecewise_down": [0.3, 0.9, 1.3]}),
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
MULTIPLICATIVE: dict[str, dict[str, Any]] = {
    "multiplicative noise": {"spread": 1.0, "device": {"mult_noise": True}},
    "additive noise": {"spread": 1.0, "device": {"mult_noise": False}},
}
VARIED: dict[str, dict[str, Any]] = {
    "device to device": {"device": dict.fromkeys(ALIKE, 0.2) | {"construction_seed": 5}},
    "write noise": {"device": {"write_noise_std": 20.0}},
    "write noise, few pulses": {"states": 200, "rate": 0.005, "device": {"write_noise_std": 5.0}},
}
PATCHES: dict[str, dict[str, Any]] = {
    f"patches, rate {rate}": {"patches": True, "rate": rate} for rate in (0.01, 0.1, 1.0)
}
LONG: dict[str, dict[str, Any]] = {
    f"5,000 updates, {states} states": {"updates": 5000, "states": states, "rate": 0.02} for states in (1200, 100, 25)
}
CASES = USUAL | REACH | COARSE | MULTIPLICATIVE | VARIED | PATCHES | LONG


def cases(quick: bool) -> list[dict[str, str]]:
    """Return the usual cases for every device, and the other cases for the devices that they concern."""
    if quick:
        chosen = [("linear step", "usual"), ("soft bounds", "cut trains"), ("soft bounds", "patches, rate 0.1")]
    else:
        chosen = [
            *product(KINDS, USUAL),
            *product(["soft bounds"], REACH | COARSE | LONG),
            *product(["linear step", "soft bounds reference"], MULTIPLICATIVE),
            *product(["soft bounds", "exponential step", "power step", "piecewise step"], VARIED),
            *product(["soft bounds", "power step"], PATCHES),
        ]
    return [{"device": device, "case": case} for device, case in chosen]


def changes(config: Any, case: dict[str, Any], x: Tensor, error: Tensor, on_images: bool = False) -> Tensor:
    """Return the changes of the weights ``(TRIALS, out·in)``, each by one update with all inputs and errors."""
    torch.manual_seed(0)
    size = error.shape[1], x.shape[1] * KERNEL**2 if on_images else x.shape[1]
    tile = config.tile_class(*size, config, False)
    tile.set_learning_rate(case["rate"])
    if on_images:
        tile.compute_on(CONVOLUTION)
    result = []
    for _ in range(TRIALS):
        tile.set_weights(torch.full(size, case["w0"]))
        (tile.update_indexed if on_images else tile.update)(x, error)
        result.append(tile.get_weights()[0].flatten() - case["w0"])
    return torch.stack(result).double()


def ends(config: Any, case: dict[str, Any]) -> Tensor:
    """Return the weights ``(RUNS, SIZE²)`` after many noisy updates that pull them from 0 to ``w0``."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for seed in range(RUNS):
        torch.manual_seed(seed)
        tile = config.tile_class(SIZE, SIZE, config, False)
        tile.set_learning_rate(case["rate"])
        tile.set_weights(torch.zeros(SIZE, SIZE))
        for _ in range(case["updates"]):
            x = torch.randn(1, SIZE, generator=generator) / SIZE**0.5
            noise = 0.3 * torch.randn(1, SIZE, generator=generator)
            tile.update(x, x @ (tile.get_weights()[0] - case["w0"]).T + noise)
        result.append(tile.get_weights()[0].flatten())
    return torch.stack(result).double()


def patches() -> tuple[Tensor, Tensor]:
    """Return images and errors of the second convolution of a digital network that has learned digits."""
    torch.manual_seed(0)
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.images[:640, None] / 8 - 1).float(), torch.tensor(digits.target[:640])
    second = nn.Conv2d(6, 8, KERNEL)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    hidden = out = images
    for x, y in [*zip(images.split(32), labels.split(32), strict=True)] * 15:
        optimizer.zero_grad()
        hidden = network[:2](x)
        out = second(hidden)
        out.retain_grad()
        functional.cross_entropy(network[3:](out), y).backward()
        optimizer.step()
    assert out.grad is not None
    return hidden.detach(), out.grad


def run(device: str, case: str) -> list[dict[str, Any]]:
    """Compare the tiles in one case and return a row with the deviations in percent."""
    kind, options = KINDS[device]
    values = BASE | CASES[case]
    fields: dict[str, Any] = ALIKE | options | values.get("device", {})
    step = {"dw_min": 2 / values["states"], "dw_min_std": values["spread"]}
    config = SingleRPUConfig(device=kind(w_max=1.0, w_min=-1.0, **step, **fields))
    config.update.desired_bl = values["length"]
    row: dict[str, Any] = {name: values[name] for name in BASE} | {"pulses": "", "reach": ""}
    tiles = {"mean_field": to_mean_field(config), "bits": to_mean_field(config, sample_pulses=True)}
    direction = torch.ones(SIZE**2).double()
    if "updates" in values:
        theirs, ours = ends(config, values), {label: ends(tile, values) for label, tile in tiles.items()}
    elif "patches" in values:
        images, error = patches()
        x, rows = (part.flatten(2).movedim(1, 2).flatten(0, 1) for part in (CONVOLUTION.columns(images), error))
        direction = -(rows.T @ x).flatten().double()
        theirs = changes(config, values, x, rows)
        ours = {label: changes(tile, values, images, error, on_images=True) for label, tile in tiles.items()}
        row["batch"] = len(images)
    else:
        generator = torch.Generator().manual_seed(7)
        x = torch.rand(values["batch"], generator=generator) * 0.9 + 0.1
        error = torch.randn(values["batch"], generator=generator) * 0.5 + 0.5
        pulses = values["rate"] * float((x * error.abs()).sum()) * values["states"] / 2
        row |= {"pulses": round(pulses, 2), "reach": round(pulses * 2 / values["states"], 3)}
        lines = x[:, None].repeat(1, SIZE), error[:, None].repeat(1, SIZE)
        theirs = changes(config, values, *lines)
        ours = {label: changes(tile, values, *lines) for label, tile in tiles.items()}
    for label, one in ours.items():
        row |= {f"{label}_{name}": value for name, value in deviations(one, theirs, direction).items()}
    return [row]


def deviations(ours: Tensor, theirs: Tensor, direction: Tensor) -> dict[str, float]:
    """Return the deviations, in percent, of the mean along a direction and of the standard deviation around it.

    Only trials are independent, because the cross-points of a row or column share its pulses: the error of the mean is
    that of the trials.
    """
    a, b = theirs @ direction, ours @ direction
    along = (direction / direction.square().sum())[None]
    spreads = [(one - (one @ direction).mean() * along).square().mean().sqrt() for one in (theirs, ours)]
    error = ((a.var() / len(a)) + (b.var() / len(b))).sqrt() / a.mean().abs()
    return {
        "mean_percent": round(100 * float(b.mean() / a.mean() - 1), 2),
        "std_percent": round(100 * float(spreads[1] / spreads[0] - 1), 2),
        "mean_error_percent": round(100 * float(error), 2),
    }


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
