"""How devices answer to single pulses, on the mean-field tile over aihwkit's: one picture per device.

The cross-points of both have the same parameters; they differ in the noise. Ten seconds on two cores. Usage:

    .venv/bin/python scripts/responses.py --folder docs/images
"""

import argparse
from inspect import signature
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import track

from aimc_pl.devices import DEVICES, pulse_response

SEED, PULSES, CROSS_POINTS = 1, 600, 6


def draw(name: str) -> Figure:
    """The weights of a few cross-points and their mean, pulses up, down, up and down."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for backend, color in (("aihwkit", "tab:blue"), ("mean_field", "tab:orange")):
        config = DEVICES[name](backend=backend).rpu_config
        config.device.construction_seed = SEED  # pyright: ignore[reportAttributeAccessIssue]
        weights = pulse_response(config, PULSES, CROSS_POINTS)
        axes.plot(weights, color=color, linewidth=0.5, alpha=0.5)
        axes.plot(weights.mean(1), color=color, linewidth=2, label=f"{backend}, mean of {CROSS_POINTS}")
    axes.set(xlabel="pulse", ylabel="weight", title=name)
    axes.legend(loc="upper right")
    return figure


def main() -> None:
    """Draw every device that both simulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    for name in track([name for name, make in DEVICES.items() if "backend" in signature(make).parameters]):
        draw(name).savefig(args.folder / f"response_{name}.png", dpi=90)


if __name__ == "__main__":
    main()
