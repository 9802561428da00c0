"""These tests fit devices to trains of pulses that were simulated with known steps."""

import numpy as np
import pytest

from aimc_pl.devices import piecewise_step
from aimc_pl.errors import UsageError

NODES = np.linspace(0, 1, 11)
UP, DOWN = 0.04 * (1.05 - NODES), 0.03 * (0.02 + NODES**2)


def train(steps, start, sign, num, spread=0.0):
    """Return conductances in [0, 1] under pulses in one direction."""
    generator, values = np.random.default_rng(3), [start]
    for _ in range(num):
        step = np.interp(values[-1], NODES, steps) * (1 + spread * generator.standard_normal())
        values.append(values[-1] + sign * step)
    return np.array(values)


def written(path, up, down, header="up,down", offset=5.0, unit=20.0):
    """Write trains into a file, in another unit and from another zero."""
    length = max(len(up), len(down))
    columns = [[*(offset + unit * train)] + [""] * (length - len(train)) for train in (up, down)]
    path.write_text("\n".join([header, *(f"{a},{b}" for a, b in zip(*columns, strict=True))]) + "\n")
    return path


@pytest.mark.parametrize("w_max", [1.0, 0.4])
def test_steps_are_those_of_the_measured_device(tmp_path, w_max):
    up, down = train(UP, 0.0, 1, 49), train(DOWN, 1.0, -1, 300)
    top = max(up.max(), 1.0)
    file = written(tmp_path / "device.csv", np.append(up, np.nan), down)
    device = piecewise_step(file, w_max=w_max).rpu_config.device
    assert top == 1.0
    assert (device.w_min, device.w_max) == (-w_max, w_max)
    assert device.dw_min_std == pytest.approx(0, abs=0.01)
    for nodes, steps in ((device.piecewise_up, UP), (device.piecewise_down, DOWN)):
        fitted = np.array(nodes) * device.dw_min / (2 * w_max)
        np.testing.assert_allclose(fitted[1:-1], steps[1:-1], rtol=0.02, atol=2e-4)


def test_the_spread_of_steps_is_measured_and_repeated_trains_count(tmp_path):
    """Check the spread within 5 standard errors of 1,800 steps. One in 2,000,000 random seeds would exceed them."""
    up, down = train(UP, 0.0, 1, 60, 0.3), train(UP[::-1], 1.0, -1, 60, 0.3)
    repeated = [np.concatenate([np.append(one, np.nan)] * 15) for one in (up, down)]
    # A step over a gap between two trains does not count.
    once, often = (
        piecewise_step(written(tmp_path / f"{len(a)}.csv", a, b)).rpu_config.device for a, b in ((up, down), repeated)
    )
    np.testing.assert_allclose(often.piecewise_up, once.piecewise_up, rtol=1e-6, atol=1e-9)
    assert once.dw_min_std == pytest.approx(0.3, abs=0.1)
    assert piecewise_step(tmp_path / f"{len(up)}.csv", cycle_to_cycle=0.1).rpu_config.device.dw_min_std == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs the columns 'up' and 'down', and has a, b"),
        ("up,down\n1,1\n1,1\n", "shows no steps: up and down need conductances that change"),
        ("up,down\n2,1\n1,2\n", "shows no steps: up must rise with the pulses, and down must fall"),
        ("up,down\nx,y\n", "shows no steps"),
        ("up,down\n1,2\n1,2,3\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_file_without_steps_is_refused(tmp_path, text, message):
    (tmp_path / "device.csv").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        piecewise_step(tmp_path / "device.csv")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"measurements .* cannot be read"):
        piecewise_step(tmp_path / "none.csv")
