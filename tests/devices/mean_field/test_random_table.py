"""These tests check slices of the tables of random numbers."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch

from aimc_pl.devices.mean_field import random_table
from aimc_pl.devices.mean_field.kernels import LENGTH, start
from aimc_pl.devices.mean_field.random_table import TableGenerator

CPU = torch.device("cpu")


def test_moments():
    """Check the moments of a million numbers within 5 standard errors.

    One in 300,000 random seeds would exceed these bounds (6 comparisons).
    """
    n = 10**6
    values = random_table.gaussian((1000, 1000), TableGenerator().manual_seed(0), CPU).double()
    assert values.shape == (1000, 1000)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * (variance / n) ** 0.5
    values = random_table.uniform((n,), TableGenerator().manual_seed(0), CPU).double()
    for power, moment, variance in ((1, 1 / 2, 1 / 12), (2, 1 / 3, 4 / 45), (4, 1 / 5, 16 / 225)):
        assert abs(float((values**power).mean()) - moment) < 5 * (variance / n) ** 0.5


def test_draws_follow_the_generator_and_differ():
    generators = [TableGenerator().manual_seed(seed) for seed in (1, 1, 2)]
    first = [random_table.gaussian((4, 5), generator, CPU) for generator in generators]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], random_table.gaussian((4, 5), generators[0], CPU))


def test_more_numbers_than_the_table_has(monkeypatch):
    monkeypatch.setattr(random_table, "LENGTH", 100)
    values = random_table.uniform((7, 50), TableGenerator().manual_seed(0), CPU)
    assert values.shape == (7, 50)
    assert values.unique().numel() > 100


def draws(generator):
    return torch.cat([random_table.uniform((3,), generator, CPU), torch.rand(3, generator=generator)])


def loaded(generator):
    other = TableGenerator().manual_seed(9)
    other.set_state(generator.get_state())
    return other


@pytest.mark.parametrize("copy", [deepcopy, loaded, lambda generator: pickle.loads(pickle.dumps(generator))])
def test_copies_of_a_generator_draw_the_same_numbers(copy):
    generator = TableGenerator().manual_seed(-3)
    draws(generator)
    copied = copy(generator)
    expected = draws(generator)
    assert type(copied) is TableGenerator
    assert torch.equal(draws(copied), expected)
    assert not torch.equal(draws(copied), expected)


def test_a_state_of_torchs_generator_alone_is_read():
    expected = [start(TableGenerator().manual_seed(seed).offsets) for seed in (5, 6)]
    old = [TableGenerator().set_state(torch.Generator().manual_seed(seed).get_state()) for seed in (5, 6)]
    assert [start(generator.offsets) for generator in old] == expected


def test_slices_begin_anywhere_with_equal_probability():
    """Sort 100,000 beginnings, and the differences of successive ones, into 1,000 bins each.

    Chi-square has 999 degrees of freedom. Its bounds would be exceeded for one in 1,700 seeds each (3.3 sigma).
    """
    generator = TableGenerator().manual_seed(1)
    beginnings = np.array([start(generator.offsets) for _ in range(100_000)])
    assert beginnings.min() >= 0
    assert beginnings.max() < LENGTH
    for numbers in (beginnings, np.diff(beginnings) % LENGTH):
        counts, _ = np.histogram(numbers, 1000, (0, LENGTH))
        expected = len(numbers) / 1000
        assert abs(((counts - expected) ** 2 / expected).sum() - 999) < 3.3 * (2 * 999) ** 0.5


def test_slices_begin_where_splitmix64_says():
    """Compare with the published first numbers of the generator for seed 0."""
    generator = TableGenerator()
    for bits in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC):
        assert start(generator.offsets) == bits % LENGTH
