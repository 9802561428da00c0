"""These tests check the study of when async pays: against closed forms, and against numbers that other pages print."""

from math import inf

import async_pays
import pytest

from aimc_pl.cost import RASCH_2024, StageCost
from aimc_pl.cost.stages import Cost


def stages(forward=3.0, backward=4.0, update=0.0, step=0.0):
    """Return the costs of three stages, of which the first computes no errors."""
    none = Cost(0.0, {"digital": 0.0})
    times = {"forward": forward, "backward": backward, "update": update, "step": step}
    costs = {name: Cost(seconds, {"digital": 2 * seconds}) for name, seconds in times.items()}
    links = {"sent": 6.0, "returned": 6.0}
    first = StageCost("", 1, **{**costs, "backward": none}, gradient=none, kept=9.0, **links)
    other = StageCost("", 1, **costs, gradient=none, kept=9.0, **links)
    return [first, other, StageCost("", 1, **costs, gradient=none)]


def perfect():
    return async_pays.with_bandwidth(async_pays.with_latency(RASCH_2024, 0.0), 1e30)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 1), (4, 3), (5, 8)])
@pytest.mark.parametrize(("update", "step"), [(0.0, 0.0), (2.0, 0.5)])
def test_gain_in_even_stages_is_the_closed_form(num_stages, num_microbatches, update, step):
    even = async_pays.divided(stages(update=update, step=step), num_stages, 1.0)
    m, b = num_stages, num_microbatches
    passes, u, s = (3 * 3.0 + 2 * 4.0) / m, 3 * update / m, 3 * step / m
    expected = {"sync": ((m + b - 1) * passes + b * u + s) / b, "async": passes + u + s}
    for schedule, seconds in expected.items():
        found, joules = async_pays.per_sample(even, perfect(), schedule, b)
        assert found == pytest.approx(seconds)
        # Two joules for each second of work, and 12 bits over each link.
        work = m * (passes + u + (s if schedule == "async" else s / b))
        links = (m - 1) * 12 * RASCH_2024.link_energy.value
        assert joules == pytest.approx(2 * work + links)


@pytest.mark.parametrize("slowest", [1.0, 1.5, 4.0])
def test_divided_work_stays_the_same(slowest):
    found = async_pays.divided(stages(update=1.0), 4, slowest)
    assert async_pays.imbalance(found) == pytest.approx(slowest)
    assert sum((each.forward + each.backward + each.update).seconds for each in found) == pytest.approx(20.0)
    assert sum(each.kept for each in found) == pytest.approx(18.0)
    assert [each.sent for each in found] == [6.0, 6.0, 6.0, 0.0]


def test_where_a_statement_begins_to_hold():
    assert async_pays.first(lambda x: x > 3e-7, 1e-10, 1.0) == pytest.approx(3e-7, rel=0.01)
    assert async_pays.first(lambda x: x > 2, 1e-10, 1.0) == inf


def test_speedup_is_over_the_better_synchronous_schedule():
    seconds = {"sync": 6.0, "zero_bubble": 4.0, "async": 2.0}
    rows = [{"schedule": key, "seconds": s, "joules": 10.0, "num_stages": 3} for key, s in seconds.items()]
    assert async_pays.ratio(rows, "seconds") == 2
    assert async_pays.ratio(rows, "seconds", over="sync") == 3
    assert async_pays.ratio(rows, "joules", over="sync") == 1
    assert async_pays.ratio(rows, "joules", over="sync", static=5.0) == (10 + 5 * 3 * 6) / (10 + 5 * 3 * 2)


def test_costs_of_staleness_are_those_of_the_page_of_results():
    assert async_pays.digits_cost(4).mean() == pytest.approx(1.03, abs=0.005)
    assert async_pays.digits_cost(16).mean() == pytest.approx(1.29, abs=0.005)
    # In clock cycles, 8 stages reach 60 % in 7.29 times fewer cycles. With as many samples it would be 8 times.
    assert 8 / async_pays.cifar_cost(8, 0.6).mean() == pytest.approx(7.29, rel=0.02)
    assert async_pays.cifar_cost(16, 0.6).max() == inf
