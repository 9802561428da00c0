"""These tests train public models in a pipeline as they are: hooks, caches, skips, tied weights, batches of graphs."""

from fnmatch import fnmatch
from functools import partial

import lightning as L
import pytest
import torch
from forked import fork_ranks
from lightning.pytorch.plugins import DoublePrecision
from public_models import CASES, fit, fit_public, loader, seeded, train_all
from torch import nn
from transformers.pytorch_utils import Conv1D

from aimc_pl.devices import analog_layers
from aimc_pl.errors import UsageError
from aimc_pl.microbatch import split_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    # Some of the models have BatchNorm or a loss over pairs.
    pytest.mark.filterwarnings("ignore:BatchNorm computes its statistics", "ignore:splitting the mini-batch changes"),
]

APART = [name for name, case in CASES.items() if case.shared is None]
"""The models of which each stage can be updated by itself."""


@pytest.mark.parametrize("name", CASES)
def test_sync_equals_plain_lightning(name):
    plain = fit(name).state_dict()
    for num_stages in CASES[name].split_at:
        for num_microbatches in CASES[name].exact:
            ours = fit_public(name, num_stages, "sync", num_microbatches).state_dict()
            assert_same(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stashing", [False, True], ids=["current weights", "stashing"])
@pytest.mark.parametrize("name", APART)
def test_async_equals_undivided_steps_with_delayed_weights(name, stashing):
    """Compare with undivided steps. A backward after ``copy_`` uses new weights, as autograd saves references."""
    ours = fit_public(name, 4, "async", 2, {"weight_stashing": stashing}, sgd={"lr": 0.02}, max_epochs=1)
    names = {p: key for key, p in ours.named_parameters()}
    delays = {names[p]: 3 - stage.index for stage in ours.trainer.strategy.pipeline.stages for p in stage.parameters}

    module = seeded(name).double()
    history = [{key: p.detach().clone() for key, p in module.named_parameters()}]
    parts = microbatches(module, name)
    with DoublePrecision().forward_context():
        for k, (microbatch, share) in enumerate(parts):
            for key, p in module.named_parameters():
                p.data, p.grad = history[max(0, k - delays.get(key, 0))][key].clone(), None
            loss = module.training_step(microbatch, 0) * share
            for key, p in module.named_parameters():
                p.data.copy_(p.data if stashing else history[k][key])
            loss.backward()
            steps = {key: 0.02 * p.grad for key, p in module.named_parameters() if p.grad is not None}
            history.append({key: value - steps.get(key, 0.0) for key, value in history[k].items()})
    assert len(history) == 7
    assert_same(dict(ours.named_parameters()), history[-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", APART)
def test_small_steps_of_async_add_up_to_those_of_plain_lightning(name):
    """Check that no gradient is lost or counted twice, with steps so small that staleness hardly matters."""
    options = {"sgd": {"lr": 1e-9}, "max_epochs": 1}
    start = dict(seeded(name).double().named_parameters())
    plain = fit(name, **options)
    ours = fit_public(name, 4, "async", CASES[name].exact[-1], **options)
    plain, ours = ({key: (p - start[key]) / 1e-9 for key, p in module.named_parameters()} for module in (plain, ours))
    assert_same(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in APART])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_async_refuses_a_parameter_of_several_stages(name, num_stages):
    with pytest.raises(UsageError, match=CASES[name].shared):
        fit_public(name, num_stages, "async")


class Start(L.Callback):
    """A callback that keeps the tiles' weights before the first update."""

    def on_train_start(self, trainer, pl_module):
        self.tiles = tiles(pl_module)


@pytest.mark.parametrize("name", CASES)
def test_soft_bounds(name):
    """Check that two mini-batches move every tile, and that every layer that can be analog is analog."""
    start = Start()
    schedule = "async" if name in APART else "sync"
    options = {"precision": "32-true", "max_steps": 2, "callbacks": [start], "sgd": {"lr": 0.5}}
    module = fit_public(name, 4, schedule, 2, {"device": "soft_bounds"}, **options)
    layers = {key for key, layer in seeded(name).named_modules() if type(layer) in (nn.Linear, nn.Conv2d, Conv1D)}
    digital = {key for key in layers for pattern in CASES[name].digital if fnmatch(key, pattern)}
    assert start.tiles.keys() == layers - digital
    for key, weight in tiles(module).items():
        assert weight.isfinite().all()
        assert not torch.equal(weight, start.tiles[key]), key


@pytest.mark.parametrize("name", ["GPT-2", "T5", "Swin", "ResNet", "U-Net", "LSTM", "GCN and GIN"])
def test_stages_that_are_found_share_the_parameters(name):
    module = fit_public(name, 3, max_steps=1)
    stages = [set(stage.parameters) for stage in module.trainer.strategy.pipeline.stages]
    assert all(stages)
    assert set().union(*stages) == set(module.parameters())
    assert CASES[name].shared or sum(map(len, stages)) == len(set(module.parameters()))


def tiles(module):
    return {key: layer.get_weights()[0] for key, layer in module.named_modules() if layer in analog_layers(module)}


def assert_same(ours, theirs, **tolerance):
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def microbatches(module, name):
    """Return the two micro-batches of every mini-batch, with their shares of its loss."""
    count = CASES[name].options.get("microbatch_weight", lambda microbatch: 1)
    batches = [DoublePrecision().convert_input(batch) for batch in loader(name)]
    parts = [getattr(module, "split_batch", split_batch)(batch, 2) for batch in batches]
    return [(part, count(part) / sum(map(count, both))) for both in parts for part in both]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Train in two processes and return the weights by name and schedule."""
    folder = tmp_path_factory.mktemp("public")
    fork_ranks(2, partial(train_all, folder), folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("name", [name for name in APART if name != "VAE"])  # the VAE draws other random numbers there
def test_two_processes_train_as_one_does(name, schedule, of_two_processes):
    ours = fit_public(name, 2, schedule, CASES[name].exact[-1]).state_dict()
    assert_same(of_two_processes[name, schedule], ours, rtol=1e-12, atol=1e-12)
