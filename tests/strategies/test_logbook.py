"""These tests check how values that micro-batches have logged become the value of a mini-batch."""

from contextlib import nullcontext

import pytest
import torch
from torchmetrics import MeanMetric

from aimc_pl.strategies.logbook import Logbook
from aimc_pl.strategies.private_torchmetrics import last_value
from aimc_pl.strategies.training_step import TrainingStep


def step(size):
    return TrainingStep(lambda: None, None, size, 1.0, 1.0, nullcontext)


def written(logbook):
    """Write a logbook, and return the names, values and options that it logs."""
    lines = []
    logbook.write(lambda name, value, **options: lines.append((name, value, options)))
    return lines


def logged(values, **options):
    """Log values in micro-batches of 3 samples and of 1 sample, and return what is logged for the mini-batch."""
    logbook = Logbook()
    for size, value in zip((3, 1), values, strict=True):
        logbook.record(step(size), "name", value, **options)
    ((name, value, kept),) = written(logbook)
    assert (name, kept) == ("name", {"batch_size": 4} | options)
    return value


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [("mean", 3), ("avg", 3), (torch.mean, 3), ("sum", 8), ("min", 2), ("max", 6), (torch.prod, 12)],
)
def test_micro_batches_are_reduced_as_lightning_reduces_steps(reduce_fx, expected):
    assert logged(torch.tensor([2.0, 6.0]), reduce_fx=reduce_fx) == expected
    assert logged([6, 2], reduce_fx="mean") == 5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64), (torch.int64, torch.float32)],
)
def test_a_mean_has_the_type_and_device_of_the_values(kind, expected):
    mean = logged(torch.ones(2, dtype=kind, device="meta"))
    assert (mean.dtype, mean.device.type) == (expected, "meta")


def test_a_batch_size_of_zero_counts():
    logbook = Logbook()
    for size, value in ((0, 2.0), (4, 7.0)):
        logbook.record(step(100), "name", value, batch_size=size)
    logbook.record(step(100), "other", 3.0, batch_size=0)
    assert written(logbook) == [("name", 7.0, {"batch_size": 4}), ("other", 3.0, {"batch_size": 0})]


def test_a_batch_size_that_was_given_counts():
    logbook = Logbook()
    for size, value in ((1, 2.0), (4, 7.0)):
        logbook.record(step(100), "name", value, batch_size=size, prog_bar=True)
    assert written(logbook) == [("name", 6.0, {"batch_size": 5, "prog_bar": True})]
    assert written(logbook) == []


def test_a_name_that_a_step_logs_several_times_is_logged_as_often():
    logbook, steps = Logbook(), [step(1), step(1)]
    for running, values in zip(steps, ((1.0, 2.0, 3.0), (5.0, 6.0, 7.0)), strict=True):
        for value in values:
            logbook.record(running, "name", value)
    assert [value for _, value, _ in written(logbook)] == [3, 4, 5]


@pytest.mark.parametrize(
    ("function", "values", "expected"), [("forward", [2.0, 6.0], 3), ("forward", [2.0], 2), ("update", [2.0], None)]
)
def test_a_metric_is_logged_itself_with_the_mean_of_its_values(function, values, expected):
    metric, logbook = MeanMetric(), Logbook()
    for size, value in zip((3, 1), values, strict=False):
        getattr(metric, function)(torch.tensor(value))
        logbook.record(step(size), "name", metric)
    ((_, logged_metric, _),) = written(logbook)
    assert logged_metric is metric
    assert last_value(metric) == expected
