"""This module holds the one style of the project's figures: sizes of text, and colours that mean the same everywhere.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

SCHEDULES = {"none": GREY, "sync": BLUE, "1f1b": SKY, "zero_bubble": PURPLE, "async": RED}
"""Colours of schedules."""

OPERATIONS = {"F": SKY, "B": ORANGE, "W": GREEN}
"""Colours of forwards, backwards and gradients of weights."""

LAYERS = {"analog": GREEN, "digital": BLACK}
"""Colours of layers, in figures that compare layers and not schedules."""

BACKENDS = {"aihwkit": BLACK, "mean_field": RED, "bits": GREEN}
"""Colours of what simulates a device."""

THINGS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
"""Colours of things that have none of their own, in this order."""

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.prop_cycle": f"cycler('color', {list(THINGS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.alpha": 0.25,
    "hatch.color": "white",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
"""Settings of matplotlib for a figure that is 10 inches wide and fills the width of a page."""


def styled[**P](draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return the function ``draw`` with this style for the figure that it returns (a decorator)."""

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = draw(*args, **kwargs)
            # Ticks get their style when they are drawn for the first time.
            figure.draw_without_rendering()
        return figure

    return draw_in_style


def shade(index: int, count: int) -> tuple[float, float, float, float]:
    """Return the colour of number ``index`` of ``count`` ordered things, from light blue to black.

    For example of numbers of stages. The shades can be told apart in grey, too.
    """
    return colormaps["viridis_r"](0.12 + 0.88 * index / max(count - 1, 1))
