"""These tests check that private names of torchmetrics, which this project uses, still behave as it needs."""

import torch
from torchmetrics import MeanMetric

from aimc_pl.strategies.private_torchmetrics import last_value, set_last_value


def test_last_value_is_that_of_the_last_batch():
    metric = MeanMetric()
    metric(torch.tensor([1.0]))
    metric(torch.tensor([4.0]))
    assert last_value(metric) == 4
    assert metric.compute() == 2.5


def test_there_is_no_last_value_without_a_call():
    metric = MeanMetric()
    metric.update(torch.tensor([1.0]))
    assert last_value(metric) is None


def test_set_last_value():
    metric = MeanMetric()
    metric(torch.tensor([1.0]))
    set_last_value(metric, torch.tensor(7.0))
    assert last_value(metric) == metric._forward_cache == 7
    assert metric.compute() == 1
