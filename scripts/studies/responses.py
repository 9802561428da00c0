"""This study draws how devices respond to single pulses, on the mean-field tile and on aihwkit's tile in one figure.

There is one figure per device. The cross-points of both tiles have the same parameters and differ in the noise. The
study takes ten seconds on two cores. Usage:

    .venv/bin/python scripts/studies/responses.py --folder docs/results
"""

from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from aimc_pl.devices import DEVICES, pulse_response
from aimc_pl.figures import BACKENDS as COLORS
from aimc_pl.figures import styled
from aimc_pl.studies.arguments import study_parser

SEED, PULSES, CROSS_POINTS = 1, 600, 6
BACKENDS = ("aihwkit", "mean_field")
DRAWN = (
    "soft_bounds",
    "soft_bounds_reference",
    "constant_step",
    "linear_step",
    "ecram",
    "gokmen_vlasov",
    "reram_es",
    "reram_sb",
)


def cases(quick: bool) -> list[str]:
    """Return the names of devices that differ in what a pulse does, all of which both tiles simulate."""
    return [*DRAWN[:1]] if quick else [*DRAWN]


def run(name: str) -> dict[str, Tensor]:
    """Return the weights of a few cross-points ``(pulses, points)`` on both tiles: pulses up, down, up and down."""
    weights = {}
    for backend in BACKENDS:
        config = DEVICES[name](backend=backend).rpu_config
        config.device.construction_seed = SEED  # pyright: ignore[reportAttributeAccessIssue]
        weights[backend] = pulse_response(config, PULSES, CROSS_POINTS)
    return weights


@styled
def draw(name: str, of_backends: dict[str, Tensor]) -> Figure:
    """Draw the weights and their mean on both tiles."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for backend, weights in of_backends.items():
        color, style = COLORS[backend], "-" if backend == "aihwkit" else "--"
        label = f"{backend.replace('_', '-')}, mean of {CROSS_POINTS}"
        axes.plot(weights, color=color, linewidth=0.5, alpha=0.2)
        axes.plot(weights.mean(1), style, color=color, linewidth=1.5, label=label, zorder=3)
    axes.set(xlabel="pulse", ylabel="weight", title=name)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.14), ncols=2)
    return figure


def main() -> None:
    """Draw a figure per device."""
    args = study_parser(__doc__).parse_args()
    for name in track(cases(args.quick)):
        draw(name, run(name)).savefig(args.folder / f"response_{name}.png", dpi=90)


if __name__ == "__main__":
    main()
