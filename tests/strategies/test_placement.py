"""These tests train with one stage per process: this process is rank 0, and a copy of it is rank 1."""

import os
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from forked import make_in_two
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_modules import Attributes, Samples, loader, make_trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

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
    settings = {"num_microbatches": 2, "timeout": 7.0, "start_timeout": 9.0} | (options or {})
    strategy = AnalogPipelineStrategy(2, schedule, split_at=split_at, **settings)
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


class DecidesByMetrics(Attributes):
    """A module whose hooks log metrics that only the last stage knows, and read metrics that steps have logged.

    Two plateau schedulers and two callbacks decide by these metrics.
    """

    def __init__(self):
        super().__init__()
        self.accuracy, self.losses, self.read = MulticlassAccuracy(3), [], []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy.update(logits.detach(), batch[1])
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("accuracy", self.accuracy.compute())
        self.accuracy.reset()

    def validation_step(self, batch, batch_idx):
        self.losses.append(F.cross_entropy(self(batch[0]), batch[1]))
        self.log("val_loss", self.losses[-1])

    def on_validation_epoch_end(self):
        self.log("mean_loss", torch.stack(self.losses).mean())
        self.losses = []
        if not self.trainer.sanity_checking:
            self.read.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        by_epoch = ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)
        by_step = ReduceLROnPlateau(optimizer, factor=0.8, patience=0, threshold=0.1)
        return [optimizer], [
            {"scheduler": by_epoch, "monitor": "accuracy"},
            {"scheduler": by_step, "monitor": "loss_step", "interval": "step"},
        ]


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_all_decide_by_the_metrics_of_rank_0(schedule, in_two, tmp_path):
    def train(devices=2):
        folder = tmp_path / f"{devices}"
        savers = [
            ModelCheckpoint(folder, "{epoch}-{accuracy:.3f}", monitor="accuracy", mode="max"),
            ModelCheckpoint(folder, "named-{step}-{loss_step:.4f}", every_n_train_steps=3),
            ModelCheckpoint(folder, "timed-{step}", monitor="loss_step", train_time_interval=timedelta(microseconds=1)),
        ]
        trainer = trainer_of(
            devices,
            schedule,
            max_epochs=5,
            callbacks=[EarlyStopping("accuracy", patience=3, mode="max"), *savers],
            enable_checkpointing=True,
        )
        module = DecidesByMetrics().double()
        trainer.fit(module, loader(module), loader(module))
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        best = [os.path.basename(saver.best_model_path) for saver in savers]
        return module.state_dict(), dict(trainer.callback_metrics), best, rate, module.read, trainer.global_step

    expected = train(devices=1)
    for weights, metrics, *others, read, step in in_two(train):
        assert_same(weights, expected[0])
        assert_same(metrics, expected[1])
        assert others == [*expected[2:4]]
        assert read == pytest.approx(expected[4], rel=1e-9)
        assert step == expected[5]


class Skips(Attributes):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 0:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if self.current_epoch == 1 and batch_idx == 1 else loss


# Lightning warns of every mini-batch that the test skips on purpose.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("schedule", ["sync", "1f1b", "async"])
def test_a_step_may_skip_a_batch(schedule, in_two):
    def train(devices=2):
        trainer, module = trainer_of(devices, schedule, max_epochs=3), Skips().double()
        trainer.fit(module, loader(module))
        return module.state_dict(), dict(trainer.callback_metrics)

    expected = train(devices=1)
    for weights, metrics in in_two(train):
        assert_same(weights, expected[0])
        assert_same(metrics, expected[1])


class ChangesInTheSecondEpoch(Attributes):
    """A module whose loss has another term from the second epoch on, of a value that only the first stage knew."""

    def forward(self, x):
        first = self.l1(x)
        logits = self.l4(self.norm(torch.tanh(self.l3(torch.tanh(self.l2(torch.tanh(first)))))))
        return logits + first.mean() ** 2 * torch.arange(3) if self.current_epoch else logits


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_the_epoch_may_decide_what_a_step_computes(schedule, in_two):
    def train(devices=2):
        trainer, module = trainer_of(devices, schedule, max_epochs=2), ChangesInTheSecondEpoch().double()
        trainer.fit(module, loader(module), loader(module))
        return module.state_dict(), dict(trainer.callback_metrics)

    expected = train(devices=1)
    for weights, metrics in in_two(train):
        assert_same(weights, expected[0])
        assert_same(metrics, expected[1])


class AveragesActivations(Attributes):
    """A module with a buffer that belongs to no layer, and that the first stage writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(9))

    def forward(self, x):
        first = self.l1(x)
        self.mean = 0.9 * self.mean + 0.1 * first.detach().mean(0)
        return self.l4(self.norm(torch.tanh(self.l3(self.l2(first - self.mean)))))


def test_a_buffer_of_the_module_is_saved_by_the_stage_that_writes_it(in_two, tmp_path):
    def train(devices=2):
        saver = ModelCheckpoint(tmp_path, filename=f"{devices}")
        trainer = trainer_of(devices, callbacks=[saver], enable_checkpointing=True, options={"num_microbatches": 1})
        module = AveragesActivations().double()
        trainer.fit(module, loader(module))
        return module.state_dict()

    expected = train(devices=1)
    for found in in_two(train):
        assert_same(found, expected)
    saved, whole = (torch.load(tmp_path / f"{devices}.ckpt", weights_only=False) for devices in (2, 1))
    assert_same(saved["state_dict"], whole["state_dict"])


class AddsNoise(Attributes):
    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad += 0.1 * torch.randn_like(parameter.grad)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.rand_like(parameter)


def test_hooks_draw_the_random_numbers_of_one_process(in_two):
    def train(devices=2):
        trainer, module = trainer_of(devices, max_epochs=2), AddsNoise().double()
        trainer.fit(module, loader(module))
        return module.state_dict()

    expected = train(devices=1)
    for found in in_two(train):
        assert_same(found, expected)


class LogsAMetric(Attributes):
    def __init__(self):
        super().__init__()
        self.size = MeanMetric()

    def forward(self, x):
        first = self.l1(x)
        self.size(first.abs().mean())
        self.log("size", self.size)
        return self.l4(self.norm(torch.tanh(self.l3(self.l2(first)))))


def test_a_logged_metric_of_another_stage_is_refused(in_two):
    def call():
        trainer, module = trainer_of(), LogsAMetric().double()
        with pytest.raises((UsageError, PeerError)) as error:
            trainer.fit(module, loader(module))
        return str(error.value)

    last, _ = in_two(call)
    assert last == (
        "the step logs a MeanMetric that stage 0 updates, and only the last stage logs: update it after the last "
        "boundary, log a number in its place, or use devices=1"
    )


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
