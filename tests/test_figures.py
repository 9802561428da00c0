"""These tests check that figures have the project's style, and that its colours can be told apart."""

import colorsys
from itertools import combinations, pairwise

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from aimc_pl.figures import BACKENDS, LAYERS, OPERATIONS, SCHEDULES, THINGS, shade, styled


def test_a_styled_figure_has_the_style_and_leaves_matplotlib_alone():
    @styled
    def draw(title: str) -> Figure:
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1])
        axes.set_title(title, loc="left")
        return figure

    before = dict(mpl.rcParams)
    (axes,) = draw(title="a").axes
    assert dict(mpl.rcParams) == before
    assert axes.lines[0].get_color() == THINGS[0]
    assert not axes.spines["top"].get_visible()
    assert {tick.label1.get_fontsize() for tick in axes.xaxis.get_major_ticks()} == {9}


@pytest.mark.parametrize("colors", [SCHEDULES, OPERATIONS, LAYERS, BACKENDS, dict(enumerate(THINGS))], ids=str)
def test_no_two_things_of_a_kind_have_one_colour(colors):
    for one, other in combinations(colors.values(), 2):
        assert sum(abs(a - b) for a, b in zip(to_rgb(one), to_rgb(other), strict=True)) > 0.3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shades_get_darker(count):
    brightness = [colorsys.rgb_to_yiq(*shade(index, count)[:3])[0] for index in range(count)]
    assert brightness == sorted(brightness, reverse=True)
    assert all(a - b > 0.1 for a, b in pairwise(brightness))
