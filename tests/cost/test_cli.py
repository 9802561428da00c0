"""These tests run ``aimc-pl cost`` and ``aimc-pl schedule --trace``."""

import json
import re
import sys
from pathlib import Path

import pytest

from aimc_pl.cli import main
from aimc_pl.cost import PRESETS
from aimc_pl.cost.report import schedule_name
from aimc_pl.schedule import Schedule


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aimc-pl"])
        main([*arguments])

    return run


@pytest.mark.slow
def test_the_cost_of_a_config(command, capsys):
    options = ("--config=digits_async.yaml", "--num_minibatches=4", "--png=cost.png", "--trace=cost.json")
    command("cost", *options)
    printed = capsys.readouterr().out
    assert "async on rasch_2024: 4 stages, 4 mini-batches of 4 micro-batches of 8 samples" in printed
    stages = re.findall(r"^(\d)  +(\S+|the step) +1 ", printed, re.MULTILINE)
    assert stages == [("0", "the step"), ("1", "network.3"), ("2", "network.5"), ("3", "network.7")]
    for name in ("none", "sync", "1f1b", "zero_bubble", "async", "async, full duplex", *PRESETS):
        assert re.search(rf"^{name} +[\d.]+ [nµm]s ", printed, re.MULTILINE), name
    shares = re.findall(r" ([\d.]+) %", next(line for line in printed.splitlines() if line.startswith("energy: ")))
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)
    assert Path("cost.png").stat().st_size > 10_000
    events = json.loads(Path("cost.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 3 * 4 * 16  # forwards, backwards and updates
    # Nothing has been trained or logged.
    assert not Path("logs").exists()
    # It is the same again.
    command("cost", *options[:2])
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_stages_without_names_are_balanced_by_the_model(command, capsys):
    options = ("--config=digits_async.yaml", "--trainer.strategy.init_args.split_at=null", "--num_minibatches=1")
    remedies = [{"class_path": "aimc_pl.strategies.SyncStart", "init_args": {"steps": 3}}]
    command("cost", *options, f"--trainer.strategy.init_args.remedies={json.dumps(remedies)}")
    # Four layers, four stages.
    printed = capsys.readouterr().out
    assert re.findall(r"^\d  +(\S+|the step) +1 ", printed, re.MULTILINE)[0] == "the step"
    assert "Left out are the first mini-batches, which a remedy runs in sync: they cost what 1f1b costs." in printed


def test_without_a_config_the_constants_are_listed(command, capsys):
    command("cost", "--hardware", "isaac_2016")
    printed = capsys.readouterr().out
    assert re.search(r"^forward_time: .* 1.60 µs +40 ns to 1.60 µs +ISAAC 2016", printed, re.MULTILINE)
    assert len(re.findall(r"^\w+: ", printed, re.MULTILINE)) >= 24


@pytest.mark.slow
def test_help_tells_the_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("cost", "--help")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("usage: aimc-pl cost [--config CONFIG]")
    assert "Estimate what a config costs on hardware" in printed
    assert "--num_minibatches" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware=fast"], "unknown hardware 'fast': choose rasch_2024"),
        (["--config=digits_async.yaml", "--hardware=fast"], "unknown hardware 'fast': choose rasch_2024"),
        (["--config=digits_async.yaml", "--num_minibatches=0"], "num_minibatches must be a whole number of at least 1"),
        (["--config=digits_async.yaml", "--num_minibatches=20000"], "num_minibatches=20000 takes more than 200000"),
        (["--config=digits_async.yaml", "--png=nowhere/a.png"], "there is no folder nowhere"),
        (
            ["--config=digits_async.yaml", "--trace=nowhere/a.json"],
            "trace=nowhere/a.json cannot be written: there is no",
        ),
        (["--config=digits_async.yaml", "--trace=."], "trace=. is a folder: add the name of a file"),
        (["--config=digits_async.yaml", "--trainer.strategy=auto"], "cost needs a pipeline"),
        (["--config=digits_async.yaml", "--speed=3"], "speed"),
        (["--hardwre=isaac_2016"], "unrecognized arguments: --hardwre=isaac_2016"),
        (["digits_async.yaml"], "write --config digits_async.yaml"),
    ],
)
def test_wrong_arguments_are_one_line(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command("cost", *arguments)
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not capsys.readouterr().out


def test_a_schedule_is_traced(command, capsys):
    command("schedule", "--schedule=sync", "--num_stages=3", "--num_microbatches=2", "--trace=sync.json")
    assert "8 clock cycles" in capsys.readouterr().out
    events = json.loads(Path("sync.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["planned", "simulated"]
    with pytest.raises(SystemExit, match=r"trace=nowhere/sync.json cannot be written"):
        command("schedule", "--trace=nowhere/sync.json")
    assert not capsys.readouterr().out


def test_schedules_that_differ_have_different_names():
    plain = Schedule("async", 3, 4)
    names = [schedule_name(plain), schedule_name(plain.accumulating(3)), schedule_name(Schedule("async", 3, 4, "full"))]
    assert names == ["async", "async, updates from 3", "async, full duplex"]
