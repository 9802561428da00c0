"""These tests check that what cannot work ends in one clear line before any weight is updated."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import Strategy
from lightning_modules import MLP, loader, make_trainer
from PIL import Image
from torch.utils.data import DataLoader

from aimc_pl import compare, configs, history, models
from aimc_pl.callbacks import (
    DeviceNoise,
    DeviceVariation,
    Drift,
    PipelineDiagram,
    ReadNoise,
    StalenessMonitor,
    StuckAt,
    WriteNoise,
)
from aimc_pl.cli import main
from aimc_pl.config_files import check_config
from aimc_pl.cost import find_hardware
from aimc_pl.data import MNIST, Digits, ImageFolder, PydocText
from aimc_pl.devices import (
    constant_step,
    convert_to_analog,
    get_device,
    linear_step,
    make_analog_aware,
    plot_response,
    soft_bounds,
    soft_bounds_reference,
    tiki_taka,
)
from aimc_pl.diagram import draw_figure, draw_text
from aimc_pl.drift import draw_drift, evaluate_drift, phase_change_memory
from aimc_pl.errors import UsageError
from aimc_pl.export import to_digital
from aimc_pl.models import GPT, LeNet5, ResNet
from aimc_pl.runs import draw_runs
from aimc_pl.schedule import Schedule
from aimc_pl.strategies import AnalogPipelineStrategy, load_checkpoint, load_from_checkpoint
from aimc_pl.strategies.training import Training
from aimc_pl.tasks import Classifier, LanguageModel
from aimc_pl.training_cli import AnalogCLI

STRATEGY = "--trainer.strategy.init_args."

COMMANDS = {
    "unknown schedule": (
        [STRATEGY + "schedule=fast"],
        "schedule: expected one of none, sync, 1f1b, zero_bubble, async or the name of a class, got fast",
    ),
    "no stages": (
        [STRATEGY + "num_stages=0"],
        "num_stages must be a whole number of at least 1 and",
    ),
    "no micro-batches": ([STRATEGY + "num_microbatches=0"], "num_microbatches must be a whole number"),
    "unknown duplex": ([STRATEGY + "duplex=both"], "both"),
    "full duplex of sync": ([STRATEGY + "schedule=sync", STRATEGY + "duplex=full"], "duplex='full' is for"),
    "unknown gradient scale": ([STRATEGY + "gradient_scale=none"], "gradient_scale"),
    "unknown loss reduction": ([STRATEGY + "loss_reduction=max"], "loss_reduction"),
    "split and stages disagree": (
        [STRATEGY + "num_stages=3"],
        "num_stages=3 needs 2 names in split_at, got 3: split_at=null",
    ),
    "a number that another one needs": (["--trainer.max_epochs=null"], "model.lr_scheduler: the following arguments"),
    "split at an unknown layer": (
        [STRATEGY + 'split_at=["network.3","network.5","x"]'],
        "split_at names 'x', which is no submodule of Classifier; it has network,",
    ),
    "split by names of the network": ([STRATEGY + 'split_at=["3","5","7"]'], "so write 'network.3'"),
    "split at a layer that is not called": (
        [STRATEGY + 'split_at=["network.3","network.5","test_accuracy"]'],
        "split_at names 'test_accuracy', which training_step does not call",
    ),
    "split out of order": ([STRATEGY + 'split_at=["network.5","network.3","network.7"]'], "out of order"),
    "split at the first layer": (
        [STRATEGY + 'split_at=["network.0","network.3","network.5"]'],
        "leaves stage 0 empty",
    ),
    "more stages than layers": (
        [STRATEGY + "num_stages=5", STRATEGY + "split_at=null"],
        "5 stages need at least 5 layers that can be split apart, and training_step calls 4. Lower num_stages",
    ),
    "an argument of the past": ([STRATEGY + "backbone=body"], "backbone"),
    "weights of a sum": (
        [STRATEGY + "loss_reduction=sum", STRATEGY + "microbatch_weight=builtins.len"],
        "microbatch_weight is for losses that are means",
    ),
    "unknown device": (
        [STRATEGY + "device=memristor"],
        "unknown device 'memristor': 'aimc-pl devices' lists",
    ),
    "device without range": (
        [STRATEGY + "device.init_args.tau=-1"],
        "tau must be a finite number above 0 and at most 1000000000, got -1",
    ),
    "stashing on tiles": ([STRATEGY + "weight_stashing=true"], "a crossbar cannot keep a second set of weights"),
    "several devices": (["--trainer.devices=2"], "2 processes do not fit num_stages=4: set Trainer(devices=4)"),
    "accumulation under async": (["--trainer.accumulate_grad_batches=2"], "contradicts schedule='async'"),
    "float64 on tiles": (["--trainer.precision=64-true"], "tiles compute in float32"),
    "no samples in a batch": (
        ["--data.init_args.batch_size=0"],
        "batch_size must be a whole number of at least 1, got 0",
    ),
    "all for validation": (
        ["--data.init_args.val_fraction=1.0"],
        "val_fraction must be a finite number above 0 and below 1",
    ),
    "batch smaller than its micro-batches": (
        ["--data.init_args.batch_size=2"],
        "2 samples cannot be split into num_microbatches=4",
    ),
    "one layer size": (["--model.init_args.network.init_args.sizes=[64]"], "at least an input and an output size"),
    "unknown option": (["--trainer.stages=4"], "stages"),
    "not a number": (["--trainer.max_epochs=many"], "error: trainer.max_epochs: expected int or null, got many"),
    "unknown class": (
        ["--model=aimc_pl.tasks.Regressor"],
        "module 'aimc_pl.tasks' has no attribute 'Regressor'",
    ),
    "a misspelt argument of the Trainer": (
        ["--config=epoch.yaml"],
        "trainer.max_epoch in a config is no argument of the Trainer: did you mean max_epochs?",
    ),
    "an unknown argument of the Trainer": (["--config=word.yaml"], "wxyz in a config is no argument of the Trainer"),
    "a misspelt argument of the strategy": (
        ["--config=stage.yaml"],
        "trainer.strategy: AnalogPipelineStrategy has no argument 'num_stage': did you mean num_stages?",
    ),
    "a misspelt argument, after the config": (
        ["--trainer.strategy.num_stage=3"],
        "AnalogPipelineStrategy has no argument 'num_stage': did you mean num_stages?",
    ),
    "a list of arguments": (["--config=list.yaml"], "strategy: init_args must have lines NAME: VALUE, got a list"),
    "a misspelt optimizer": (
        ["--config=rate.yaml"],
        "model: Classifier has no argument 'optimiser': did you mean optimizer?",
    ),
    "a misspelt device": (
        ["--config=device.yaml"],
        "module 'aimc_pl.devices' has no attribute 'soft_bound': did you mean soft_bounds?",
    ),
    "a misspelt argument of a device": (["--config=tau.yaml"], "soft_bounds has no argument 'tua': did you mean tau?"),
    "a misspelt callback": (
        ["--config=callback.yaml"],
        "trainer.callbacks: module 'aimc_pl.callbacks' has no attribute 'DeviceMonitr': did you mean DeviceMonitor?",
    ),
    "a misspelt key of a class": (
        ["--config=keys.yaml"],
        "besides class_path, a mapping may have init_args only",
    ),
    "a misspelt part of a config": (["--config=part.yaml"], "modle in a config is no argument: did you mean model?"),
    "a misspelt argument of the command": (["--modle.lr=1"], "--modle.lr is no argument: did you mean --model.lr?"),
    "an argument of the strategy": (["--device=ecram"], "write --trainer.strategy.device: --device is an argument of"),
    "a misspelt logger in a list": (
        ["--config=logger.yaml"],
        "trainer.logger: module 'aimc_pl.callbacks' has no attri",
    ),
    "a misspelt argument of a logger": (
        ["--config=folder.yaml"],
        "RunTable has no argument 'save_dr': did you mean save_",
    ),
    "a misspelt callback, after the config": (
        ["--trainer.callbacks+=EarlyStoping"],
        "got EarlyStoping: did you mean lightning.pytorch.callbacks.EarlyStopping?",
    ),
    "a class of another kind": (["--model=aimc_pl.models.MLP"], "model: aimc_pl.models.MLP is no LightningModule"),
    "numbers as names": ([STRATEGY + "split_at=[1, 2]"], "expected a list of str or cost or null, got [1, 2]"),
    "unknown callback": (["--trainer.callbacks+=Foo"], "trainer.callbacks: expected the name of a class or null, got"),
    "a number as callback": (["--trainer.callbacks=[1]"], "callbacks: expected Callback, got 1"),
    "unknown optimizer": (
        ["--model.init_args.optimizer=Adamm"],
        "model.optimizer: expected the name of a class, got Adamm: did you mean torch.optim.Adam?",
    ),
    "an unknown word as precision": (
        ["--trainer.precision=8"],
        "precision: expected one of 64, 32, 16, transformer-engine,",
    ),
    "a class path to no device": (
        [STRATEGY + "device.class_path=aimc_pl.devices.gold"],
        "strategy.device.class_path: aimc_pl.devices.gold is no class or function that can be imported",
    ),
    "a word as split_at": ([STRATEGY + "split_at=network.3"], "expected a list or cost or null, got network.3"),
    "a thousand stages": (
        [STRATEGY + "num_stages=1000", STRATEGY + "split_at=null"],
        "num_stages=1000 needs 999 submodules for stages to begin at, and Classifier has 12: lower num_stages",
    ),
    "too few classes": (
        ["--model.init_args.num_classes=5"],
        "network returns (10,) numbers per image, and num_classes is",
    ),
    "more labels than classes": (
        ["--model.init_args.num_classes=5", "--model.init_args.network.init_args.sizes=[64,9,9,9,5]"],
        "num_classes=5 is too small for the data, which has the label 9",
    ),
    "an optimizer that Lightning makes": (["--optimizer=SGD"], "by --model.optimizer, not by --optimizer"),
    "too few batches for a validation": (
        ["--trainer.val_check_interval=1000"],
        "(1000) must be less than or equal to the number of the training batches (41)",
    ),
    "an argument of the Trainer": (["--max_epochs=1"], "write --trainer.max_epochs: --max_epochs is an argument of"),
    "a config without a name": (["digits_sync.yaml"], "write --config digits_sync.yaml: a config has no place"),
    "a word as timeout": ([STRATEGY + "timeout=soon"], "trainer.strategy.timeout: expected float, got soon"),
    "a word as number of stages": ([STRATEGY + "num_stages=four"], "strategy.num_stages: expected int, got four"),
    "unknown strategy": (["--trainer.strategy=aimc_fast"], "unknown strategy 'aimc_fast': choose aimc_none, aimc_sync"),
    "a word as learning rate": (["--model.optimizer.lr=fast"], "model.optimizer.lr: expected float or the name of a"),
    "an argument of no strategy": (
        ["--trainer.strategy=auto", "--trainer.strategy.num_stages=3"],
        "give its class before --trainer.strategy.num_stages",
    ),
    "half a stage": ([STRATEGY + "num_stages=4.5"], "trainer.strategy.num_stages: expected int, got 4.5"),
    "no data there": (["--data=aimc_pl.data.MNIST", "--data.init_args.root=nowhere"], "MNIST is not in 'nowhere'"),
    "no images there": (
        ["--data=aimc_pl.data.ImageFolder", "--data.init_args.root=nowhere"],
        "nowhere/train/CLASS/IMAGE",
    ),
    "noise on no layer": (
        [
            "--trainer.callbacks+=aimc_pl.callbacks.DeviceNoise",
            '--trainer.callbacks.noise=[{"class_path": "aimc_pl.callbacks.WriteNoise", "init_args": {"std": 0.1}}]',
            '--trainer.callbacks.layers=["conv*"]',
        ],
        "matches no layer",
    ),
    "unknown backend": (
        ["--trainer.strategy.init_args.device.init_args.backend=exact"],
        "device argument backend='exact' must be Literal['mean_field', 'bits', 'aihwkit'] (see aimc-pl",
    ),
    "a device's argument of another type": (
        [STRATEGY + "device.init_args.tau=high"],
        "device argument tau='high' must be float (see aimc-pl devices)",
    ),
    "a device's argument that is misspelt": (
        [STRATEGY + "device.init_args.taus=3"],
        "device key 'taus' matches no layer: the layers are network.1, network.3, network.5, network.7; did you mean "
        "the argument tau?",
    ),
    "a layer without a device": ([STRATEGY + 'device={"network.1": {}}'], "'network.1' has no device: write null"),
    "a layer's device without a class": (
        [STRATEGY + 'device={"network.1": {"tau": 2}}'],
        "strategy.device: 'network.1' needs a class_path, with tau in its init_args",
    ),
    "a misspelt argument of a layer's device": (
        [STRATEGY + 'device={"network.1": {"class_path": "aimc_pl.devices.soft_bounds", "init_args": {"tua": 2}}}'],
        "soft_bounds has no argument 'tua': did you mean tau?",
    ),
    "a device by its path": ([STRATEGY + "device=aimc_pl.devices.linear_step"], "did you mean 'linear_step'?"),
    "a device of a device by its name": (
        ["--config=residual.yaml"],
        "expected the name of a class or null, got soft_bounds: did you mean aimc_pl.devices.soft_bounds?",
    ),
    "a device of a device by its name, after the config": (
        [STRATEGY + "device=aimc_pl.devices.residual_learning", STRATEGY + "device.init_args.device=soft_bounds"],
        "device='soft_bounds' must be a class_path, such as aimc_pl.devices.soft_bounds, with init_args",
    ),
    "a device of no range": ([STRATEGY + "device.init_args.tau=.nan"], "tau must be a finite number above 0"),
    "an endless timeout": ([STRATEGY + "timeout=.inf"], "timeout must be a finite number above 0"),
    "no timeout": ([STRATEGY + "start_timeout=0"], "start_timeout must be a finite number above 0"),
    "far too many stages": (
        [STRATEGY + "num_stages=1000000000", STRATEGY + "split_at=null"],
        "num_stages must be a whole number of at least 1 and at most 1000",
    ),
    "more micro-batches than samples": (
        [STRATEGY + "num_microbatches=100000"],
        "cannot be split into num_microbatches=100000",
    ),
    "noise out of range": (
        [
            "--trainer.callbacks+=aimc_pl.callbacks.DeviceNoise",
            '--trainer.callbacks.noise=[{"class_path": "aimc_pl.callbacks.WriteNoise", "init_args": {"std": -1}}]',
        ],
        "std must be a finite number of at least 0, got -1",
    ),
    "a picture of no clocks": (
        ["--trainer.callbacks+=aimc_pl.callbacks.PipelineDiagram", "--trainer.callbacks.num_clocks=0"],
        "num_clocks must be a whole number of at least 1",
    ),
    "one class": (["--model.init_args.num_classes=1"], "num_classes must be a whole number of at least 2, got 1"),
    "no learning rate": (["--model.init_args.optimizer.init_args.lr=.nan"], "lr of the optimizer must be a finite"),
    "a negative learning rate": (["--model.init_args.optimizer.init_args.lr=-1"], "Invalid learning rate: -1"),
    "a part of a name": (
        ["--trainer.max_epoch=3"],
        "did you mean --trainer.max_epochs?",
    ),
    "a preset of aihwkit as the device": (
        ["--config=preset.yaml"],
        "ReRamSBPreset is no device: in a config, aimc_pl.devices.ConfiguredDevice takes a configuration of aihwkit",
    ),
    "a preset of aihwkit in the place of a device": (
        ["--trainer.strategy.init_args.device.class_path=aihwkit.simulator.presets.ReRamSBPreset"],
        "ReRamSBPreset is no device: aimc_pl.devices.ConfiguredDevice takes it as rpu_config",
    ),
    "a negative seed": (["--data=aimc_pl.data.PydocText", "--data.seed=-1"], "seed must be a whole number of at least"),
    "no checkpoint there": (["--ckpt_path=nowhere.ckpt"], "cannot read checkpoint nowhere.ckpt: No such file"),
    "a folder as checkpoint": (["--ckpt_path=."], "cannot read checkpoint .: Is a directory"),
    "a text as checkpoint": (["--ckpt_path=text.ckpt"], "text.ckpt is no checkpoint, or only a part of one"),
    "a file as folder of logs": (["--trainer.logger.init_args.save_dir=text.ckpt"], "Not a directory: "),
    "logs where no folder can be made": (["--trainer.logger.init_args.save_dir=/proc/x"], "the run cannot write: "),
    "a file as folder of a run without logs": (
        ["--trainer.logger=false", "--trainer.default_root_dir=text.ckpt"],
        "the run cannot write: File exists: ",
    ),
    "a negative limit of gradients": (
        ["--trainer.gradient_clip_val=-1"],
        "gradient_clip_val must be a finite number of at least 0, got -1",
    ),
    "a validation every 0 epochs": (
        ["--trainer.check_val_every_n_epoch=0"],
        "check_val_every_n_epoch must be a finite number of at least 1, got 0",
    ),
    "a device by its name, with arguments": (
        [STRATEGY + "device={class_path: soft_bounds, init_args: {tau: 3}}"],
        "strategy.device: write class_path: aimc_pl.devices.NAME, such as aimc_pl.devices.soft_bounds, with tau in",
    ),
    "a scheduler of no steps": (
        ["--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr=1"],
        "lr_scheduler cannot be made: You must define either total_steps OR",
    ),
    "a scheduler whose name two classes have": (
        ["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.mode=min"],
        "several classes have the name ReduceLROnPlateau: give the path of one, such as torch.optim.",
    ),
    "a network for vectors of another length": (
        ["--model.network.sizes=[32,9,9,9,10]"],
        "network takes no images of shape (1, 8, 8), which the data has: mm: mat1 and mat2 shapes cannot be",
    ),
    "a network for images of other channels": (
        ["--model.network=aimc_pl.models.ConvNet", STRATEGY + "split_at=null"],
        "network takes no images of shape (1, 8, 8), which the data has: Given groups=1, weight of size",
    ),
    "an interpolation of nothing": (["--config=reference.yaml"], "nowhere.size' not found"),
    "a number as trainer": (["--config=number.yaml"], "node `trainer` is not a container"),
    "one callback without a list, and without pipeline": (
        ["--trainer.callbacks=ClockMonitor", "--trainer.strategy=auto"],
        "ClockMonitor needs a pipeline, but the strategy is SingleDeviceStrategy",
    ),
    "a pipeline's callback without pipeline": (
        ["--trainer.strategy=auto"],
        "ClockMonitor needs a pipeline, but the strategy is SingleDeviceStrategy",
    ),
}


def assert_one_line(text, *parts):
    assert "\n" not in text
    assert len(text) <= 200
    for part in parts:
        assert part in text


PRESET = "{class_path: aihwkit.simulator.presets.ReRamSBPreset}"
FILES = {
    "epoch.yaml": "trainer: {max_epoch: 5}",
    "word.yaml": "trainer: {wxyz: 5}",
    "stage.yaml": "trainer: {strategy: {init_args: {num_stage: 5}}}",
    "list.yaml": "trainer: {strategy: {init_args: [1, 2]}}",
    "rate.yaml": "model: {init_args: {optimiser: {init_args: {lr: 0.1}}}}",
    "device.yaml": "trainer: {strategy: {init_args: {device: {class_path: aimc_pl.devices.soft_bound}}}}",
    "tau.yaml": "trainer: {strategy: {init_args: {device: {init_args: {tua: 1}}}}}",
    "callback.yaml": "trainer: {callbacks: [{class_path: aimc_pl.callbacks.DeviceMonitr}]}",
    "preset.yaml": f"trainer: {{strategy: {{init_args: {{device: {PRESET}}}}}}}",
    "keys.yaml": "trainer: {strategy: {class_path: aimc_pl.strategies.AnalogPipelineStrategy, init_arg: {}}}",
    "part.yaml": "modle: {class_path: aimc_pl.tasks.Classifier}",
    "logger.yaml": "trainer: {logger: [{class_path: aimc_pl.callbacks.RunTabel}]}",
    "folder.yaml": "trainer: {logger: [{class_path: aimc_pl.callbacks.RunTable, init_args: {save_dr: logs}}]}",
    "residual.yaml": (
        "trainer: {strategy: {init_args: {device: {class_path: aimc_pl.devices.residual_learning, init_args: {device: "
        "soft_bounds}}}}}"
    ),
    "text.ckpt": "a letter",
    "number.yaml": "trainer: 5",
    "reference.yaml": "data: {init_args: {batch_size: '${nowhere.size}'}}",
}


OTHER_MISTAKES = {
    "nothing to train": (["fit"], "what to train? Add --config with a file, such as --config digits_async.yaml"),
    "nothing to predict": (
        ["predict"],
        "what to predict? Add --config with a file, such as --config digits_async.yaml",
    ),
    "a config that is nowhere": (
        ["fit", "--config", "digits_asynk.yaml"],
        "config digits_asynk.yaml does not exist: the package has digits_async.yaml",
    ),
    "a config that nothing is like": (["cost", "--config=x.yml"], "config x.yml does not exist"),
    "a sweep over nothing": (["sweep", "nope.yaml", "--grid=seed_everything=[0]"], "config nope.yaml does not exist"),
    "a comparison of nothing": (["compare"], "arguments are required: RUN (see aimc-pl compare --help)"),
    "a sweep without arguments": (["sweep"], "arguments are required: config, --grid (see aimc-pl sweep --help)"),
    "an axis without values": (["sweep", "digits_async.yaml", "--grid=a"], "--grid: must be KEY=[VALUE, ...], got 'a'"),
    "a picture in no folder": (["compare", "x", "--png=nowhere/x.png"], "png=nowhere/x.png cannot be written: there"),
    "a part of a name in compare": (["compare", "x", "--metr=a"], "unrecognized arguments: --metr=a"),
    "a part of a name in schedule": (["schedule", "--num_stage=3"], "unrecognized arguments: --num_stage=3"),
    "a part of a name in cost": (["cost", "--num_mini=3"], "unrecognized arguments: --num_mini=3"),
    "the cost of a bare config": (["cost", "digits_async.yaml"], "write --config digits_async.yaml: a config has no"),
    "hardware that nobody knows": (["cost", "--hardware=gpu"], "unknown hardware 'gpu': choose rasch_2024"),
}


@pytest.mark.parametrize("case", OTHER_MISTAKES)
def test_other_mistakes(case, monkeypatch):
    arguments, message = OTHER_MISTAKES[case]
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert_one_line(stop.value.code, message)
    assert not [*Path().iterdir()]


@pytest.mark.slow
def test_a_new_module_is_evaluated_with_a_remark(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    caplog.set_level("INFO", "lightning.pytorch")
    main(["test", "--config=digits_sync.yaml", "--trainer.logger=false", "--trainer.limit_test_batches=1"])
    assert "--ckpt_path is not set: the weights are those that the module begins with" in caplog.text


@pytest.mark.parametrize(("is_first", "num_nodes"), [(True, 1), (False, 1), (False, 2)])
def test_processes_of_one_machine_print_an_error_once(is_first, num_nodes):
    strategy = AnalogPipelineStrategy(2)
    strategy.processes = SimpleNamespace(is_first=lambda error: is_first)
    cli = AnalogCLI.__new__(AnalogCLI)
    assert not cli._another_process_says(UsageError("before there is a trainer"))
    cli.trainer = SimpleNamespace(strategy=strategy, num_nodes=num_nodes)
    assert cli._another_process_says(UsageError("a")) == (not is_first and num_nodes == 1)


def test_a_step_without_a_loss_is_told_of():
    class Forgets(MLP):
        def training_step(self, batch):
            super().training_step(batch)

    trainer = make_trainer(AnalogPipelineStrategy(2, "async", 2, split_at=["net.4"]), max_epochs=1)
    with pytest.warns(UserWarning, match="training_step returns no loss for this mini-batch, so nothing is updated"):
        trainer.fit(module := Forgets(), loader(module))


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_monitor_that_nothing_logs(callback, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    options = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.logger=false"]
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("fit", "--config=digits_sync.yaml", *options, "--trainer.callbacks=null"),
                *(f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=nope"),
            ]
        )
    assert_one_line(stop.value.code, "nope", "`train/loss`" if callback == "EarlyStopping" else "'train/loss'")


@pytest.mark.slow
def test_a_run_without_logger_leaves_the_config_of_the_current_folder(monkeypatch):
    Path("config.yaml").write_text("trainer: {max_epochs: 1, limit_train_batches: 1}  # mine\n")
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    quiet = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]
    main(["fit", "--config=digits_sync.yaml", "--config=config.yaml", *quiet])
    assert Path("config.yaml").read_text() == "trainer: {max_epochs: 1, limit_train_batches: 1}  # mine\n"
    assert [*Path().iterdir()] == [Path("config.yaml")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.Classifier.configure_optimizers. will be overridden")  # by --optimizer
@pytest.mark.parametrize("case", COMMANDS)
def test_command_line(case, monkeypatch):
    """Check for exit code 1 and one line on standard error, without an update before."""
    arguments, message = COMMANDS[case]
    updates = []
    monkeypatch.setattr(Training, "_update", lambda *args: updates.append(1))
    for name, content in FILES.items():
        Path(name).write_text(content)
    monkeypatch.setattr(Strategy, "optimizer_step", lambda *args, **kwargs: updates.append(1))
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=digits_async.yaml", "--trainer.enable_progress_bar=false", *arguments])
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("aimc-pl: error: ")
    assert_one_line(stop.value.code, message)
    assert "Union" not in stop.value.code
    assert "Namespace" not in stop.value.code
    assert not updates
    assert not [path for path in Path().iterdir() if path.is_dir()]


class Manual(MLP):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(MLP):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class LineSearch(MLP):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class OwnBackward(MLP):
    def backward(self, loss):
        loss.backward()


class TakesAnIterator(MLP):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class Twice(MLP):
    def training_step(self, batch):
        return (self.net(batch[0]) + self.net(-batch[0])).sum()


class Penalty(MLP):
    def training_step(self, batch):
        return self.net(batch[0]).sum() + sum(p.square().sum() for p in self.parameters())


class ReturnsLogits(MLP):
    def training_step(self, batch):
        return self.net(batch[0])


class Frozen(MLP):
    def training_step(self, batch):
        return self.net(batch[0]).detach().sum()


class Tied(MLP):
    def __init__(self):
        super().__init__()
        self.net[4].weight = self.net[2].weight


ASYNC = {"num_stages": 3, "schedule": "async", "num_microbatches": 3}
AT_4_AND_8 = ASYNC | {"split_at": ["net.4", "net.8"]}


class Hasty(Schedule):
    """A schedule in which the backwards of a micro-batch run in all stages at once."""

    def __init__(self, num_stages, num_microbatches):
        super().__init__("async", num_stages, num_microbatches)

    def backward_clock(self, stage, microbatch, num_microbatches=None):
        return super().backward_clock(self.num_stages - 1, microbatch, num_microbatches)


MODULES = {
    "manual optimization": (Manual, ASYNC, {}, "manual optimization"),
    "several optimizers": (TwoOptimizers, ASYNC, {}, "configure_optimizers returns several"),
    "line search under async": (LineSearch, ASYNC, {}, "LBFGS evaluates the loss itself"),
    "line search with crossbars": (
        LineSearch,
        {"num_stages": 2, "schedule": "sync", "device": "soft_bounds"},
        {"precision": "32-true"},
        "LBFGS evaluates the loss between changes of the weights",
    ),
    "line search with crossbars in mixed precision": (
        LineSearch,
        {"num_stages": 1, "schedule": "none", "num_microbatches": 1, "device": "mixed_precision"},
        {"precision": "32-true"},
        "LBFGS evaluates the loss between changes of the weights",
    ),
    "own backward": (OwnBackward, ASYNC, {}, "OwnBackward.backward is overridden"),
    "dataloader_iter": (TakesAnIterator, ASYNC, {}, "cannot be split into micro-batches"),
    "network called twice under async": (Twice, AT_4_AND_8, {}, "is used by stages 0 and 2, which update"),
    "network called twice, measured": (
        Twice,
        ASYNC,
        {},
        "layers that share a parameter count as one, here net.0.weight",
    ),
    "penalty under async": (Penalty, AT_4_AND_8, {}, "is used by stages 0 and 2, which update"),
    "no scalar loss": (ReturnsLogits, ASYNC, {}, "must return the loss"),
    "loss without gradient": (Frozen, ASYNC, {}, "depends on no parameter that requires grad"),
    "tied layers on two stages": (
        Tied,
        ASYNC | {"split_at": ["net.2", "net.4"]},
        {},
        "'net.2.weight' is used by stages 1 and 2",
    ),
    "tied layers on two crossbars": (Tied, ASYNC | {"device": "ideal"}, {"precision": "32-true"}, "share their weight"),
    "scheduled accumulation": (
        MLP,
        ASYNC,
        {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 2})]},
        "contradicts schedule='async'",
    ),
    "microbatch scale of sync": (
        MLP,
        {"schedule": "sync", "gradient_scale": "microbatch"},
        {},
        "gradient_scale='microbatch' needs schedule='async'",
    ),
    "a schedule that is none": (MLP, {"schedule": lambda stages, parts: None}, {}, "schedule= must be a name"),
    "a schedule for others": (MLP, {"schedule": lambda stages, parts: Schedule("sync", 2, 1)}, {}, "num_stages=4"),
    "a schedule out of order": (MLP, {"schedule": Hasty}, {}, "schedule= cannot run: Hasty has B(stage 2, micro-"),
    "duplex of a schedule of one's own": (MLP, {"schedule": Hasty, "duplex": "full"}, {}, "a custom schedule sets"),
    "stashing under sync": (MLP, {"schedule": "sync", "weight_stashing": True}, {}, "weight_stashing needs"),
    "split_at twice": (MLP, {"num_stages": 3, "split_at": ["2", "2"]}, {}, "split_at has '2' twice"),
    "split_at as a string": (MLP, {"num_stages": 2, "split_at": "4"}, {}, "split_at is a list"),
    "device key without layer": (MLP, ASYNC | {"device": {"fc": "ideal"}}, {}, "device key 'fc' matches no layer"),
    "a number as device": (MLP, ASYNC | {"device": {"*": 3.0}}, {}, "unknown device 3.0: 'aimc-pl devices' lists"),
    "device per stage without split": (MLP, ASYNC | {"device": {0: "ideal"}}, {}, "needs split_at"),
    "noise on an unknown layer": (
        MLP,
        ASYNC,
        {"callbacks": [DeviceNoise([WriteNoise(0.1)], layers=["conv*"])]},
        "matches no layer",
    ),
    "noise on an unknown stage": (
        MLP,
        ASYNC,
        {"callbacks": [DeviceNoise([WriteNoise(0.1)], stages=[7])]},
        "matches no layer",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case, monkeypatch):
    make, strategy, options, message = MODULES[case]
    updates = []

    def step(optimizer, *args, **kwargs):
        # Layers are measured on copies, which may be updated.
        own = {id(parameter) for parameter in module.parameters()}
        updates.extend(p for group in optimizer.param_groups for p in group["params"] if id(p) in own)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    precision = options.get("precision", "64-true")
    module = make().to(torch.float64 if precision == "64-true" else torch.float32)
    data = loader(module, shuffle=False)
    with pytest.raises(UsageError) as error:
        make_trainer(AnalogPipelineStrategy(**strategy), **options).fit(module, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not updates


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(8, 6), torch.zeros(7)), "along the first dimension"),
        ({"n": 3}, "along the first dimension"),
    ],
)
def test_batches(batch, message):
    data = DataLoader([batch], batch_size=None)
    with pytest.raises(UsageError, match=message):
        make_trainer(AnalogPipelineStrategy(3)).fit(MLP().double(), data)


NAN, INF = float("nan"), float("inf")
STRANGE = (NAN, INF, -INF, "1", None, True)
"""Values that are not valid numbers."""
NEGATIVE = (-1, -1e-9, *STRANGE)
HALVES = (1.5, *STRANGE)

DEVICE = {"num_states": (1, 0, -5, 10**12, *HALVES), "cycle_to_cycle": NEGATIVE, "device_to_device": NEGATIVE}
GPT_SIZES = {"vocab_size": 11, "num_layers": 1, "width": 8, "num_heads": 2, "context": 7}
NOISE = [WriteNoise(0.1)]


def noise(*args, **kwargs):
    return DeviceNoise(NOISE, *args, **kwargs)


def gpt(**kwargs):
    return GPT(**GPT_SIZES | kwargs)


def pictures(num_pulses=10, num_devices=2):
    return plot_response(get_device("soft_bounds"), "", num_pulses, num_devices)


RANGES = [
    (soft_bounds, DEVICE | {"tau": (0, 1e12, *NEGATIVE), "write_noise": NEGATIVE, "perfect_io": ("no", 1)}),
    (soft_bounds_reference, {"tau": (0, NAN, INF), "num_states": (1, 2.5), "write_noise": (-1, NAN)}),
    (
        constant_step,
        {"w_max": (0, -1, NAN, INF, "1"), "device_to_device": (-0.1,), "backend": ("fast", 3, None, ["bits"])},
    ),
    (linear_step, {"gamma": (5, 1.01, *NEGATIVE), "w_max": (0, INF), "num_states": (1,)}),
    (tiki_taka, {"material": ("Gold", 3, None)}),
    (WriteNoise, {"std": NEGATIVE}),
    (ReadNoise, {"std": NEGATIVE}),
    (DeviceVariation, {"std": NEGATIVE}),
    (partial(Drift, nu=0.1), {"nu": NEGATIVE, "t0": (0, *NEGATIVE)}),
    (partial(StuckAt, fraction=0.1), {"fraction": (1.5, *NEGATIVE), "value": STRANGE}),
    (
        noise,
        {
            "stages": ("0", 3, [-1], [0.5], [True]),
            "layers": ("conv*", [3], 3),
            "from_step": (-1, *HALVES),
            "until_step": (-1, NAN, 1.5, "9"),
            "seed": (-1, 2**32, *HALVES),
        },
    ),
    (DeviceNoise, {"noise": ([], "WriteNoise", [0.1], 3)}),
    (StalenessMonitor, {"cosine": ("no", 1, None)}),
    (PipelineDiagram, {"num_clocks": (0, -3, 10**9, 1.5, NAN, "9", True)}),
    (
        AnalogPipelineStrategy,
        {
            "num_stages": (0, -1, 10**9, *HALVES),
            "num_microbatches": (0, -1, 10**9, *HALVES),
            "schedule": ("fast", 3, None),
            "duplex": ("both", 2, None),
            "gradient_scale": ("none", 1, None),
            "loss_reduction": ("max", None),
            "weight_stashing": ("no", 1),
            "verify": ("no", None),
            "on_nonfinite": ("ignore", 1, None),
            "split_at": ("4", 4, [1, 2, 3], {"a": 1}, ["net.1"]),
            "microbatch_weight": (3, "len"),
            "split_batch": (3, "chunk"),
            "timeout": (0, 1e12, *NEGATIVE),
            "start_timeout": (0, 1e12, *NEGATIVE),
        },
    ),
    (
        partial(AnalogPipelineStrategy, schedule=partial(Schedule, "async")),
        {"num_stages": (0, 1.5, 10**9, "4"), "num_microbatches": (0, 1.5, 10**9, NAN), "duplex": ("full",)},
    ),
    (
        Digits,
        {
            "batch_size": (0, -1, *HALVES),
            "val_fraction": (0, 1, 1.5, *NEGATIVE),
            "augment": ("no", 1),
            "drop_last": ("no", None),
            "split_seed": (-1, 2**32, *HALVES),
            "num_workers": (-1, 10**6, *HALVES),
        },
    ),
    (MNIST, {"root": (3, None), "download": ("no", 1)}),
    (partial(ImageFolder, root="."), {"root": (3, None), "image_size": (0, -1, 10**6, *HALVES)}),
    (
        PydocText,
        {
            "batch_size": (0, 1.5, NAN),
            "context": (0, -1, *HALVES),
            "val_fraction": (0, 0.95, 1, *NEGATIVE),
            "test_fraction": (0, 0.95, 1, *NEGATIVE),
            "seed": (-1, 2**32, *HALVES),
        },
    ),
    (models.MLP, {"sizes": ([4], [], "4, 2", 4, [4, 0], [4, -1, 2], [4, 1.5], [4, True])}),
    (partial(models.MLP, [4, 2]), {"activation": (3, "Tanh")}),
    (LeNet5, {"num_classes": (0, *HALVES)}),
    (ResNet, {"depth": (9, 2, 0, -4, 8.0, "20"), "num_classes": (0, -1), "width": (0, 1.5)}),
    (gpt, dict.fromkeys(GPT_SIZES, (0, -1, 1.5, NAN)) | {"width": (7,), "dropout": (1.5, *NEGATIVE)}),
    (
        partial(Classifier, torch.nn.Linear(4, 2)),
        {"num_classes": (1, 0, *HALVES), "optimizer": ("Adam", 0.1), "lr_scheduler": (3,)},
    ),
    (Classifier, {"network": ("MLP", None)}),
    (LanguageModel, {"network": ("GPT", torch.nn.Linear)}),
    (partial(convert_to_analog, device="soft_bounds"), {"network": (5, None, torch.nn.Linear)}),
    (make_analog_aware, {"optimizer": (5, None, torch.optim.SGD)}),
    (to_digital, {"module": (5, None, "x.ckpt", torch.nn.Linear)}),
    (partial(evaluate_drift, metric=len), {"module": (5, None, "x.ckpt")}),
    (partial(evaluate_drift, models.MLP([4, 2])), {"metric": ("accuracy", 0.9, lambda module: "x")}),
    (partial(evaluate_drift, models.MLP([4, 2]), lambda module: 0.5), {"times": ([], 5, "1", [-1], [NAN])}),
    (phase_change_memory, {"g_max": (0, *NEGATIVE)}),
    (draw_drift, {"rows": (5, [], [{}], [1])}),
    (partial(load_checkpoint, checkpoint_path="x"), {"module": (5, None, "x.ckpt", torch.nn.Linear)}),
    (partial(load_checkpoint, torch.nn.Linear(4, 2)), {"checkpoint_path": (5, None, torch.nn.Linear(4, 2))}),
    (
        partial(load_from_checkpoint, checkpoint_path="x"),
        {"module_class": (5, None, torch.nn.Linear, Classifier(torch.nn.Linear(4, 2)))},
    ),
    (partial(load_from_checkpoint, Classifier), {"checkpoint_path": (5, None)}),
    (history, {"run": (5, None, [])}),
    (compare, {"runs": (5, None, "logs", [5], Path())}),
    (draw_runs, {"runs": (5, None, [[{"step": 1}]])}),
    (partial(draw_text, num_microbatches=4), {"schedule": (5, "async")}),
    (partial(draw_figure, Schedule("async", 2, 2), 2), {"num_clocks": (0, -1, *HALVES[:4])}),
    (partial(draw_figure, Schedule("async", 2, 2)), {"num_microbatches": (0, -1, *HALVES)}),
    (pictures, {"num_pulses": (0, -1, 10**9, *HALVES), "num_devices": (0, 10**9, 1.5)}),
]

CASES = [
    pytest.param(
        make,
        name,
        value,
        id=f"{getattr(make, '__name__', 'partial')}-{name}-{getattr(value, '__name__', repr(value)):.30}",
    )
    for make, arguments in RANGES
    for name, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("make", "name", "value"), CASES)
def test_ranges(make, name, value):
    """Check that the message names the argument, and also its value if that is short."""
    with pytest.raises(UsageError) as error:
        make(**{name: value})
    told = repr(value) if isinstance(value, float | int | str | None) else ""
    assert_one_line(str(error.value), name, "" if name == "split_at" else told)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_bounds(tau=NAN), "tau must be a finite number above 0 and at most 1000000000, got nan"),
        (lambda: soft_bounds(num_states=1), "num_states must be a whole number of at least 2 and"),
        (lambda: soft_bounds(num_states=10**400), "num_states must be a whole number"),
        (lambda: constant_step(cycle_to_cycle=-1), "cycle_to_cycle must be a finite number of at least 0, got -1"),
        (lambda: constant_step(w_max=torch.ones(9, 9)), "w_max must be a finite number above 0"),
        (lambda: soft_bounds(backend="exact"), "unknown backend 'exact': choose one of mean_field, bits, aihwkit"),
        (
            lambda: tiki_taka(soft_bounds()),
            "TikiTaka takes the name of a material, got soft_bounds(): residual_learning, chop",
        ),
        (lambda: tiki_taka("Gold"), "unknown material 'Gold': choose one of ReRamES"),
        (lambda: get_device("mram"), "unknown device 'mram'"),
        (lambda: get_device(soft_bounds), "call the function 'soft_bounds': device=soft_bounds()"),
        (lambda: ResNet(9), "a CIFAR ResNet has 6n+2 layers"),
        (lambda: models.MLP([4]), "an MLP needs at least an input and an output size"),
        (lambda: DeviceNoise([]), "at least one kind"),
        (lambda: find_hardware(5), "hardware must be a path, got 5"),
        (lambda: noise(from_step=9, until_step=8), "until_step must be a whole number of at least 9, got 8"),
        (lambda: noise(layers="conv*"), "layers is a list of patterns of layer names, got the string 'conv*'"),
        (lambda: PydocText(val_fraction=0.5, test_fraction=0.5), "val_fraction=0.5 and test_fraction=0.5 leave no"),
        (lambda: AnalogPipelineStrategy(timeout="x" * 999), "timeout must be a finite number above 0"),
        (lambda: AnalogPipelineStrategy(schedule="sync", duplex="full"), "duplex='full' is for schedule='async'"),
        (lambda: AnalogPipelineStrategy(split_at="net"), "split_at is a list of module names, got the string 'net'"),
        (lambda: AnalogPipelineStrategy(3, split_at=["net"]), "num_stages=3 needs 2 names in split_at, got 1"),
        (
            lambda: AnalogPipelineStrategy(gradient_scale="microbatch", microbatch_weight=len),
            "gradient_scale='microbatch' makes every micro-batch count fully: drop microbatch_weight",
        ),
        (
            lambda: AnalogPipelineStrategy(loss_reduction="sum", microbatch_weight=len),
            "microbatch_weight is for losses that are means: loss_reduction='sum' needs no weights",
        ),
    ],
)
def test_constructors(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert_one_line(str(error.value), message)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "sync"},
        {"schedule": "sync", "loss_reduction": "sum"},
        {"schedule": "1f1b", "microbatch_weight": len},
        {"gradient_scale": "microbatch"},
        {"gradient_scale": "microbatch", "loss_reduction": "sum", "weight_stashing": True},
        {"schedule": partial(Schedule, "async"), "num_stages": 1, "num_microbatches": 1, "split_at": []},
    ],
)
def test_options_that_do_not_exclude_each_other(options):
    strategy = AnalogPipelineStrategy(**options)
    assert (strategy.schedule.num_stages, strategy.schedule.num_microbatches) == (
        options.get("num_stages", 4),
        options.get("num_microbatches", 4),
    )


def test_numbers_of_numpy_are_numbers():
    """Check that numpy's numbers, whole numbers where floats are wanted, and the ends of ranges are accepted."""
    soft_bounds(tau=np.float32(0.5), num_states=np.int32(2), cycle_to_cycle=0)
    linear_step(gamma=0)
    linear_step(gamma=1)
    StuckAt(1)
    noise(from_step=3, until_step=3)


@pytest.mark.parametrize("rate", [-0.1, NAN, INF])
def test_learning_rates(rate):
    model = Classifier(models.MLP([4, 2]), 2, lambda parameters: torch.optim.SGD(parameters, lr=rate))
    with pytest.raises(UsageError) as error:
        model.configure_optimizers()
    assert_one_line(str(error.value), "optimizer")


def make_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), "red").save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: cut(root / "test/a/1.png"), "test/a/1.png is no image that can be read"),
        (lambda root: (root / "train/b/2.png").write_text("no image"), "train/b/2.png is no image that can be read"),
        (lambda root: (root / "train/b/2.png").write_bytes(b""), "train/b/2.png is no image that can be read"),
        (lambda root: make_images(root, "test/c/1.png"), "has class 'c' in test only"),
        (lambda root: make_images(root, "train/0/1.png"), "has class '0' in train only"),
        (lambda root: (root / "train/empty").mkdir(), "/train/CLASS/IMAGE"),
        (lambda root: (root / "test").rename(root / "tests"), "/test/CLASS/IMAGE"),
        (lambda root: (root / "train").rename(root / "test/train"), "/train/CLASS/IMAGE"),
    ],
)
def test_image_folders(spoil, message):
    root = Path("images")  # The name is short because the length of the message is checked.
    make_images(root, *(f"{part}/{name}/{n}.png" for part in ("train", "test") for name in "ab" for n in range(3)))
    data = ImageFolder(root)
    data.load()
    spoil(root)
    with pytest.raises(UsageError) as error:
        data.setup("fit")
    assert_one_line(str(error.value), message)


@pytest.mark.parametrize(("count", "message"), [(1, "val_fraction=0.5 of 1 images leaves none to train on")])
def test_too_few_images(count, message):
    make_images(Path("few"), *(f"{part}/a/{n}.png" for part in ("train", "test") for n in range(count)))
    with pytest.raises(UsageError) as error:
        ImageFolder("few", val_fraction=0.5).setup("fit")
    assert_one_line(str(error.value), message)


def test_data_sets_that_are_damaged():
    """Check MNIST's files with other contents."""
    folder = Path("MNIST/raw")
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            (folder / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError) as error:
        MNIST(".").setup("fit")
    assert_one_line(str(error.value), "MNIST is not in '.'")


CONFIGS = {
    "a key twice": ("trainer:\n  max_epochs: 1\n  max_epochs: 2\n", "has 'max_epochs' twice, in lines 2 and 3"),
    "a key twice in a line": ("trainer: {max_epochs: 1, max_epochs: 2}", "has 'max_epochs' twice, in lines 1 and 1"),
    "a key twice in a list": ("a:\n- {b: 1}\n- c: 1\n  c: 1\n", "has 'c' twice, in lines 3 and 4"),
    "a bracket is open": ("trainer: {callbacks: [1, 2", "is not YAML in line 1"),
    "a tab": ("trainer:\n\tmax_epochs: 1\n", "is not YAML in line 2"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML in line 2"),
    "prose": ("Two " * 99, "must have lines NAME: VALUE, got 'Two"),
    "a list": ("[1, 2]", "must have lines NAME: VALUE, got a list"),
    "nothing": ("", "must have lines NAME: VALUE, got nothing"),
    "a picture": (b"\x89PNG\r\n\xff\xff", "cannot be read as text"),
    "an odd character": ("a: \x01", "is not YAML"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_files(case):
    content, message = CONFIGS[case]
    path = Path("own.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        check_config(path)
    assert_one_line(str(error.value), "config own.yaml", message)


def test_shipped_configs_are_good():
    shipped = sorted(Path(configs.__path__[0]).glob("*.yaml"))
    assert len(shipped) >= 8
    for path in shipped:
        check_config(path)


def test_aliases_are_followed_once():
    Path("own.yaml").write_text("a: &a {b: &b [1], c: *b}\nd: *a\ne: &e {f: *e}\n")
    check_config(Path("own.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "--num_stages=0"], "num_stages must be"),
        (["schedule", "--schedule=zigzag"], "zigzag"),
        (["schedule", "--schedule=sync", "--duplex=full"], "duplex='full' is for"),
        (["devices", "--name=gold"], "unknown device 'gold'"),
        (["devices", "--png=x.png"], "which device"),
        (
            ["devices", "soft_bounds", "--num_pulses=99999"],
            "num_pulses must be a whole number of at least 1 and at most",
        ),
        (["devices", "--name=ideal", "--png=x.png"], "not updated by pulses"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--config=own.yaml"], "config own.yaml has 'a' twice, in lines 1 and 2"),
        (["fit", "--config", "."], "not a file"),
        (["train"], "train"),
        (["schedule", "--num_stages=many"], "num_stages: expected int, got many"),
        (["schedule", "--num_stages=1000000000"], "num_stages must be a whole number of at least 1 and at most"),
        (["schedule", "--num_microbatches=1000000000"], "num_microbatches must be a whole number of at least 1 and at"),
        (["schedule", "--num_microbatches=90000"], "num_stages=4 and num_microbatches=90000 take more than"),
        (["schedule", "--num_microbatches=-1"], "num_microbatches must be"),
        (["schedule", "--duplex=both"], "duplex"),
        (["schedule", "--png=nowhere/x.png"], "png=nowhere/x.png cannot be written: there is no folder nowhere"),
        (["schedule", "--png=."], "png=. is a folder: add the name of a file"),
        (["schedule", "--png=x"], "png=x must end in .png"),
        (["schedule", "--png=own.yaml/x.png"], "there is no folder own.yaml"),
        (["devices", "--name=soft_bounds", "--png=nowhere/x.png"], "png=nowhere/x.png cannot be written"),
        (["devices", "--name=soft_bounds", "--png=x.docx"], "png=x.docx must end in .png"),
        (["devices", "--name=soft_bounds", "--png=x.png", "--num_pulses=0"], "num_pulses must be a whole number of"),
        (
            ["devices", "--name=soft_bounds", "--png=x.png", "--num_pulses=1000000000"],
            "num_pulses must be a whole number",
        ),
        (["devices", "--name=soft_bounds", "--png=x.png", "--num_pulses=nan"], "num_pulses: expected int, got nan"),
    ],
)
def test_other_commands(arguments, message, monkeypatch):
    Path("own.yaml").write_text("a: 1\na: 2\n")
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert_one_line(str(stop.value.code), "aimc-pl: error: ", message)
    assert [path.name for path in Path().iterdir()] == ["own.yaml"]
