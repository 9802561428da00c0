"""These tests run the command: every config, on random images where data would be downloaded, and overrides."""

import ast
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib import metadata
from inspect import getdoc, signature
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from aihwkit.simulator.presets import ReRamSBPreset
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.pyplot import imread

import aimc_pl.configs
import aimc_pl.training_cli
from aimc_pl.callbacks import ClockMonitor
from aimc_pl.cli import COMMANDS, ELSEWHERE, TRAINING, device_functions, main
from aimc_pl.config_files import with_kept_strategies
from aimc_pl.devices import DEVICES, get_device
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy

CONFIGS = sorted(path.name for folder in aimc_pl.configs.__path__ for path in Path(folder).glob("*.yaml"))


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aimc-pl"])
        main(list(arguments))

    return run


class Fake:
    """Random images in place of a data set that would be downloaded."""

    def __init__(self, root, train, download):
        generator = torch.Generator().manual_seed(int(train))
        shape = (600, 28, 28) if type(self).__name__ == "MNIST" else (600, 32, 32, 3)
        self.data = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
        self.targets = torch.randint(0, 10, (600,), generator=generator)


def has_colours(path):
    """Return whether an image has more than black on white."""
    red, green, _, _ = imread(path).reshape(-1, 4).T
    return (abs(red - green) > 0.1).mean() > 0.01


def test_there_are_configs():
    assert {f"digits_{schedule}.yaml" for schedule in ("none", "sync", "async")} <= set(CONFIGS)
    assert len(CONFIGS) >= 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:one update has made")  # the images are random and the batches small
@pytest.mark.filterwarnings("ignore:splitting the mini-batch changes its loss")  # because of BatchNorm
@pytest.mark.filterwarnings("ignore:BatchNorm computes its statistics per micro-batch")  # some networks have BatchNorm
@pytest.mark.parametrize("config", CONFIGS)
def test_config_runs(config, command, monkeypatch, capsys):
    """Check two steps on the real digits, or on random images in place of data that would be downloaded."""
    for name in ("MNIST", "CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, type(name, (Fake,), {}))
    options = ["--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false"]
    if "resnet" in config:
        options.append("--data.init_args.batch_size=16")
    if "resnet34" in config:  # its usual batch is meant for a GPU
        options += ["--trainer.fast_dev_run=1", "--trainer.strategy.init_args.num_microbatches=2"]
    command("fit", "--config", config, *options)
    printed = capsys.readouterr().out
    assert "test/loss" in printed
    assert "in clock cycles over no pipeline" in printed


@pytest.mark.slow
def test_digits_fit_report_and_test_the_checkpoint(command, capsys):
    # Floating-point tiles compute the same products every time.
    options = ("--config=digits_async.yaml", "--trainer.strategy.init_args.device=ideal")
    command("fit", *options, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false")
    printed = capsys.readouterr().out
    # What the run was is beside its events, overrides included.
    saved, logged = (
        yaml.safe_load(Path(f"logs/digits_async/version_0/{name}.yaml").read_text()) for name in ("config", "hparams")
    )
    assert saved["trainer"]["max_epochs"] == logged["trainer"]["max_epochs"] == 2
    assert saved["trainer"]["strategy"]["init_args"]["device"] == "ideal"
    # There are 41 mini-batches of 4 micro-batches, the last with 13 samples: 2 epochs of 2·164 + 6 cycles.
    assert "668 simulated clock cycles on 4 accelerators" in printed
    assert "tensorboard --logdir logs/digits_async" in printed.replace("\n", "")
    (checkpoint,) = Path("logs/digits_async").glob("version_0/checkpoints/last.ckpt")
    accuracy = next(line.split()[1] for line in printed.splitlines() if line.startswith("test/accuracy"))
    command("test", *options, f"--ckpt_path={checkpoint}", "--trainer.logger=false")
    assert accuracy[:5] in capsys.readouterr().out
    command("predict", *options, f"--ckpt_path={checkpoint}", "--trainer.logger=false")


@pytest.mark.slow
def test_a_new_process_tests_analog_layers_of_a_checkpoint(command, capsys):
    options = ("--config=digits_async.yaml", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
    command("fit", *options, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test/accuracy")).split()
    arguments = ["test", *options, "--ckpt_path=logs/digits_async/version_0/checkpoints/last.ckpt"]
    script = [sys.executable, "-c", f"from aimc_pl.cli import main; main({arguments})"]
    ended = subprocess.run(script, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert accuracy[1][:5] in ended.stdout


@pytest.mark.slow
def test_resume_from_the_command_line(command, monkeypatch):
    clocks = []
    monkeypatch.setattr(ClockMonitor, "report", lambda self: clocks.append(self.cycles) or "")
    options = ("--config=digits_sync.yaml", "--trainer.enable_progress_bar=false")
    command("fit", *options, "--trainer.max_epochs=1")
    command("fit", *options, "--trainer.max_epochs=2", "--ckpt_path=logs/digits_sync/version_0/checkpoints/last.ckpt")
    assert clocks == [41 * 14, 2 * 41 * 14]
    command("fit", *options, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert clocks[2] == 3 * 41 * 14
    assert Path("logs/digits_sync/version_2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "page"), [("[{class_path: aimc_pl.callbacks.Dashboard}]", "#custom_scalars"), ("[]", "")]
)
def test_a_run_names_the_page_of_tensorboard_that_has_charts(callbacks, page, command, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **others: None)
    command("fit", "--config=digits_async.yaml", "--test_after_fit=false", f"--trainer.callbacks={callbacks}")
    assert capsys.readouterr().out.endswith(f"and open http://localhost:6006/{page}\n")


@pytest.fixture
def given_checkpoints(monkeypatch):
    """The ``ckpt_path`` that the Trainer gets from the command, which runs nothing."""
    given = []
    for name in TRAINING:
        monkeypatch.setattr(Trainer, name, lambda self, ckpt_path=None, **others: given.append(ckpt_path))
    monkeypatch.setattr(aimc_pl.training_cli.AnalogCLI, "after_fit", lambda self: None)
    return given


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", TRAINING)
def test_the_last_checkpoint_is_that_of_an_earlier_run_of_the_same_name(subcommand, command, given_checkpoints, caplog):
    for time, name in enumerate(("digits_async/version_0", "digits_async/version_1", "digits_sync/version_0")):
        path = Path(f"logs/{name}/checkpoints/last.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    before = sorted(Path().rglob("*"))
    options = ("--config=digits_async.yaml", "--ckpt_path=last", "--trainer.enable_progress_bar=false")
    command(subcommand, *options)
    command(subcommand, *options, "--trainer.fast_dev_run=true")
    assert given_checkpoints == [Path("logs/digits_async/version_1/checkpoints/last.ckpt")] * 2
    fresh = "--trainer.logger=[{class_path: aimc_pl.callbacks.RunTable, init_args: {save_dir: logs, name: fresh}}]"
    with caplog.at_level("INFO"):
        if subcommand == "fit":
            command(subcommand, *options, fresh)
            assert given_checkpoints[2:] == [None]
            assert "no earlier run of this name has left a last.ckpt, so training begins anew" in caplog.text
        else:
            with pytest.raises(
                SystemExit, match="error: --ckpt_path last: no earlier run of this name has left a"
            ) as stop:
                command(subcommand, *options, fresh)
            assert len(stop.value.code) <= 200
            assert len(given_checkpoints) == 2
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "place"),
    [
        (["--trainer.logger=false"], "checkpoints"),
        (["--trainer.logger=false", "--trainer.default_root_dir=elsewhere"], "elsewhere/checkpoints"),
        (
            ["--trainer.logger={class_path: aimc_pl.callbacks.RunTable, init_args: {save_dir: a, version: ''}}"],
            "a/*/checkpoints",
        ),
        (["--trainer.callbacks={class_path: ModelCheckpoint, init_args: {dirpath: own}}"], "own"),
        (["--trainer.callbacks={class_path: ModelCheckpoint, init_args: {dirpath: 'memory://own'}}"], None),
    ],
)
def test_the_last_checkpoint_is_where_lightning_saves_it(options, place, command, given_checkpoints):
    """Check checkpoints elsewhere than in a folder of a run, and those that only Lightning can find."""
    path = Path((place or "").replace("*", "lightning_logs"), "last.ckpt")
    if place:
        path.parent.mkdir(parents=True)
        path.touch()
    command("test", "--config=digits_async.yaml", "--ckpt_path=last", *options)
    (given,) = given_checkpoints
    assert (Path(given).absolute() == path.absolute()) if place else (given == "last")


@pytest.mark.slow
def test_the_best_checkpoint_is_what_the_newest_run_says(command, given_checkpoints):
    """Check two runs, of which the newest has several checkpoints, a renamed folder, and a best one that is gone."""

    def save(run, step, best, time):
        path = Path(f"logs/digits_async/{run}/checkpoints/step={step}.ckpt")
        path.parent.mkdir(parents=True, exist_ok=True)
        states = {"EarlyStopping{}": {}, "ModelCheckpoint{'monitor': 'a'}": {"best_model_path": best}}
        torch.save({"callbacks": states | {"ModelCheckpoint{'monitor': 'b'}": {"best_model_path": "other"}}}, path)
        os.utime(path, (time, time))
        return path

    options = ("--config=digits_async.yaml", "--ckpt_path=best", "--trainer.enable_progress_bar=false")
    refusal = "--ckpt_path best: no earlier run of this name has left a best checkpoint: give the path of a checkpoint"
    with pytest.raises(SystemExit, match=refusal) as stop:
        command("test", *options)
    assert len(stop.value.code) <= 200
    save("version_0", 1, "logs/digits_async/version_0/checkpoints/step=1.ckpt", 1)
    best = save("version_1", 2, "logs/digits_async/version_1/checkpoints/step=2.ckpt", 2)
    save("version_1", 3, str(best), 3)
    command("test", *options)
    Path("logs/digits_async/version_1").rename("logs/digits_async/renamed")
    command("predict", *options)
    assert given_checkpoints == [best, Path("logs/digits_async/renamed/checkpoints/step=2.ckpt")]
    given_checkpoints[1].unlink()
    with pytest.raises(SystemExit, match=refusal):
        command("fit", *options)
    assert len(given_checkpoints) == 2


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", TRAINING)
def test_only_a_fit_warns_that_the_folder_of_a_checkpoint_is_not_its_own(subcommand, command, monkeypatch):
    def load(self, **others):
        ModelCheckpoint(dirpath="a").load_state_dict(ModelCheckpoint(dirpath="b").state_dict())

    for name in TRAINING:
        monkeypatch.setattr(Trainer, name, load)
    monkeypatch.setattr(aimc_pl.training_cli.AnalogCLI, "after_fit", lambda self: None)
    filters = [*warnings.filters]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command(subcommand, "--config=digits_async.yaml", "--trainer.enable_progress_bar=false")
    changed = [warning for warning in caught if str(warning.message).startswith("The dirpath has changed from")]
    assert len(changed) == (subcommand == "fit")
    assert warnings.filters == filters


def test_shipped_configs_are_found_by_their_bare_names_only(command, monkeypatch):
    seen = []
    monkeypatch.setattr(aimc_pl.training_cli, "AnalogCLI", lambda: seen.append(sys.argv[1:]))
    (shipped,) = (Path(folder) / "digits_async.yaml" for folder in aimc_pl.configs.__path__)
    Path("own").mkdir()
    Path("own/digits_async.yaml").write_text("note: this file has a folder of its own")
    command("fit", "--config", "digits_async.yaml")
    command("fit", "-c", "digits_async.yaml")
    command("fit", "-c=digits_async.yaml")
    command("fit", "--config=digits_async.yaml", "--trainer.logger.save_dir=out/digits_async.yaml")
    command("fit", "--trainer.logger.save_dir", "digits_async.yaml", "--config", "own/digits_async.yaml")
    assert seen == [
        ["fit", "--config", str(shipped)],
        ["fit", "-c", str(shipped)],
        ["fit", f"-c={shipped}"],
        ["fit", f"--config={shipped}", "--trainer.logger.save_dir=out/digits_async.yaml"],
        ["fit", "--trainer.logger.save_dir", "digits_async.yaml", "--config", "own/digits_async.yaml"],
    ]
    Path("digits_async.yaml").write_text("note: a file of one's own comes first")
    command("fit", "--config", "digits_async.yaml")
    assert seen[-1] == ["fit", "--config", "digits_async.yaml"]


def test_a_config_that_is_nowhere_is_one_line(command):
    with pytest.raises(SystemExit) as stop:
        command("fit", "--config", "wrong_folder/digits_async.yaml")
    assert str(stop.value).startswith("aimc-pl: error: ")
    assert "wrong_folder/digits_async.yaml" in str(stop.value)


@pytest.mark.slow
def test_interpolated_and_overridden_values_arrive(command, monkeypatch):
    seen = {}

    def look(self, trainer):
        seen["rate"] = self.lr_scheduler_configs[0].scheduler.T_max
        seen["device"] = self.device["*"].rpu_config.device.w_max
        raise KeyboardInterrupt

    monkeypatch.setattr(AnalogPipelineStrategy, "setup_precision_plugin", lambda self: look(self, None))
    for name in ("CIFAR10",):
        monkeypatch.setattr(torchvision.datasets, name, type(name, (Fake,), {}))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command(
            "fit",
            "--config=resnet_cifar10_async.yaml",
            "--trainer.max_epochs=7",
            '--trainer.strategy.init_args.device={"*": {"class_path": "aimc_pl.devices.soft_bounds", '
            '"init_args": {"tau": 0.35}}}',
        )
    assert seen == {"rate": 7, "device": 0.35}


@pytest.mark.slow
def test_a_config_names_a_configuration_of_aihwkit(command, monkeypatch):
    """Check a device of aihwkit in the place of the device that an earlier config has set up."""
    devices = []

    def stop(self):
        devices.append(self.device)
        raise KeyboardInterrupt

    monkeypatch.setattr(AnalogPipelineStrategy, "setup_precision_plugin", stop)
    preset = {"class_path": "aihwkit.simulator.presets.ReRamSBPreset"}
    device = {"class_path": "aimc_pl.devices.ConfiguredDevice", "init_args": {"rpu_config": preset}}
    Path("device.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": {"init_args": {"device": device}}}}))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command("fit", "--config", "digits_async.yaml", "--config", "device.yaml")
    assert [type(get_device(device)) for device in devices] == [ReRamSBPreset]


PATH = "aimc_pl.strategies.AnalogPipelineStrategy"
NAMED = f'--trainer.strategy={{"class_path": "{PATH}"}}'
OTHER = "lightning.pytorch.strategies.DDPStrategy"
SCHEDULE = "--trainer.strategy.init_args.schedule="
SET_UP = ["--config=full.yaml"]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        ([*SET_UP, "--trainer.strategy=aimc_sync"], [*SET_UP, SCHEDULE + "sync"]),
        ([*SET_UP, "--trainer.strategy", "aimc_1f1b", "--x"], [*SET_UP, SCHEDULE + "1f1b", "--x"]),
        (["-c", "short.yaml", "--trainer.strategy=aimc_none"], ["-c", "short.yaml", SCHEDULE + "none"]),
        (["--trainer.strategy", "aimc_sync"], [NAMED, SCHEDULE + "sync"]),
        (["--trainer.strategy", PATH], [NAMED]),
        (["--trainer.strategy=AnalogPipelineStrategy"], [NAMED]),
        ([*SET_UP, f"--trainer.strategy={PATH}", "--x"], [*SET_UP, "--x"]),
        (["--config", "path.yaml"], ["--config", "path.yaml", NAMED]),
        ([f"--trainer.strategy={OTHER}"], [f'--trainer.strategy={{"class_path": "{OTHER}"}}']),
        ([NAMED, "--trainer.strategy=aimc_sync"], [NAMED, SCHEDULE + "sync"]),
        (["--trainer", "{strategy: aimc_sync}"], ["--trainer", "{strategy: aimc_sync}", NAMED, SCHEDULE + "sync"]),
        (["--config", "named.yaml", "--x"], ["--config", "named.yaml", NAMED, SCHEDULE + "async", "--x"]),
        (
            ["--config=named.yaml", "--trainer.strategy=aimc_sync"],
            ["--config=named.yaml", NAMED, SCHEDULE + "async", SCHEDULE + "sync"],
        ),
        (["--config=other.yaml", "--trainer.strategy=aimc_sync"], ["--config=other.yaml", NAMED, SCHEDULE + "sync"]),
        (
            [*SET_UP, "--config=none.yaml", "--trainer.strategy=aimc_sync"],
            [*SET_UP, "--config=none.yaml", SCHEDULE + "sync"],
        ),
        ([*SET_UP, "--trainer.strategy=auto"], [*SET_UP, "--trainer.strategy=auto"]),
        (
            [*SET_UP, "--trainer.strategy=auto", "--trainer.strategy=aimc_sync"],
            [*SET_UP, "--trainer.strategy=auto", NAMED, SCHEDULE + "sync"],
        ),
        (["--config=nowhere.yaml", "--trainer.strategy"], ["--config=nowhere.yaml", "--trainer.strategy"]),
    ],
)
def test_a_strategy_by_name_keeps_the_arguments_of_the_config(args, kept):
    ours = "class_path: aimc_pl.strategies.AnalogPipelineStrategy, init_args: {device: ideal}"
    strategies = {"full": f"{{{ours}}}", "named": "aimc_async", "short": "{init_args: {num_stages: 2}}"}
    strategies |= {"other": f"{{class_path: {OTHER}}}", "path": PATH}
    for name, text in strategies.items():
        Path(f"{name}.yaml").write_text(f"trainer: {{strategy: {text}}}")
    Path("none.yaml").write_text("seed_everything: 0")
    assert with_kept_strategies(args) == kept


@pytest.mark.parametrize(
    "later", [["--config=named.yaml"], ["--config", "path.yaml"], ["--trainer={strategy: aimc_sync}"]]
)
def test_a_strategy_by_name_in_a_later_config_is_refused(later):
    Path("named.yaml").write_text("trainer: {strategy: aimc_async}")
    Path("path.yaml").write_text(f"trainer: {{strategy: {PATH}}}")
    Path("full.yaml").write_text("trainer: {strategy: {init_args: {device: ideal}}}")
    with pytest.raises(UsageError, match="would drop the arguments of an earlier config, such as its device"):
        with_kept_strategies([*SET_UP, *later])


def test_a_strategy_by_name_before_the_config_that_sets_it_is_refused():
    Path("full.yaml").write_text("trainer: {strategy: {init_args: {device: ideal}}}")
    with pytest.raises(UsageError, match=r"--trainer.strategy aimc_sync comes before --config full.yaml, which sets"):
        with_kept_strategies(["--trainer.strategy", "aimc_sync", *SET_UP])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--config=digits_async.yaml", "--trainer.strategy", "aimc_sync"], {"schedule": "sync", "num_stages": 4}),
        (["--config=named.yaml", "--trainer.strategy.num_stages=3"], {"schedule": "1f1b", "num_stages": 3}),
    ],
)
def test_the_arguments_of_a_strategy_by_name(options, arguments, command, capsys):
    Path("named.yaml").write_text("trainer: {strategy: aimc_1f1b}")
    with pytest.raises(SystemExit):
        command("fit", *options, "--print_config")
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert {name: strategy[name] for name in arguments} == arguments
    assert (strategy["device"] is not None) == ("digits_async.yaml" in options[0])


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", [*TRAINING, "cost"])
def test_help_is_short_and_names_the_help_of_all_arguments(subcommand, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(subcommand, "--help")
    assert not stop.value.code
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 40
    with pytest.raises(SystemExit) as stop:
        command(subcommand, "--config", "digits_async.yaml", "--help")
    assert not stop.value.code
    full = capsys.readouterr().out
    assert "\n  --trainer.strategy STRATEGY\n" in full
    for text in (short, full):
        assert text.startswith(f"usage: aimc-pl {subcommand} [--config CONFIG] [--ARGUMENT VALUE ...]\n\n")
        assert TRAINING.get(subcommand, "Estimate what a config costs") in text
        assert f"\n  aimc-pl {subcommand} --config digits_async.yaml --help\n" in text
        assert "\n  aimc-pl fit --trainer.strategy.help AnalogPipelineStrategy\n" in text


def test_help_of_the_strategy(command, capsys):
    with pytest.raises(SystemExit):
        command("fit", "--trainer.strategy.help=AnalogPipelineStrategy")
    printed = capsys.readouterr().out
    for name in signature(AnalogPipelineStrategy).parameters:
        assert f".{name}" in printed
    assert "the number of accelerators" in " ".join(printed.split())
    assert not re.findall(r"``|:\w+:`", printed)


@pytest.mark.slow
def test_schedule_prints_and_draws(command, capsys, tmp_path):
    command("schedule", "--num_stages=4", "--num_microbatches=5", "--schedule=sync")
    printed = capsys.readouterr().out
    assert (
        "sync, 5 micro-batches from fill to drain: 16 clock cycles, computation density 0.625, speedup over" in printed
    )
    assert "stays full" not in printed
    assert printed.count("F0") == 4
    for schedule in ("none", "sync", "1f1b", "zero_bubble", "async"):
        command("schedule", f"--schedule={schedule}", f"--png={tmp_path / schedule}.png")
        assert has_colours(tmp_path / f"{schedule}.png")
    assert "its density is to 1, and its speedup to 4" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), [("schedule", "[NUM_STAGES] [NUM_MICROBATCHES]"), ("devices", "[NAME]")])
def test_usage_shows_what_needs_no_name(name, words, command, capsys):
    with pytest.raises(SystemExit):
        command(name, "--help")
    assert f"usage: aimc-pl {name} {words}" in " ".join(capsys.readouterr().out.split())


def test_devices_lists_and_draws(command, capsys, tmp_path):
    command("devices")
    assert "soft_bounds " in capsys.readouterr().out
    command("devices", "--name=soft_bounds")
    printed = capsys.readouterr().out
    assert printed.startswith("soft_bounds(tau: float=1.0, num_states: ")
    assert "tau: τ, the dynamic range" in printed
    with pytest.raises(SystemExit, match=r"unknown device 'softbounds': 'aimc-pl devices' lists the names$"):
        command("devices", "softbounds")
    command("devices", "--name=reram_sb", f"--png={tmp_path / 'response.png'}", "--num_pulses=100")
    assert has_colours(tmp_path / "response.png")


def test_the_list_of_devices_is_that_of_the_catalogue():
    """Check the list, which is read from the source, against the imported devices."""
    read = device_functions()
    assert [*read] == [*DEVICES]
    for name, function in DEVICES.items():
        assert ast.get_docstring(read[name]) == getdoc(function)
        assert [argument.arg for argument in read[name].args.args] == [*signature(function).parameters]


@pytest.mark.parametrize("arguments", [["devices"], *(["devices", name] for name in DEVICES)], ids=" ".join)
def test_what_is_printed_about_devices_has_no_markup(arguments, command, capsys):
    command(*arguments)
    assert ":func:" not in capsys.readouterr().out


def test_arguments_by_position(command, capsys):
    pairs = [
        (("schedule", "5"), ("schedule", "--num_stages=5")),
        (("schedule", "3", "2", "sync"), ("schedule", "--num_stages=3", "--num_microbatches=2", "--schedule=sync")),
        (("schedule", "3", "--duplex=full"), ("schedule", "--duplex", "full", "--num_stages", "3")),
        (("schedule", "--schedule", "1f1b", "4"), ("schedule", "--num_stages=4", "--schedule=1f1b")),
        (("devices", "ecram"), ("devices", "--name", "ecram")),
    ]
    for short, long in pairs:
        command(*short)
        printed = capsys.readouterr().out
        command(*long)
        assert printed == capsys.readouterr().out != ""
    with pytest.raises(SystemExit, match="unrecognized arguments: more"):
        command("schedule", "3", "2", "sync", "half", "x.png", "x.json", "more")
    assert not Path("x.png").exists()


@pytest.mark.slow
def test_python_runs_the_package_as_the_command():
    command = [sys.executable, "-m", "aimc_pl", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("aimc-pl ")


def test_overview(command, capsys):
    """Check that the command alone prints what its help prints: all commands, each with a line."""
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    for name in (*TRAINING, *COMMANDS, *ELSEWHERE):
        assert f"\n    {name} " in printed
    with pytest.raises(SystemExit):
        command("--help")
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        command("--version")
    assert capsys.readouterr().out == f"aimc-pl {metadata.version('aimc-pl')}\n"


def test_completion_names_all_commands_and_their_own_arguments(command, capsys):
    with pytest.raises(SystemExit):
        command("--print_completion", "shtab-bash")
    printed = capsys.readouterr().out
    assert f"({' '.join([*TRAINING, *COMMANDS, *ELSEWHERE])})" in printed
    own = {
        "fit": "--config --ckpt_path",
        "schedule": "--config --print_config --num_stages --num_microbatches --schedule --duplex --png --trace",
        "devices": "--config --print_config --name --png --num_pulses",
        "cost": "--config --hardware --num_minibatches --png --trace",
        "sweep": "--grid --folder --jobs --metric",
        "compare": "--metric --png",
    }
    for name, arguments in own.items():
        assert f"_shtab_aimc_pl_{name}_option_strings=(-h --help {arguments})\n" in printed


def test_completion_without_its_package(command, monkeypatch):
    monkeypatch.setattr("aimc_pl.cli.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install shtab"):
        command("--print_completion", "shtab-bash")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--help"], ["--version"], ["schedule"], ["schedule", "--help"], ["devices"], ["devices", "ecram"]),
        *([name, "--help"] for name in ("fit", "predict", "cost", "sweep", "compare")),
    ],
)
def test_quick_commands_import_nothing_slow(arguments):
    """Check in a new process, because this one has imported everything. The imports are what would take seconds."""
    script = (
        f"import sys\nfrom aimc_pl.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'lightning', 'aihwkit', 'torchvision', 'sklearn', 'scipy', 'pandas'} & sys.modules.keys())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("\nset()\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["schedule"], ""), (["schedule"], "1"), (["devices"], ""), (["--help"], "")],
)
def test_a_command_whose_reader_has_gone_ends_in_silence(arguments, unbuffered):
    """Check in a new process, whose standard output is a pipe that nobody reads, as after ``| head``."""
    command = [sys.executable, "-c", f"from aimc_pl.cli import main; main({arguments})"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_an_error(command, monkeypatch):
    def run():
        raise BrokenPipeError("of a worker")

    monkeypatch.setitem(COMMANDS, "devices", run)
    with open("output.txt", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(BrokenPipeError, match="of a worker"):
            command("devices")


@pytest.mark.slow
def test_a_module_of_the_other_package(command, monkeypatch):
    """Check a module of one's own in the current folder, whose base class is not that of the package lightning."""
    Path("own_module.py").write_text("import torch\nclass Net(torch.nn.Module):\n    pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match=r"model: own_module\.Net is no LightningModule"):
        command("fit", "--config=digits_async.yaml", "--model=own_module.Net")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(SystemExit, match=r"write 'import lightning\.pytorch as pl' in the place of 'import p"):
        command("fit", "--config=digits_async.yaml", "--model=own_module.Net")
