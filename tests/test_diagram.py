"""These tests check that drawings agree with the clock table. tests/test_schedule.py compares drawings as text."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from aimc_pl.diagram import draw_figure, draw_thumbnail
from aimc_pl.figures import OPERATIONS
from aimc_pl.schedule import Schedule


@pytest.mark.parametrize(
    ("name", "duplex"),
    [
        ("none", "half"),
        ("sync", "half"),
        ("1f1b", "half"),
        ("zero_bubble", "half"),
        ("async", "half"),
        ("async", "full"),
    ],
)
def test_every_operation_is_a_box_in_its_clock_and_on_its_stages_row(name, duplex):
    schedule = Schedule(name, 3, 4, duplex)
    (axes,) = draw_figure(schedule, 4).axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    kinds = {to_hex(color): kind for kind, color in OPERATIONS.items()}
    found = [(int(box.get_x()), int(box.get_y()), kinds[to_hex(box.get_facecolor())]) for box in boxes]
    expected = [(clock, stage, kind, k) for clock, row in enumerate(schedule.clocks(4)) for kind, stage, k in row]
    assert sorted(found) == sorted(operation[:3] for operation in expected)
    # A box has the number of its micro-batch.
    numbers = [(int(text.get_position()[0]), int(text.get_position()[1]), int(text.get_text())) for text in axes.texts]
    assert sorted(numbers) == sorted((clock, stage, k) for clock, stage, _, k in expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stage 0", "stage 1", "stage 2"]
    assert [*axes.get_yticks()] == [0.5, 1.5, 2.5]


def test_only_the_first_clocks_are_drawn():
    (axes,) = draw_figure(Schedule("async", 3), 20, num_clocks=6).axes
    assert max(box.get_x() for box in axes.patches) == 5
    assert axes.get_xlim() == (0, 6)


@pytest.mark.parametrize(
    ("num_stages", "num_clocks", "texts"), [(4, 12, 36), pytest.param(32, 96, 0, marks=pytest.mark.slow)]
)
def test_a_thumbnail_has_numbers_where_there_is_room_and_nothing_is_cut(num_stages, num_clocks, texts):
    figure = draw_thumbnail(Schedule("async", num_stages), num_clocks, num_clocks)
    (axes,) = figure.axes
    assert len(axes.texts) == texts
    assert len(axes.get_yticklabels()) <= 8
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    assert width == 640
    box = axes.get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= width
    assert 0 <= box.y0 < box.y1 <= height
