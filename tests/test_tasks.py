"""These tests check the LightningModules of the package."""

import math
import os

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.tasks import LanguageModel


@pytest.fixture
def table():
    """Return a bigram model: the logits of the token after a token are a row of a table."""
    torch.manual_seed(0)
    return nn.Embedding(5, 5)


def trainer(**options):
    accelerator = os.environ.get("TEST_ACCELERATOR", "cpu")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator=accelerator, **quiet, **options)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")  # there is no trainer
def test_language_model_logs_nats_and_bits_per_token(table):
    tokens, following = torch.randint(5, (2, 6, 3))
    probabilities = table.weight.detach().exp()
    probabilities /= probabilities.sum(1, keepdim=True)
    pairs = zip(tokens.flatten().tolist(), following.flatten().tolist(), strict=True)
    expected = -sum(math.log(probabilities[token, after]) for token, after in pairs) / 18
    loader = DataLoader(TensorDataset(tokens, following), batch_size=2)
    module = LanguageModel(table)
    assert module.training_step((tokens, following)).item() == pytest.approx(expected, rel=1e-5)
    for stage, run in (("val", "validate"), ("test", "test")):
        (logged,) = getattr(trainer(), run)(module, loader, verbose=False)
        assert logged == pytest.approx({f"{stage}/loss": expected, f"{stage}/bits": expected / math.log(2)}, rel=1e-5)


def test_language_model_learns_by_its_optimizer_and_scheduler(table):
    before = table.weight.detach().clone()
    tokens, following = torch.randint(5, (2, 6, 3))
    module = LanguageModel(
        table,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1),
    )
    fit = trainer(max_epochs=1)
    fit.fit(module, DataLoader(TensorDataset(tokens, following), batch_size=6))
    # The gradient of a mean cross-entropy is softmax minus one-hot, summed over the places of the token.
    gradient = torch.zeros(5, 5)
    for token, after in zip(tokens.flatten(), following.flatten(), strict=True):
        gradient[token] += (before[token].softmax(0) - torch.eye(5)[after]) / 18
    torch.testing.assert_close(table.weight.detach(), before - 0.5 * gradient)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert "train/loss" in fit.callback_metrics
    assert "train/bits" in fit.callback_metrics


def test_language_model_predicts_the_most_likely_token(table):
    tokens = torch.randint(5, (2, 3))
    expected = [[max(range(5), key=table.weight[token].tolist().__getitem__) for token in row] for row in tokens]
    assert LanguageModel(table).predict_step((tokens, tokens)).tolist() == expected


def test_language_model_by_default_uses_adamw(table):
    optimizer = LanguageModel(table).configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-3
