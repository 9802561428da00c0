"""These tests check that private names of Lightning, which this project uses, still behave as it needs."""

import random
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning_modules import MLP, Samples, loader, make_trainer
from torch.utils.data import DataLoader, SequentialSampler

from aimc_pl.patches import patched
from aimc_pl.strategies import private_lightning as private


class Module(MLP):
    """A module that calls ``look(trainer, batch_idx)`` in every training step."""

    look = staticmethod(lambda trainer, batch_idx: None)

    def training_step(self, batch, batch_idx):
        self.look(self.trainer, batch_idx)
        return super().training_step(batch)["loss"]


def fit(module=None, val=None, **kwargs):
    """Train in plain Lightning, with three mini-batches in an epoch, and return the trainer."""
    module = (module or Module()).double()
    trainer = make_trainer(max_epochs=1, **kwargs) if "max_epochs" not in kwargs else make_trainer(**kwargs)
    trainer.fit(module, loader(module), val)
    return trainer


def test_prepare_step_calls_hooks_and_clips():
    calls = []

    class Hooked(Module):
        def on_after_backward(self):
            calls.append("after backward")

        def on_before_optimizer_step(self, optimizer):
            calls.append("before step")

    trainer = fit(Hooked(), gradient_clip_val=0.5)
    calls.clear()
    weights = [*trainer.lightning_module.parameters()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    private.prepare_step(trainer, trainer.optimizers[0])
    assert calls == ["after backward", "before step"]
    assert torch.cat([weight.grad.flatten() for weight in weights]).norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_prepare_step_takes_parameters_without_gradients(algorithm):
    """Check a stage that is frozen or all analog. torch's own clip_grad_value_ does not take an empty list."""
    calls = []

    class Hooked(Module):
        def on_before_optimizer_step(self, optimizer):
            calls.append("before step")

    trainer = fit(Hooked(), gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    calls.clear()
    trainer.optimizers[0].zero_grad()
    private.prepare_step(trainer, trainer.optimizers[0])
    assert calls == ["before step"]


def test_prepare_step_gives_a_precision_a_loss_on_the_device_of_the_module():
    devices = []

    class Own(Precision):
        def post_backward(self, tensor, module):
            devices.append(tensor.device.type)

    trainer = fit()
    trainer.strategy.precision_plugin = Own()
    trainer.lightning_module.to("meta")
    private.prepare_step(trainer, trainer.optimizers[0])
    assert devices == ["meta"]


def test_hooks_before_a_step_run_inside_a_context():
    calls = []

    class Hooked(Module):
        def on_before_optimizer_step(self, optimizer):
            calls.append("before step")

    @contextmanager
    def context():
        calls.append("enter")
        yield
        calls.append("exit")

    trainer = fit(Hooked())
    calls.clear()
    with private.hooks_before_step_inside(trainer.precision_plugin, context):
        private.prepare_step(trainer, trainer.optimizers[0])
    private.prepare_step(trainer, trainer.optimizers[0])
    assert calls == ["enter", "before step", "exit", "before step"]


@pytest.mark.parametrize("hook", private._PREPARING)
def test_hooks_before_a_step_are_noticed(hook):
    """Check hooks of the module's class, of the module itself, and of a callback, where callbacks have that hook."""
    plain = fit(Module())
    assert not private.is_step_hooked(plain)
    with patched((plain.lightning_module, hook, lambda *args, **kwargs: None)):
        assert private.is_step_hooked(plain)
    assert private.is_step_hooked(fit(type("Hooked", (Module,), {hook: lambda *args, **kwargs: None})()))
    if hasattr(L.Callback, hook):
        callback = type("Hooked", (L.Callback,), {hook: lambda *args: None})()
        assert private.is_step_hooked(fit(Module(), callbacks=[callback]))


def test_clipping_and_precisions_that_have_their_say_are_noticed():
    class Own(Precision):
        def _after_closure(self, *args):
            pass

    assert private.is_step_hooked(fit(Module(), gradient_clip_val=0.5))
    plain = fit(Module())
    plain.strategy.precision_plugin = Own()
    assert private.is_step_hooked(plain)


def test_lightning_sets_the_name_of_the_running_hook_on_the_module():
    """Check the attributes that Lightning itself sets on the module around a step."""
    names = []

    class Hooked(Module):
        def on_before_backward(self, loss):
            names.append([vars(self)[name] for name in private.SET_AROUND_STEPS if name != "log"])

    module = Hooked()
    module.look = lambda trainer, batch_idx: names.append([vars(module)["_current_fx_name"]])
    fit(module)
    assert names == 3 * [["training_step"], ["on_before_backward"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 1}, [False, False, True]),
        ({"max_epochs": 1, "val_check_interval": 2}, [False, True, True]),
        ({"max_epochs": 2, "max_steps": 4}, [False, False, True, True]),
    ],
)
def test_last_batch_before_look(options, expected):
    seen, module = [], Module()
    module.look = lambda trainer, batch_idx: seen.append(private.last_batch_before_look(trainer))
    module.validation_step = lambda batch, batch_idx: None
    fit(module, loader(module), num_sanity_val_steps=0, **options)
    assert seen == expected


def test_logging_in_a_hook():

    class Late(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            # Lightning lets only steps log a value per step.
            with pytest.raises(MisconfigurationException, match="on_step"):
                pl_module.log("late", 3.0, on_step=True, batch_size=1)
            with private.logging_in(pl_module, "training_step"):
                pl_module.log("late", 3.0, on_step=True, batch_size=1)
            with pytest.raises(MisconfigurationException, match="on_step"):
                pl_module.log("later", 3.0, on_step=True, batch_size=1)
            ended.append(True)

    ended = []
    fit(callbacks=[Late()])
    assert ended == [True]


def test_without_loggers():
    lines = []

    class Recorder(DummyLogger):
        def log_metrics(self, metrics, step=None):
            lines.append(metrics)

    logger = Recorder()
    trainer = make_trainer(logger=logger)
    with private.without_loggers(trainer):
        trainer.loggers[0].log_metrics({"a": 1})
    assert lines == []
    assert trainer.loggers == [logger]


@pytest.mark.filterwarnings("ignore:predict returned None")  # the steps return nothing
def test_evaluation_without_inference_mode():
    seen, module = {}, Module().double()
    for name in ("validation", "test", "predict"):
        setattr(module, f"{name}_step", lambda batch, name=name: seen.update({name: torch.is_inference_mode_enabled()}))
    for changed in (False, True):
        trainer = make_trainer(max_epochs=1)
        if changed:
            private.evaluate_without_inference_mode(trainer)
        trainer.fit(module, loader(module), loader(module))
        in_fit = seen.pop("validation")
        trainer.validate(module, loader(module), verbose=False)
        trainer.test(module, loader(module), verbose=False)
        trainer.predict(module, loader(module))
        assert seen == dict.fromkeys(("validation", "test", "predict"), not changed)
        assert not in_fit  # validation in a fit is never in inference mode


def test_should_log():
    seen, module = [], Module()
    module.look = lambda trainer, batch_idx: seen.append(private.should_log(trainer))
    fit(module, log_every_n_steps=2)
    assert seen == [False, True, False]


def test_epoch_metrics_are_those_of_the_running_loop():
    seen = {}

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.update(private.epoch_metrics(trainer))

    class Logs(Module):
        def on_train_batch_start(self, batch, batch_idx):
            self.log("training", 1.0)

        def validation_step(self, batch, batch_idx):
            self.log("validating", float(batch_idx), batch_size=1)

    module = Logs()
    trainer = fit(module, loader(module), callbacks=[Look()], num_sanity_val_steps=0)
    assert {name: float(value) for name, value in seen.items()} == {"validating": 1.0}
    assert private.epoch_metrics(trainer) == {}


def test_update_callback_metrics():
    trainer = fit()
    private.update_callback_metrics(trainer, {"told": torch.tensor(2.0)})
    assert trainer.callback_metrics["told"] == 2


def test_what_was_logged_is_forgotten():
    class Forgets(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            private.forget_logged(trainer)

    class Logs(Module):
        def on_train_batch_start(self, batch, batch_idx):
            self.log("logged", 1.0)

    assert "logged" in fit(Logs()).callback_metrics
    trainer = fit(Logs(), callbacks=[Forgets()])
    assert "logged" not in trainer.callback_metrics
    private.forget_logged(trainer)


def test_metrics_are_shared_before_plateaus():
    trainer, calls = fit(), []
    owner, name, value = private.share_before_plateaus(trainer, lambda trainer: calls.append(trainer))
    private.update_callback_metrics(trainer, {"told": torch.tensor(2.0)})
    assert getattr(owner, name)("told") == value("told") == 2
    assert calls == [trainer]


@pytest.mark.parametrize(
    ("saver", "expected"),
    [
        (ModelCheckpoint(monitor="loss", every_n_train_steps=2), [False, True, False, True]),
        (ModelCheckpoint(filename="{loss}", every_n_train_steps=2), [False, True, False, True]),
        (ModelCheckpoint(monitor="loss", train_time_interval=timedelta(seconds=9)), [True] * 4),
        (ModelCheckpoint(monitor="loss"), [False] * 4),
    ],
)
def test_may_save_now(saver, expected):
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True)
    assert [private.may_save_now(trainer, step) for step in (1, 2, 3, 4)] == expected


def test_random_states_come_back():
    states = private.random_states()
    assert states.keys() == {"torch", "numpy", "python"}
    first = torch.rand(3), np.random.rand(), random.random()
    private.set_random_states(states)
    assert torch.equal(first[0], torch.rand(3))
    assert first[1:] == (np.random.rand(), random.random())


def test_set_epoch_tells_the_sampler():
    epochs = []

    class Sampler(SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    module, samples = Module().double(), Samples()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, DataLoader(samples, 8, sampler=Sampler(samples)))
    assert epochs == [0, 1]
    private.set_epoch(trainer)
    assert epochs == [0, 1, trainer.current_epoch]


@pytest.mark.parametrize("again", [False, True])
def test_make_iterator_in_epoch(again, tmp_path):
    """Check a fit from the end of an epoch. Lightning's data loop makes an iterator before the epoch in any case."""
    iterators = []

    class Counted(DataLoader):
        def __iter__(self):
            iterators.append(True)
            return super().__iter__()

    class Make(L.Callback):
        def on_train_start(self, trainer, pl_module):
            if again:
                private.make_iterator_in_epoch(trainer)

    fit().save_checkpoint(tmp_path / "end.ckpt")
    resumed = make_trainer(max_epochs=2, callbacks=[Make()])
    resumed.fit(Module().double(), Counted(Samples(), 8), ckpt_path=tmp_path / "end.ckpt")
    assert len(iterators) == (2 if again else 1)


def test_script_launcher_starts_its_children(monkeypatch):
    started = []
    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", lambda self: started.append(self))
    launcher = private.ScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    assert launcher.procs == []
    launcher.start_children()
    assert started == [launcher]


def test_processes_share_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        private.share_threads(10_000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_batches_have_names():
    names = []

    class Names(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            names.append(private.batch_name(trainer))

        def on_validation_batch_start(self, trainer, *args):
            names.append(private.batch_name(trainer))

    class Validated(Module):
        def validation_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    options = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    fit(Validated(), loader(Module()), callbacks=[Names()], **options)
    assert names == ["batch 0 of epoch 0", "batch 1 of epoch 0", "batch 0 of validate"]


def test_checkpoints_are_read_in_a_context(monkeypatch):
    opened = []
    monkeypatch.setattr(LightningCLI, "_parse_ckpt_path", lambda self: opened.append("read"))
    command = object.__new__(private.CheckpointReadingCLI)
    command.config = Namespace(subcommand="fit", fit=Namespace(ckpt_path="a.ckpt"))
    monkeypatch.setattr(
        private.CheckpointReadingCLI,
        "reading_checkpoint",
        lambda self, path: opened.append(path) or nullcontext(),
    )
    command._parse_ckpt_path()
    assert opened == ["a.ckpt", "read"]


def test_the_strategy_overrides_what_lightning_calls():
    """Check the private names that every strategy of Lightning defines or sets."""
    assert callable(Strategy._configure_launcher)
    assert SingleDeviceStrategy("cpu")._launcher is None


@pytest.mark.parametrize(
    ("argv", "rerun"),
    [
        (["-c", "fit"], ["-W", "error", "-c", "program", "fit"]),
        (["/folder/script.py", "fit"], ["/folder/script.py", "fit"]),
    ],
)
def test_children_run_the_program_of_their_parent(argv, rerun, monkeypatch):
    """Check the command of a child, for a script and for a program that is an argument of Python itself."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(command))
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "-c", "program", "fit"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    private.ScriptLauncher(LightningEnvironment(), 3, 1).start_children()
    assert started == [[sys.executable, *rerun]] * 2
