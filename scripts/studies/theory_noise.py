"""This study asks when noise and rounding of the weights, which every update adds, hide the gradient.

The device is ``noisy_quantized(std, bits)``: an update adds Gaussian noise to every weight and rounds it. The loss of
every weight is ½(w − b)², with noise on its gradient. The outputs of one layer have different learning rates, and the
study measures the squared gradient per weight at the end of the run. Usage:

    .venv/bin/python scripts/studies/theory_noise.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from aimc_pl.devices import convert_to_analog, make_analog_aware, noisy_quantized
from aimc_pl.figures import GREY, shade, styled
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.studies.theory import rounding_variance, update_noise_error

VARIANCES = (0.0, 1e-6, 1e-4, 1e-2)
"""σᵤ², the variance of what an update adds to a weight."""

BITS = (4, 6, 8, 12)
LEARNING_RATES = tuple(float(rate) for rate in np.geomspace(0.7, 0.003, 16))
GRADIENT_NOISE = 0.3
"""The standard deviation of the gradient of each weight."""

WEIGHTS = 64
"""The number of weights with the same learning rate."""


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of noise, bits and seeds. A quick run has 10 updates."""
    return [
        {"variance": variance, "bits": bits, "seed": seed, "num_updates": 10 if quick else 3000}
        for seed, variance, bits in product(range(num_seeds), VARIANCES, BITS)
    ]


def run(variance: float, bits: int, seed: int, num_updates: int) -> list[dict[str, float]]:
    """Return the squared gradient of a weight, averaged over the last half, with every learning rate."""
    torch.manual_seed(seed)
    layer = nn.Linear(WEIGHTS, len(LEARNING_RATES), bias=False)
    nn.init.zeros_(layer.weight)
    net = nn.Sequential(layer)
    convert_to_analog(net, noisy_quantized(variance**0.5, bits))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    make_analog_aware(optimizer)
    # Each input reads the weights of one column. The factors of the losses are the learning rates.
    inputs, rates = torch.eye(WEIGHTS), torch.tensor(LEARNING_RATES)
    target, errors = torch.empty(WEIGHTS, len(rates)).uniform_(-0.7, 0.7), torch.zeros(len(rates))
    for update in range(num_updates):
        output = net(inputs)
        if update >= num_updates // 2:
            errors += (output.detach() - target).square().mean(0)
        labels = target + GRADIENT_NOISE * torch.randn(target.shape)
        (rates * (output - labels).square() / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    errors /= num_updates - num_updates // 2
    return [{"learning_rate": rate, "error": float(error)} for rate, error in zip(LEARNING_RATES, errors, strict=True)]


def expected(variance: float, bits: int) -> np.ndarray:
    """Return the stationary error with every learning rate, if what rounding adds has a mean of zero."""
    rates = np.array(LEARNING_RATES)
    return (rates**2 * GRADIENT_NOISE**2 + variance + rounding_variance(bits)) / (2 * rates - rates**2)


def smallest(rows: Sequence[Row], variance: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest error of every seed, and its learning rate."""
    errors = curves(select(rows, variance=variance, bits=bits), "error")
    return errors.min(1), np.array(LEARNING_RATES)[errors.argmin(1)]


def report(rows: Sequence[Row]) -> None:
    """Print the smallest error of a weight for every device, beside the one that theory allows."""
    for variance, bits in product(VARIANCES, BITS):
        errors, rates = smallest(rows, variance, bits)
        added = variance + rounding_variance(bits)
        allowed = update_noise_error(1.0, GRADIENT_NOISE**2, added)
        ratios = curves(select(rows, variance=variance, bits=bits), "error").mean(0) / expected(variance, bits)
        good = [rate for rate, ratio in zip(LEARNING_RATES, ratios, strict=True) if abs(ratio - 1) < 0.1]
        print(
            f"variance {variance:<7g} {bits:>2} bits  smallest error {errors.mean():.6f} ± {half_width(errors):.6f} "
            f"at a rate of {rates.mean():.4f}, bound {allowed:.6f}; as expected within 10 % with {len(good)} of "
            f"{len(ratios)} rates, the smallest of which is {min(good, default=np.nan):.4f}"
        )


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the error against the learning rate, measured and expected, for every noise and number of bits."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    every = figure.subplots(1, len(VARIANCES), sharey=True)
    for axes, variance in zip(every, VARIANCES, strict=True):
        for index, bits in enumerate(BITS):
            color = shade(index, len(BITS))
            measured = curves(select(rows, variance=variance, bits=bits), "error").mean(0)
            axes.plot(LEARNING_RATES, measured, ".", color=color, label=f"{bits} bits")
            axes.plot(LEARNING_RATES, expected(variance, bits), color=color, linewidth=1)
        axes.plot([], [], color=GREY, linewidth=1, label="expected")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", title=f"σᵤ² = {variance:g}")
    every[0].set_ylabel("squared gradient of a weight")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BITS) + 1)
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=5).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "theory_noise.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "theory_noise.png", dpi=110)


if __name__ == "__main__":
    main()
