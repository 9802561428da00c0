"""These tests check that what users know of Lightning works in the same way under the strategy."""

import copy
import threading
from math import ceil
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_modules import MLP, Attributes, DictBatch, loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from aimc_pl import boundaries
from aimc_pl.devices import (
    analog_layers,
    dynamic_transfer,
    mixed_precision,
    residual_learning,
    soft_bounds,
    symmetric_point_tracking,
)
from aimc_pl.errors import UsageError
from aimc_pl.export import to_digital
from aimc_pl.strategies import AnalogPipelineStrategy


def fit(module, strategy="auto", train=None, val=None, ckpt_path=None, **kwargs):
    L.seed_everything(11)
    trainer = make_trainer(strategy, **kwargs)
    trainer.fit(module, loader(module, shuffle=False) if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def seeded(make, *args):
    L.seed_everything(5)
    return make(*args).double()


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


class Recorder(DummyLogger):
    """A logger that keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))


# ------------------------------------------------------------------- logging


class Logs(Attributes):
    def __init__(self):
        super().__init__()
        self.metric = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.metric(logits, y)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log("largest", x.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("weighted", x.sum() / len(x), True, on_step=True, on_epoch=True, batch_size=len(x))
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": (logits.argmax(1) == y).double().mean()}, on_step=True, prog_bar=True)
        self.log("correct", (logits.argmax(1) == y).double().sum(), on_step=True, reduce_fx="sum")
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b"])
def test_logged_values_equal_those_of_whole_minibatches(schedule):
    lines = []
    for strategy in ("auto", AnalogPipelineStrategy(3, schedule, 4)):
        logger = Recorder()
        module = seeded(Logs)
        fit(module, strategy, logger=logger, log_every_n_steps=1, val=loader(module, shuffle=False))
        lines.append(logger.lines)
    plain, ours = lines
    assert [(step, sorted(values)) for step, values in ours] == [(step, sorted(values)) for step, values in plain]
    for (_, a), (_, b) in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_async_logs_every_microbatch_once():
    """Check the epoch means of values that do not depend on the weights: they must be the means over all samples."""
    module = seeded(Logs)
    trainer = fit(module, AnalogPipelineStrategy(4, "async", 4), max_epochs=1)
    x = torch.stack([x for x, _ in loader(module, shuffle=False).dataset])
    assert trainer.callback_metrics["weighted_epoch"] == pytest.approx(x.sum(1).mean().item())
    assert trainer.callback_metrics["largest_epoch"] == pytest.approx(x.max().item())


def test_training_step_runs_once_per_microbatch():
    calls = []

    class Counts(MLP):
        def training_step(self, batch, batch_idx):
            calls.append((batch_idx, len(batch[0]), threading.current_thread() is threading.main_thread()))
            return super().training_step(batch)

    fit(seeded(Counts), AnalogPipelineStrategy(3, "async", 3), max_epochs=1)
    expected = [(0, 3), (0, 3), (0, 2), (1, 3), (1, 3), (1, 2), (2, 1), (2, 1), (2, 1)]
    # The step's runs before the first update must not be counted here.
    assert [(i, n) for i, n, _ in calls] == expected


def test_outputs_of_a_minibatch_reach_the_callbacks():
    seen = []

    class Outputs(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((outputs, batch))

    module = seeded(DictBatch)
    fit(module, AnalogPipelineStrategy(3, "sync", 3), callbacks=[Outputs()], max_epochs=1)
    for outputs, batch in seen:
        assert outputs["loss"].numel() == 1
        torch.testing.assert_close(outputs["scale"], batch["scale"])


# ----------------------------------------------------- optimizer and gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    ],
)
@pytest.mark.parametrize("schedule", ["none", "sync"])
def test_clipping_and_accumulation_equal_plain(schedule, options):
    plain, ours = seeded(Attributes), seeded(Attributes)
    fit(plain, **options)
    trainer = fit(ours, AnalogPipelineStrategy(3, schedule, 4), **options)
    assert_equal(weights(ours), weights(plain))
    assert trainer.global_step == 2 * ceil(3 / options.get("accumulate_grad_batches", 1))


def test_async_clips_and_calls_the_hook_for_each_stage():
    norms = []

    class Hooked(MLP):
        def on_before_optimizer_step(self, optimizer):
            norms.append(len([p for group in optimizer.param_groups for p in group["params"]]))

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            mine = [p.grad for group in optimizer.param_groups for p in group["params"]]
            assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in mine])) <= 0.011

    trainer = fit(seeded(Hooked), AnalogPipelineStrategy(5, "async", 4), gradient_clip_val=0.01, max_epochs=1)
    # Each of 11 micro-batches updates 5 stages, and a stage has one weight and one bias.
    assert norms == [2] * 55
    assert trainer.global_step == 3


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(("schedule", "num_microbatches"), [("sync", 4), ("async", 4), ("async", 1)])
def test_learning_rate_schedulers(schedule, num_microbatches, interval, recwarn):
    """Check learning rates, also with async and one micro-batch, where the first mini-batch ends without an update."""

    class Scheduled(Attributes):
        def __init__(self):
            super().__init__()
            self.rates = []

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

        def on_train_batch_end(self, *args):
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    plain, ours = seeded(Scheduled), seeded(Scheduled)
    fit(plain)
    fit(
        ours,
        AnalogPipelineStrategy(3, schedule, num_microbatches),
        callbacks=[LearningRateMonitor()],
        logger=Recorder(),
    )
    assert ours.rates == plain.rates
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
    if schedule == "sync":
        assert_equal(weights(ours), weights(plain))


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_warm_up_in_an_overridden_optimizer_step(schedule):
    class WarmsUp(Attributes):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.trainer.global_step + 1)
            optimizer.step(closure=optimizer_closure)

    plain, ours = seeded(WarmsUp), seeded(WarmsUp)
    fit(plain)
    trainer = fit(ours, AnalogPipelineStrategy(3, schedule, 4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.06)
    if schedule == "sync":
        assert_equal(weights(ours), weights(plain))


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_frozen_layers_stay(schedule):
    plain, ours = seeded(MLP), seeded(MLP)
    for module in (plain, ours):
        module.net[0].requires_grad_(False)
        module.net[4].requires_grad_(False)
    start = weights(ours)
    fit(plain)
    fit(ours, AnalogPipelineStrategy(4, schedule, 4))
    for name, value in weights(ours).items():
        assert torch.equal(value, start[name]) == name.startswith(("net.0.", "net.4."))
    if schedule == "sync":
        assert_equal(weights(ours), weights(plain))


class Normalised(MLP):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )


@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b"])
def test_batch_norm_and_dropout_equal_an_unsplit_microbatched_run(schedule):
    """Check equality bit for bit. With one stage random numbers are drawn in the order of plain Lightning."""
    plain, ours = seeded(Normalised), seeded(Normalised)
    data = TensorDataset(*(torch.stack(x) for x in zip(*loader(plain, length=16).dataset, strict=True)))
    fit(plain, train=DataLoader(data, batch_size=2), accumulate_grad_batches=4)
    with pytest.warns(UserWarning, match="splitting the mini-batch changes its loss"):
        fit(ours, AnalogPipelineStrategy(1, schedule, 4), train=DataLoader(data, batch_size=8))
    assert_equal(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:BatchNorm computes its statistics per micro-batch")  # the network has BatchNorm
@pytest.mark.filterwarnings("ignore:splitting the mini-batch changes its loss")  # because of BatchNorm
def test_batch_norm_across_stages_equals_an_unsplit_microbatched_run():
    plain, ours = seeded(Normalised), seeded(Normalised)
    for module in (plain, ours):
        module.net[3].p = 0.0
    data = TensorDataset(*(torch.stack(x) for x in zip(*loader(plain, length=16).dataset, strict=True)))
    fit(plain, train=DataLoader(data, batch_size=2), accumulate_grad_batches=4)
    fit(ours, AnalogPipelineStrategy(5, "sync", 4), train=DataLoader(data, batch_size=8))
    assert_equal(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_bf16_mixed():
    plain, ours, stale, exact = (seeded(MLP).float() for _ in range(4))
    data = DataLoader([(x.float(), y) for x, y in loader(plain).dataset], batch_size=8)
    fit(plain, train=data, precision="bf16-mixed")
    fit(ours, AnalogPipelineStrategy(4, "sync", 4), train=data, precision="bf16-mixed")
    assert_equal(weights(ours), weights(plain), rtol=0.05, atol=2e-3)
    fit(
        stale,
        AnalogPipelineStrategy(4, "async", 4, split_at=["net.2", "net.4", "net.6"]),
        train=data,
        precision="bf16-mixed",
    )
    fit(
        exact,
        AnalogPipelineStrategy(4, "async", 4, split_at=["net.2", "net.4", "net.6"]),
        train=data,
        precision="32-true",
    )
    assert_equal(weights(stale), weights(exact), rtol=0.05, atol=5e-3)


def test_bf16_mixed_with_digital_and_analog_layers():
    module = seeded(MLP).float()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    strategy = AnalogPipelineStrategy(4, "async", 4, device={"net.4": "soft_bounds"})
    before = copy.deepcopy(module.net[4].weight)
    fit(module, strategy, train=data, precision="bf16-mixed")
    assert not torch.equal(module.net[4].get_weights()[0], before)


# -------------------------------------------------------------- stop and save


def test_early_stopping_and_checkpoints(tmp_path):
    module = seeded(Attributes)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    trainer = fit(
        module,
        AnalogPipelineStrategy(4, "async", 4),
        val=loader(module, shuffle=False),
        max_epochs=50,
        enable_checkpointing=True,
        callbacks=[EarlyStopping("val_loss", min_delta=10.0, patience=2), checkpoint],
    )
    assert trainer.current_epoch == 3
    assert checkpoint.best_model_path
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert_equal(state, module.state_dict(), rtol=0, atol=0)


def test_checkpoint_in_mid_epoch_holds_every_update(tmp_path):
    counts = []

    class Look(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            pipeline = trainer.strategy.pipeline
            counts.append(({stage.version for stage in pipeline.stages}, pipeline.num_entered))

    module = seeded(Attributes)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(
        module,
        AnalogPipelineStrategy(4, "async", 4),
        enable_checkpointing=True,
        callbacks=[checkpoint, Look()],
        max_epochs=1,
    )
    assert counts == [({4}, 4), ({8}, 8), ({11}, 11)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_resume_is_bit_for_bit(schedule, tmp_path):
    whole, first, second = seeded(Attributes), seeded(Attributes), seeded(Attributes)
    strategy = {"num_stages": 4, "schedule": schedule, "num_microbatches": 4, "split_at": ["l2", "l3", "l4"]}
    fit(whole, AnalogPipelineStrategy(**strategy), max_epochs=4)
    trainer = fit(first, AnalogPipelineStrategy(**strategy), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, AnalogPipelineStrategy(**strategy), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(second), weights(whole), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_checkpoints_go_to_plain_lightning_and_back(there, tmp_path):
    whole, first, second = (seeded(Attributes) for _ in range(3))
    fit(whole, max_epochs=4)
    sync = AnalogPipelineStrategy(3, "sync", 4)
    trainer = fit(first, sync if there else "auto", max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, "auto" if there else sync, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(second), weights(whole))


def test_resume_keeps_the_measured_split(tmp_path):
    first = AnalogPipelineStrategy(2, "async", 2)
    trainer = fit(seeded(Attributes), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=False)
    checkpoint["aimc_pl"]["split_at"] = ["l3"]
    torch.save(checkpoint, tmp_path / "one.ckpt")
    second = AnalogPipelineStrategy(2, "async", 2)
    fit(seeded(Attributes), second, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    stage = second.pipeline.stages[1]
    assert stage.modules == [second.lightning_module.l3, second.lightning_module.norm, second.lightning_module.l4]


@pytest.mark.parametrize("validates", [False, True])
def test_a_fit_goes_on_with_the_counts_and_the_split_of_its_checkpoint(validates, tmp_path):
    """Check a fit that is resumed, and one after a validation of the checkpoint, which keeps nothing but the split."""
    options = {"max_epochs": 1, "limit_train_batches": 2}
    first, second = AnalogPipelineStrategy(2, "async", 2, split_at=["norm"]), AnalogPipelineStrategy(2, "async", 2)
    fit(seeded(Attributes), first, **options).save_checkpoint(tmp_path / "one.ckpt")
    module, trainer = seeded(Attributes), make_trainer(second, **options | {"max_epochs": 1 if validates else 2})
    if validates:
        trainer.validate(module, loader(module), tmp_path / "one.ckpt", verbose=False)
        trainer.fit(module, loader(module))
    else:
        trainer.fit(module, loader(module), ckpt_path=tmp_path / "one.ckpt")
    assert first.pipeline.num_entered == first.num_entered == 4
    times = 1 if validates else 2
    assert second.pipeline.num_entered == second.num_entered == 4 * times
    assert second.pipeline.clock == first.pipeline.clock * times
    assert second.pipeline.stages[1].modules == [module.norm, module.l4]


# ------------------------------------------------------------- analog networks


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize(
    "device",
    [
        "ideal",
        soft_bounds(device_to_device=0.2, write_noise=3.0),
        soft_bounds(backend="bits"),
        residual_learning(soft_bounds(device_to_device=0.2, write_noise=3.0), n_reads_per_transfer=3),
        residual_learning(gamma=0.0, digital_buffer=True),
        dynamic_transfer(soft_bounds(device_to_device=0.2), chop_prob=1.0, transfer_every=0.25),
        symmetric_point_tracking(soft_bounds(device_to_device=0.2), chop_prob=0.5, transfer_every=0.25),
    ],
)
def test_analog_resume_goes_on_updating_the_tiles(schedule, device, tmp_path):
    """Check that a resumed run equals the uninterrupted one, on tiles whose random states can be restored."""
    whole, first, second = (seeded(MLP).float() for _ in range(3))
    data = DataLoader([(x.float(), y) for x, y in loader(whole).dataset], batch_size=8)
    options = {"train": data, "precision": "32-true"}
    for module in (whole, first, second):
        module.optimizer = "momentum"
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1)
    make = lambda: AnalogPipelineStrategy(3, schedule, 4, device=device, split_at=["net.4", "net.6"])  # noqa: E731
    torch.manual_seed(0)
    fit(whole, make(), max_epochs=4, **options)
    torch.manual_seed(0)
    trainer = fit(first, make(), max_epochs=2, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, make(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt", **options)
    for ours, theirs, half in zip(*map(analog_layers, (second, whole, first)), strict=True):
        assert torch.equal(ours.get_weights()[0], theirs.get_weights()[0])
        assert not torch.equal(ours.get_weights()[0], half.get_weights()[0])


def test_plain_optimizer_with_a_scheduler_updates_tiles(recwarn):
    class Analog(MLP):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = seeded(Analog).float()
    start = copy.deepcopy(module.net)
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    fit(module, AnalogPipelineStrategy(4, "async", 4, device="soft_bounds"), train=data, precision="32-true")
    assert len(analog_layers(module)) == 5
    for index in (0, 2, 4, 6, 8):
        assert not torch.equal(module.net[index].get_weights()[0], start[index].weight)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message) or "optimizer.step" in str(w.message)]


def test_sync_on_ideal_tiles_equals_plain_digital():
    plain, ours = seeded(MLP).float(), seeded(MLP).float()
    for module in (plain, ours):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1)
    data = DataLoader([(x.float(), y) for x, y in loader(plain).dataset], batch_size=8)
    fit(plain, train=data, precision="32-true")
    fit(ours, AnalogPipelineStrategy(3, "sync", 4, device="ideal"), train=data, precision="32-true")
    for layer, index in zip(analog_layers(ours), (0, 2, 4, 6, 8), strict=True):
        torch.testing.assert_close(layer.get_weights()[0], plain.net[index].weight, rtol=1e-5, atol=1e-6)


def test_device_per_layer_and_per_stage():
    module = seeded(MLP).float()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    strategy = AnalogPipelineStrategy(
        3, "sync", 2, split_at=["net.2", "net.6"], device={"*": "soft_bounds", 1: "ecram", "net.8": None}
    )
    fit(module, strategy, train=data, precision="32-true", max_epochs=1)
    kinds = [type(layer.analog_module.rpu_config.device).__name__ for layer in analog_layers(module)]
    assert kinds == ["SoftBoundsDevice", "EcRamPresetDevice", "EcRamPresetDevice", "SoftBoundsDevice"]
    assert isinstance(module.net[8], nn.Linear)


def test_validate_test_and_predict_run_the_whole_network(tmp_path):
    module = seeded(Attributes)
    data = loader(module, shuffle=False)
    trainer = fit(module, AnalogPipelineStrategy(4, "async", 4))
    plain = make_trainer()
    for ours, theirs in (
        (trainer.validate(module, data, verbose=False), plain.validate(module, data, verbose=False)),
        (trainer.test(module, data, verbose=False), plain.test(module, data, verbose=False)),
    ):
        assert ours == theirs
    predictions = zip(trainer.predict(module, data), plain.predict(module, data), strict=True)
    assert all(torch.equal(a, b) for a, b in predictions)


def test_validate_loads_an_analog_checkpoint(tmp_path):
    module, fresh = seeded(Attributes).float(), seeded(Attributes).float()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    make = lambda: AnalogPipelineStrategy(2, "async", 4, device="ideal")  # noqa: E731
    trainer = fit(module, make(), train=data, precision="32-true")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.validate(module, data, verbose=False)
    found = make_trainer(make(), precision="32-true").validate(fresh, data, tmp_path / "end.ckpt", verbose=False)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


# ------------------------------------------------------------------ the strategy


@pytest.mark.parametrize("name", ["aimc_none", "aimc_sync", "aimc_1f1b", "aimc_zero_bubble", "aimc_async"])
def test_strategies_by_name(name):
    trainer = fit(seeded(Attributes), name)
    assert trainer.strategy.schedule.name == name.removeprefix("aimc_")
    assert trainer.strategy.schedule.num_stages == 4


def test_strategies_are_registered():
    registered = []
    registry = SimpleNamespace(register=lambda *args, **kwargs: registered.append((args, kwargs)))
    AnalogPipelineStrategy.register_strategies(registry)
    assert registered == [
        (
            (f"aimc_{name}", AnalogPipelineStrategy),
            {"description": f"analog pipeline, schedule {name}", "schedule": name},
        )
        for name in ("none", "sync", "1f1b", "zero_bubble", "async")
    ]


@pytest.mark.slow
def test_measuring_the_split_leaves_data_order_and_random_states_alone():
    orders = []

    class Watches(MLP):
        def training_step(self, batch):
            orders[-1] += batch[1].tolist()
            states[-1].append(torch.rand(()).item())
            return super().training_step(batch)

    states = []
    for strategy in (
        AnalogPipelineStrategy(3, "none", 4, split_at=["net.2", "net.4"]),
        AnalogPipelineStrategy(3, "none", 4),
    ):
        orders.append([])
        states.append([])
        module = seeded(Watches)
        generator = torch.Generator().manual_seed(3)
        train = DataLoader(loader(module).dataset, batch_size=8, shuffle=True, generator=generator)
        fit(module, strategy, train=train, max_epochs=1)
    # The last 19 samples and 11 micro-batches are the training; the earlier ones are trials of the first mini-batch.
    assert orders[0][-19:] == orders[1][-19:]
    assert states[0][-11:] == states[1][-11:]


def test_an_error_in_training_step_leaves_nothing_behind():
    class Fails(MLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch)["loss"]
            if batch_idx == 1 and self.fails:
                raise RuntimeError("broken on purpose")
            return loss

    module = seeded(Fails)
    module.fails = True
    threads = threading.active_count()
    strategy = AnalogPipelineStrategy(4, "async", 4)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        fit(module, strategy)
    assert threading.active_count() == threads
    assert strategy.pipeline.is_empty
    assert "forward" not in vars(module.net)
    assert "log" not in vars(module)
    module.fails = False
    trainer = fit(module, AnalogPipelineStrategy(4, "async", 4), max_epochs=1)
    assert trainer.global_step == 3


def test_the_same_trainer_fits_twice(monkeypatch):
    """Check two fits, of which the second keeps the stages that the first has found by measuring."""
    measured, find = [], boundaries.find
    monkeypatch.setattr(boundaries, "find", lambda *args, **kwargs: measured.append(1) or find(*args, **kwargs))
    module = seeded(Attributes)
    strategy = AnalogPipelineStrategy(4, "async", 4)
    trainer = fit(module, strategy, max_epochs=1)
    before = weights(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(module))
    assert trainer.global_step == 6
    assert any(not torch.equal(before[name], value) for name, value in weights(module).items())
    assert measured == [1]


# ------------------------------------------------------------------- crossbars


class Thaws(BaseFinetuning):
    """Freezes a layer until epoch 1."""

    def freeze_before_training(self, module):
        self.freeze(module.net[2])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[2], optimizer)


SETTING = {
    "pruning": ModelPruning("l1_unstructured", amount=0.5),
    "stochastic averaging": StochasticWeightAveraging(0.05, 1),
    "finetuning": Thaws(),
    "moving average": EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("callback", SETTING)
def test_callbacks_that_read_or_set_weights_are_refused_with_analog_layers(callback):
    strategy = AnalogPipelineStrategy(2, "sync", 2, {"net.0": "soft_bounds"}, ["net.2"])
    with pytest.raises(
        UsageError, match="reads or sets weights, which crossbars do not allow: leave out the callback, or"
    ):
        fit(MLP(), strategy, callbacks=[copy.deepcopy(SETTING[callback])], precision="32-true", max_epochs=1)


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("device", ["pulses", "mixed precision", "digital"])
def test_clipping_reaches_all_but_crossbars_that_learn_by_pulses(schedule, device, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    devices = {"pulses": soft_bounds(), "mixed precision": mixed_precision(soft_bounds()), "digital": None}
    strategy = AnalogPipelineStrategy(2, schedule, 2, devices[device], ["net.2"])
    L.seed_everything(5)
    module = MLP()
    before = [layer.weight.detach().clone() for layer in module.net if isinstance(layer, nn.Linear)]
    precision = "64-true" if device == "digital" else "32-true"
    fit(module, strategy, precision=precision, max_epochs=1, gradient_clip_val=1e-6)
    after = [layer.weight for layer in to_digital(module).net if isinstance(layer, nn.Linear)]
    moved = max((now - then).abs().max() for now, then in zip(after, before, strict=True))
    is_told = "clipping applies to the gradients of digital parameters only" in caplog.text
    assert (moved > 1e-3) == is_told == (device == "pulses")


@pytest.mark.parametrize(("device", "precision"), [("soft_bounds", "32-true"), (None, "64-true")])
def test_a_module_that_clips_by_itself_is_told_of_crossbars(device, precision, caplog):
    class Clips(MLP):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, 0.1, "norm")

    caplog.set_level("INFO", "lightning.pytorch")
    fit(Clips(), AnalogPipelineStrategy(2, "sync", 2, device, ["net.2"]), precision=precision, max_epochs=1)
    assert ("clipping applies to the gradients of digital" in caplog.text) == (device is not None)
