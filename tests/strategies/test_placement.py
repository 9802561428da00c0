"""These tests train with one stage per process: this process is rank 0, and a copy of it is rank 1."""

import os

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from forked import make_in_two
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Attributes, Samples, loader, make_trainer
from torch.utils.data import DataLoader

from aimc_pl import processes
from aimc_pl.errors import PeerError, UsageError
from aimc_pl.strategies import AnalogPipelineStrategy

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = "LOCAL_RANK"


@pytest.fixture
def in_two(tmp_path, monkeypatch):
    """Return a function that makes a call in two processes, and returns the results of rank 0 and of rank 1."""
    # No test waits for long when the other process has failed.
    monkeypatch.setattr(processes, "_GRACE", 2.0)
    return lambda call: make_in_two(call, tmp_path, monkeypatch)


def trainer_of(devices=2, schedule="sync", split_at=("l3",), options=None, **kwargs):
    """Return a trainer of two stages. Each process first gets another random state."""
    L.seed_everything(7 + int(os.environ.get(RANK, 0)), verbose=False)
    strategy = AnalogPipelineStrategy(
        2, schedule, 2, split_at=split_at, timeout=7.0, start_timeout=9.0, **(options or {})
    )
    return make_trainer(strategy, devices=devices, **{"max_epochs": 1, "limit_train_batches": 2} | kwargs)


class Watched(Attributes):
    """A module that notes what hooks see in every process."""

    optimizer = "adamw"

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.seen = {"norms": [], "drawn": [], "held": [], "states": [], "losses": []}

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.log("logged", batch[0].sum())
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.seen["norms"].append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen["drawn"].append(torch.rand(()).item())
        self.seen["held"].append(sum(p.untyped_storage().nbytes() // p.element_size() for p in self.parameters()))
        self.seen["states"].append(len(self.optimizers().optimizer.state))
        self.seen["losses"].append((outputs or {}).get("loss"))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("schedule", "options"), [("sync", {}), ("async", {}), ("async", {"weight_stashing": True})])
def test_two_processes_train_as_one_does(schedule, options, in_two, tmp_path):
    def train(devices=2):
        saver = ModelCheckpoint(tmp_path, filename=f"{devices}")
        trainer = trainer_of(devices, schedule, options=options, callbacks=[saver], enable_checkpointing=True)
        module = Watched().double()
        trainer.fit(module, loader(module), loader(module))
        losses = [getattr(loss, "stage", "whole") for loss in module.seen.pop("losses") if loss is not None]
        return {
            "weights": module.state_dict(),
            "metrics": dict(trainer.callback_metrics),
            "seen": module.seen,
            "losses": losses,
            "timeout": trainer.strategy.processes.timeout if devices == 2 else 7.0,
        }

    theirs, expected = in_two(train), train(devices=1)
    for found in theirs:
        assert_same(found["weights"], expected["weights"])
        assert_same(found["metrics"], expected["metrics"])
        assert found["timeout"] == 7.0
        assert found["seen"]["drawn"] == expected["seen"]["drawn"]
        if schedule == "sync":
            assert found["seen"]["norms"] == pytest.approx(expected["seen"]["norms"], rel=1e-9)
    last, first = theirs
    for found, names, num in ((last, ("l3", "norm", "l4"), 6), (first, ("l1", "l2"), 4)):
        size = sum(value.numel() for name, value in found["weights"].items() if name.startswith(names))
        # Each parameter of the other stage has one element in memory.
        assert found["seen"]["held"] == [size + 10 - num] * 2
        assert found["seen"]["states"] == [num] * 2
    # Only the last stage knows the loss. Lightning makes an update only where it gets one.
    assert last["losses"] == expected["losses"]
    assert first["losses"] == ([1, 1] if schedule == "sync" else [])
    saved, whole = (torch.load(tmp_path / f"{devices}.ckpt", weights_only=False) for devices in (2, 1))
    assert_same(saved["state_dict"], whole["state_dict"])
    (ours,), (theirs,) = saved["optimizer_states"], whole["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert_same(ours["state"][index], state)
    # Two validation batches before the fit are not divided yet. Then come four micro-batches and three batches.
    assert saved["aimc_pl"]["draws"]["count"] == 4 + 3
    assert whole["aimc_pl"]["draws"] == {}
    for entry in ("counters", "split_at"):
        assert saved["aimc_pl"][entry] == whole["aimc_pl"][entry]


class Random(Attributes):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.dropout(self(F.dropout(batch[0], 0.3))), batch[1])


def test_a_resumed_run_goes_on_with_the_random_numbers_and_the_split_of_the_checkpoint(in_two, tmp_path):
    def train(ckpt_path=None, **kwargs):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = trainer_of(callbacks=[saver], enable_checkpointing=True, **kwargs)
        if ckpt_path is not None:
            torch.rand(7)
        module = Random().double()
        trainer.fit(module, loader(module), ckpt_path=ckpt_path)
        return module.state_dict()

    for found in in_two(lambda: (train(), train(tmp_path / "step=1.ckpt", split_at=None))):
        assert_same(found[1], found[0])


@pytest.mark.parametrize("split_at", [["l3"], None])
def test_evaluation_without_a_fit(split_at, in_two):
    def evaluate(devices=2):
        trainer, module = trainer_of(devices, split_at=split_at), Attributes().double()
        trainer.validate(module, loader(module), verbose=False)
        predictions = trainer.predict(module, loader(module, shuffle=False))
        return predictions, dict(trainer.callback_metrics), module.state_dict(), torch.rand(())

    last, first = in_two(evaluate)
    predictions, metrics, weights, drawn = evaluate(devices=1)
    torch.testing.assert_close(last[0], predictions, rtol=1e-12, atol=1e-12)
    assert first[0] == [None] * 3
    for found in (last, first):
        assert_same(found[1], metrics)
        assert_same(found[2], weights)
        assert found[3] == drawn


def test_other_data_than_those_of_rank_0_are_refused(in_two):
    def call():
        trainer, module, samples = trainer_of(), Attributes().double(), Samples()
        samples.x[8] += int(os.environ[RANK])
        with pytest.raises((UsageError, PeerError)) as error:
            trainer.fit(module, DataLoader(samples, 8))
        return str(error.value)

    message = "rank 1 (stage 0) and rank 0 (stage 1) have read different data in batch 1 of epoch 0. "
    last, first = in_two(call)
    assert last.startswith(message)
    assert first.startswith(f"rank 0 (stage 1) has failed with UsageError: {message}")
