"""These tests check how the outputs of micro-batches become the output of a mini-batch."""

from contextlib import nullcontext

import pytest
import torch

from aimc_pl.errors import UsageError
from aimc_pl.strategies.training_step import TrainingStep, merge_outputs

SIZES = [3, 1]


def finished(*outputs):
    steps = [
        TrainingStep(lambda output=output: output, None, size, size / 4, size / 4, nullcontext)
        for output, size in zip(outputs, SIZES, strict=True)
    ]
    for step in steps:
        step()
    return steps


@pytest.mark.parametrize(("reduction", "expected"), [("mean", (3 * 2 + 6) / 4), ("sum", 8)])
def test_losses_are_averaged_or_added(reduction, expected):
    losses = torch.tensor(2.0), torch.tensor(6.0)
    assert merge_outputs(finished(*losses), reduction) == expected
    merged = merge_outputs(finished(*({"loss": loss} for loss in losses)), reduction)
    assert merged == {"loss": expected}


def test_the_loss_is_zero_if_no_micro_batch_counts():
    """Check micro-batches for which microbatch_weight returns 0."""
    steps = finished(torch.tensor(2.0), {"loss": torch.tensor(6.0), "mean": torch.tensor(6.0)})
    for step in steps:
        step.share = 0.0
    assert merge_outputs(steps, "mean") == {"loss": 0, "mean": 6}
    assert merge_outputs(steps, "sum")["loss"] == 8


def test_other_values_go_by_their_samples():
    merged = merge_outputs(
        finished(
            {"loss": torch.tensor(1.0), "rows": torch.arange(3), "names": ["a", "b", "c"], "mean": torch.tensor(2.0)},
            {"loss": torch.tensor(1.0), "rows": torch.arange(1), "names": ["d"], "mean": torch.tensor(6.0)},
        ),
        "mean",
    )
    assert merged["rows"].tolist() == [0, 1, 2, 0]
    assert merged["names"] == ["a", "b", "c", "d"]
    assert merged["mean"] == 3


def test_skipped_micro_batches_do_not_count():
    assert merge_outputs(finished(None, torch.tensor(6.0)), "mean") == 6
    assert merge_outputs(finished(None, None), "mean") is None


@pytest.mark.parametrize("output", ["loss", torch.ones(2), {"logits": torch.ones(2), "loss": 1.0}])
def test_what_is_no_loss_is_refused(output):
    with pytest.raises(UsageError, match="must return the loss"):
        finished(output, output)
