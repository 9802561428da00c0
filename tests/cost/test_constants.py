"""These tests check that every constant has a unit and a source, and how hardware of one's own is read."""

from dataclasses import replace
from pathlib import Path

import pytest

from aimc_pl.cost import PRESETS, RASCH_2024, Quantity, find_hardware, spread
from aimc_pl.cost.constants import OTHER_VALUES
from aimc_pl.errors import UsageError


@pytest.mark.parametrize("hardware", PRESETS.values(), ids=PRESETS)
def test_every_constant_has_a_source(hardware):
    rows = [*hardware.rows()]
    assert len(rows) == 25
    assert all(quantity.source and quantity.unit == unit and what for _, unit, what, quantity in rows)


def test_further_values_are_of_known_constants_in_the_same_units():
    units = {name: unit for name, unit, _, _ in RASCH_2024.rows()}
    for name, quantities in OTHER_VALUES.items():
        assert all(quantity.unit == units[name] and quantity.source for quantity in quantities)


def test_spread_is_the_range_over_presets_and_further_sources():
    least, most = spread("forward_time")
    assert (least.value, most.value) == (40e-9, 1600e-9)
    least, most = spread("memory_energy")
    assert least.source.endswith("HBM2")
    assert most.value == pytest.approx(40.6e-12, rel=1e-2)
    # Zeros stand for what is counted elsewhere.
    least, most = spread("adc_energy")
    assert least == most
    assert least.value > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"link_latency": Quantity(10, "ns", "board")},
            "link_latency of .* must be in 's', got 'ns'",
        ),
        ({"tile_size": Quantity(0, "", "none")}, "tile_size of hardware 'rasch_2024' must be a finite number above 0"),
    ],
)
def test_wrong_hardware_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(RASCH_2024, **change)


def test_quantities_need_a_number_and_a_source():
    with pytest.raises(UsageError, match="needs a source: say where 3 s comes from"):
        Quantity(3, "s", "")
    with pytest.raises(UsageError, match="of at least 0, got -1"):
        Quantity(-1, "s", "nowhere")


def test_a_file_changes_constants_of_a_preset():
    Path("board.yaml").write_text(
        "base: marinella_2018\n"
        "link_latency: {value: 1e-6, unit: s, source: my board}\n"
        "tile_size: {value: 256, unit: '', source: my chip}\n"
    )
    hardware = find_hardware("board.yaml")
    changes = {"link_latency": Quantity(1e-6, "s", "my board"), "tile_size": Quantity(256, "", "my chip")}
    assert hardware == replace(PRESETS["marinella_2018"], name="board.yaml", **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nothing\n", "needs a line 'base: NAME' with one of rasch_2024, marinella_2018, isaac_2016"),
        ("base: rasch_2024\nspeed: 3\n", "sets 'speed', which is no constant: they are tile_size"),
        ("base: [rasch_2024]\n", "needs a line 'base: NAME'"),
        ("base: rasch_2024\ntile_size: {value: 2.5, unit: '', source: me}\n", "tile_size .* must be whole, got 2.5"),
        (
            "base: rasch_2024\nlink_latency: {value: -1, unit: s, source: me}\n",
            "link_latency of hardware board.yaml .*-1",
        ),
        ("base: rasch_2024\nlink_latency: {value: nan, unit: s, source: me}\n", "link_latency of hardware .*nan"),
        ("base: rasch_2024\nlink_latency: 3\n", "needs value, unit and source of link_latency, got 3"),
        ("base: rasch_2024\nlink_latency: {value: x, unit: s, source: me}\n", "the value of link_latency is no number"),
        (
            "base: rasch_2024\nlink_latency: {value: true, unit: s, source: me}\n",
            "the value of link_latency is no number: True",
        ),
        ("base: rasch_2024\nbase: rasch_2024\n", "has 'base' twice"),
    ],
)
def test_wrong_files_are_refused_in_one_line(text, message):
    Path("board.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as refused:
        find_hardware("board.yaml")
    assert len(str(refused.value)) <= 200


def test_a_file_that_is_named_like_a_preset_stands_beside_it():
    Path("isaac_2016.yaml").write_text("base: rasch_2024\n")
    assert find_hardware("isaac_2016.yaml").name not in PRESETS
    assert find_hardware("isaac_2016") is PRESETS["isaac_2016"]


def test_unknown_hardware_is_refused():
    with pytest.raises(UsageError, match="unknown hardware 'fast': choose rasch_2024, marinella_2018, isaac_2016, or"):
        find_hardware("fast")
