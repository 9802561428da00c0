"""These tests compare estimates with sums over the stages, and a meter that runs along with estimates."""

from dataclasses import replace

import pytest

from aimc_pl.cost import ISAAC_2016, RASCH_2024, Matrix, Quantity, Work, estimate, stage_cost
from aimc_pl.cost.estimate import Meter
from aimc_pl.schedule import Schedule

KINDS = [
    ("none", "half"),
    ("sync", "half"),
    ("1f1b", "half"),
    ("zero_bubble", "half"),
    ("async", "half"),
    ("async", "full"),
]


def works(num_stages=3):
    return [
        Work(
            matrices=[Matrix("", 40 + 30 * m, 50, 8, 400, 8 * (m > 0), 8)],
            forward_flops=1e4 * (m + 1),
            backward_flops=2e4,
            moved=500,
            moved_back=600,
            kept=3000,
            parameters=70,
            parameters_back=60,
            trained=50,
            batch=400 * (m == 0),
            sent=900 * (m < num_stages - 1),
            returned=900 * (m < num_stages - 1),
        )
        for m in range(num_stages)
    ]


@pytest.mark.parametrize("hardware", [RASCH_2024, ISAAC_2016], ids=["rasch", "isaac"])
@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_energy_is_the_sum_over_operations_updates_links_and_time(name, duplex, hardware):
    hardware = replace(hardware, static_power=Quantity(0.25, "W", "test"))
    schedule = Schedule(name, 3, 4, duplex)
    found = estimate(works(), schedule, hardware, samples_per_microbatch=8, optimizer_states=1, num_minibatches=2)
    stages = [stage_cost(work, hardware, 1) for work in works()]
    operations = sum(8 * (stage.forward + stage.backward + stage.update).energy for stage in stages)
    steps = sum(stage.step.energy for stage in stages) * (8 if name == "async" else 2)
    links = 2 * 2 * 8 * 900 * hardware.activation_bits.value * hardware.link_energy.value
    static = 3 * 0.25 * found.timeline.makespan
    assert found.joules_per_sample == pytest.approx((operations + steps + links + static) / 64)
    assert found.seconds_per_sample == found.timeline.makespan / 64


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_a_meter_that_runs_along_gives_the_estimate(name, duplex):
    hardware = replace(RASCH_2024, static_power=Quantity(0.1, "W", "test"))
    schedule = Schedule(name, 3, 4, duplex)
    meter = Meter(works(), schedule, hardware, 1)
    for fill in [8] if schedule.is_async else [4, 4]:
        for operations in schedule.clocks(fill):
            # As a pipeline does, which tells of updates before it tells of their clock.
            for operation in operations:
                if schedule.is_async and operation.kind == "B":
                    meter.update(operation.stage, operation.microbatch)
            meter.clock(operations)
        for stage in () if schedule.is_async else range(3):
            meter.update(stage, fill - 1)
    found = estimate(works(), schedule, hardware, optimizer_states=1, num_minibatches=2)
    assert meter.seconds == pytest.approx(found.timeline.makespan)
    assert meter.joules == pytest.approx(8 * found.joules_per_sample)


def test_gradients_of_digital_weights_fill_idle_time():
    """Check three equal stages and four micro-batches, with products for W as long as those of F and of B."""
    works = [Work(forward_flops=1e6, backward_flops=2e6, gradient_flops=1e6, kept=10, gradient_numbers=4)] * 3
    hardware = replace(RASCH_2024, link_latency=Quantity(0.0, "s", "test"))
    product = 1e6 / hardware.digital_rate.value
    for name, products, held in (("1f1b", 6 * 3, [30, 20, 10]), ("zero_bubble", 3 * 4 + 2, [34, 28, 22])):
        timeline = estimate(works, Schedule(name, 3, 4), hardware).timeline
        assert timeline.makespan == pytest.approx(products * product)
        assert timeline.peaks == [8 * numbers for numbers in held]


def test_slower_links_and_stages_make_a_run_longer():
    schedule = Schedule("async", 3, 4)
    before = estimate(works(), schedule, RASCH_2024).timeline.makespan
    slow = replace(RASCH_2024, link_latency=Quantity(1e-6, "s", "test"))
    assert estimate(works(), schedule, slow).timeline.makespan > before + 4 * 0.9e-6
    narrow = replace(RASCH_2024, link_bandwidth=Quantity(1e6, "bit/s", "test"))
    assert estimate(works(), schedule, narrow).timeline.makespan > 4 * 900 * 8 / 1e6
