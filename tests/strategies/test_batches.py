"""These tests check how mini-batches become runs of training_step, and how much each of these runs counts."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.batches import Batches

ROWS = torch.arange(10.0).view(5, 2)
"""A mini-batch of five samples."""


def make(num_microbatches=2, accumulate=1, method=None, **options):
    """Return the batches of a module with a training_step that returns its arguments.

    Args:
        num_microbatches: the number of micro-batches.
        accumulate: the number of mini-batches of an update.
        method: the module's method split_batch, if it has one.
        options: further arguments of the strategy.
    """
    module = SimpleNamespace(trainer=SimpleNamespace(accumulate_grad_batches=accumulate))
    module.training_step = lambda *args: args
    if method is not None:
        module.split_batch = method
    return Batches(module, AnalogPipelineStrategy(num_microbatches=num_microbatches, **options).settings)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [3 / 5, 2 / 5]),
        ({"loss_reduction": "sum"}, [1, 1]),
        ({"gradient_scale": "microbatch"}, [1, 1]),
        ({"gradient_scale": "microbatch", "loss_reduction": "sum"}, [5 / 3, 5 / 2]),
    ],
)
def test_micro_batches_count_by_their_samples(options, weights, accumulate):
    steps = make(accumulate=accumulate, **options).steps(ROWS, (7,), nullcontext)
    assert [step.size for step in steps] == [3, 2]
    assert [step.share for step in steps] == [3 / 5, 2 / 5]
    assert [step.weight for step in steps] == pytest.approx([weight / accumulate for weight in weights])
    assert [step.inputs.tolist() for step in steps] == [ROWS[:3].tolist(), ROWS[3:].tolist()]
    for step in steps:
        assert step.run() == (step.inputs, 7)


@pytest.mark.parametrize(
    ("weigh", "shares"),
    [
        (lambda part: part.sum(), [15 / 45, 30 / 45]),
        (lambda part: 0.01 * len(part), [3 / 5, 2 / 5]),
        (lambda part: len(part) == 2, [0, 1]),
        (lambda part: 0, [0, 0]),
    ],
)
def test_the_user_says_how_much_micro_batches_count(weigh, shares):
    steps = make(microbatch_weight=weigh).steps(ROWS, (), nullcontext)
    assert [step.share for step in steps] == pytest.approx(shares)
    assert [step.weight for step in steps] == pytest.approx(shares)
    assert [step.size for step in steps] == [3, 2]


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan")])
def test_weights_that_are_no_counts_are_refused(weight):
    with pytest.raises(UsageError, match=f"microbatch_weight must return a number of at least 0, got {weight}"):
        make(microbatch_weight=lambda part: weight).steps(ROWS, (), nullcontext)


def test_training_step_runs_in_the_context():
    log = []

    @contextmanager
    def context():
        log.append("in")
        yield
        log.append("out")

    batches = make()
    for step in (
        batches.steps(ROWS, (), context)[1],
        batches.whole(ROWS, (), context),
        batches.half(ROWS, (), context),
    ):
        step.run()
        assert log == ["in", "out"]
        log.clear()


def by_columns(batch, number):
    """Split along the second dimension, and return a tuple."""
    return batch.tensor_split(number, dim=1)


@pytest.mark.parametrize(
    "options", [{"method": by_columns}, {"split_batch": by_columns}, {"method": len, "split_batch": by_columns}]
)
def test_a_function_of_the_user_splits(options):
    batches = make(**options)
    assert not batches.splits_by_sample
    parts = batches.split(ROWS)
    assert isinstance(parts, list)
    assert [part.tolist() for part in parts] == [ROWS[:, :1].tolist(), ROWS[:, 1:].tolist()]
    batch = {"x": ROWS, "more": [torch.ones(3), "text", torch.ones(())]}
    assert batches.size(batch) == 10 + 3 + 1
    assert batches.size("text") == 1
    assert [step.size for step in batches.steps(ROWS, (), nullcontext)] == [5, 5]
    assert torch.equal(batches.half(ROWS, (), nullcontext).inputs, ROWS[:, 1:])


def test_without_a_function_samples_are_split():
    batches = make()
    assert batches.splits_by_sample
    assert [len(part) for part in batches.split(ROWS)] == [3, 2]
    assert batches.size(ROWS) == 5
    assert make(num_microbatches=1, method=by_columns).split(ROWS) == [ROWS]


@pytest.mark.parametrize(
    ("parts", "found"), [([], "0 of them"), ([1, 2, 3], "3 of them"), (iter([1]), "list_iterator"), (None, "NoneType")]
)
def test_other_results_of_the_users_function_are_refused(parts, found):
    with pytest.raises(UsageError, match=f"split_batch must return a list of 1 to 2 micro-batches, got {found}"):
        make(split_batch=lambda batch, number: parts).split(ROWS)
    assert make(split_batch=lambda batch, number: [batch]).split(7) == [7]


@pytest.mark.parametrize(("samples", "rows"), [(5, [3, 4]), (2, [1]), (1, [0])])
def test_the_second_half_of_a_batch(samples, rows):
    step = make(num_microbatches=4).half(ROWS[:samples], (7,), nullcontext)
    assert torch.equal(step.inputs, ROWS[rows])
    assert step.run() == (step.inputs, 7)


def test_a_batch_that_cannot_be_split_has_no_half():
    step = make(num_microbatches=1).half("text", (7,), nullcontext)
    assert step.run() == ("text", 7)
    with pytest.raises(UsageError, match="along the first dimension"):
        make(num_microbatches=2).half("text", (7,), nullcontext)


def test_the_whole_batch_counts_once():
    step = make(accumulate=4, loss_reduction="sum").whole(ROWS, (7,), nullcontext)
    assert step.inputs is ROWS
    assert step.run() == (ROWS, 7)
    assert (step.size, step.share, step.weight) == (1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (ROWS, 5),
        ((torch.ones(8, 2), torch.ones(3)), 8),  # Lightning takes the first tensor, and warns of the other
        (pack_sequence([torch.ones(3), torch.ones(1)]), 4),  # as Lightning counts
        ([torch.ones(()), torch.ones(6)], 1),
        ("text", 1),
        (3, 1),
    ],
)
def test_samples_of_a_batch_that_is_not_split_are_counted_for_logs(batch, size):
    assert make(num_microbatches=1).size(batch) == size


def pair(size):
    """Return a mini-batch of one data loader."""
    return torch.ones(size, 2), torch.ones(size)


@pytest.mark.parametrize(
    ("first", "later", "sizes"),
    [
        ((torch.ones(2, 2), np.ones(2)), (torch.ones(6, 2), np.ones(2)), [2, 6]),
        ([pair(8), pair(8)], [pair(8), pair(3)], [3, 8]),
        (
            ([torch.ones(3, n) for n in range(4)], [{"boxes": torch.ones(n, 4)} for n in range(4)]),
            ([torch.ones(3, 2)] * 3, [{"boxes": torch.ones(3, 4)}] * 2),
            [2, 3],
        ),
    ],
)
def test_mini_batches_that_do_not_fit_to_earlier_ones_are_refused(first, later, sizes):
    batches = make()
    assert len(batches.split(first)) == 2
    with pytest.raises(UsageError, match=f"here these are of size {sizes}".replace("[", r"\[")):
        batches.split(later)


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda size: {"x": torch.ones(size, 2), "names": ["a"] * size, "shape": (5, 7, 9), "weights": [0.3, 0.7]},
        lambda size: {"x": torch.ones(size, 2), "array": np.ones(2), "names": ("a",) * size},
        lambda size: ([torch.zeros(size, 5), torch.ones(size, 5)], ["name"] * size),
        lambda size: [(torch.ones(3, n + 1), torch.ones(n + 2)) for n in range(size)],
    ],
)
def test_small_mini_batches_are_split_like_large_ones(batch_of):
    """Check that a constant stays one where a batch has as many samples as the constant has elements."""
    batches = make()
    for size in (8, 3, 2):
        parts = batches.split(batch_of(size))
        assert [*map(batches.size, parts)] == [-(-size // 2), size // 2]
        assert repr(parts[0]) == repr(batch_of(-(-size // 2)))


@pytest.mark.parametrize("number", [1, 2])
def test_iterators_are_refused(number):
    with pytest.raises(UsageError, match="the batch holds a list_iterator, which trial runs"):
        make(num_microbatches=number).steps({"x": torch.ones(4), "y": iter([1, 2])}, (), nullcontext)
