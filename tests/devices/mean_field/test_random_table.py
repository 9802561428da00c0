"""These tests check slices of the tables of random numbers."""

import torch
from torch import Generator

from aimc_pl.devices.mean_field import random_table

CPU = torch.device("cpu")


def test_moments():
    """Check the moments of a million numbers within 5 standard errors.

    One in 300,000 random seeds would exceed these bounds (6 comparisons).
    """
    n = 10**6
    values = random_table.gaussian((1000, 1000), Generator().manual_seed(0), CPU).double()
    assert values.shape == (1000, 1000)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * (variance / n) ** 0.5
    values = random_table.uniform((n,), Generator().manual_seed(0), CPU).double()
    for power, moment, variance in ((1, 1 / 2, 1 / 12), (2, 1 / 3, 4 / 45), (4, 1 / 5, 16 / 225)):
        assert abs(float((values**power).mean()) - moment) < 5 * (variance / n) ** 0.5


def test_draws_follow_the_generator_and_differ():
    generators = [Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first = [random_table.gaussian((4, 5), generator, CPU) for generator in generators]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], random_table.gaussian((4, 5), generators[0], CPU))


def test_more_numbers_than_the_table_has(monkeypatch):
    monkeypatch.setattr(random_table, "LENGTH", 100)
    values = random_table.uniform((7, 50), Generator().manual_seed(0), CPU)
    assert values.shape == (7, 50)
    assert values.unique().numel() > 100
