"""These tests check what the progress bar shows, and that the line at the start of a run does not break it."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from lightning_modules import MLP, loader, make_trainer

from aimc_pl.callbacks import PipelineBar
from aimc_pl.strategies import AnalogPipelineStrategy


class Watched(PipelineBar):
    """A bar that keeps what it has shown after every mini-batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seen.append(self.get_metrics(trainer, pl_module) | {"true loss": outputs.get("loss")})


def fit(strategy, bar, **options):
    module = MLP().double()
    trainer = make_trainer(strategy, callbacks=[bar], enable_progress_bar=True, **options)
    trainer.fit(module, loader(module, shuffle=False))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "duplex", "staleness"), [("sync", "half", 0), ("async", "half", 2), ("async", "full", 4)]
)
def test_bar_shows_loss_cycles_and_staleness(schedule, duplex, staleness):
    bar = Watched()
    trainer = fit(AnalogPipelineStrategy(3, schedule, 8, split_at=["net.2", "net.4"], duplex=duplex), bar)
    table = trainer.strategy.schedule
    per_batch = [table.num_cycles(), 2 * table.num_cycles()] if schedule == "sync" else []
    assert [int(shown["cycles"].replace(",", "")) for shown in bar.seen][: len(per_batch)] == per_batch
    assert bar.seen[-1]["staleness"] == str(staleness)
    assert all(shown["loss"] == pytest.approx(shown["true loss"].item()) for shown in bar.seen)
    assert bar.seen[0]["loss"] != bar.seen[-1]["loss"]
    assert "v_num" not in bar.seen[-1]
    other = PipelineBar()
    other.load_state_dict(bar.state_dict())
    assert other.state_dict() == {"cycles": int(bar.seen[-1]["cycles"].replace(",", "")), "staleness": staleness}


def test_bar_of_another_strategy_shows_the_loss():
    bar = Watched()
    fit("auto", bar)
    assert [*bar.seen[-1]] == ["loss", "true loss"]


@pytest.mark.slow
@pytest.mark.parametrize("device", [None, "soft_bounds"])
def test_the_line_at_the_start_comes_once_and_above_the_bar(device, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    strategy = AnalogPipelineStrategy(3, "sync", 2, device, ["net.2", "net.4"])
    options = {"precision": "32-true"} if device else {}
    module = MLP() if device else MLP().double()
    trainer = make_trainer(strategy, callbacks=[PipelineBar()], enable_progress_bar=True, **options)
    trainer.fit(module, loader(module, shuffle=False))
    printed = " ".join(stream.getvalue().split())
    analog = "5 of 5 layers analog (soft_bounds)" if device else "no layer is analog"
    weights = [sum(p.numel() for p in layers.parameters()) for layers in (MLP().net[:2], MLP().net[2:4], MLP().net[4:])]
    percent = ", ".join(f"{100 * count / sum(weights):.0f}" for count in weights)
    stages = f"3 stages of {percent} % of the trained weights"
    line = f"MLP (Sequential) in {stages}, schedule 'sync', split_at=['net.2', 'net.4']: {analog}"
    assert printed.count(line) == 1


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_file_gets_a_line_for_each_epoch(is_terminal, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1") if is_terminal else monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    bar = Watched()
    fit(AnalogPipelineStrategy(2, "sync", 2, split_at=["net.2"]), bar, max_epochs=2)
    lines = [line for line in stream.getvalue().splitlines() if re.match(r"Epoch \d: loss", line)]
    per_epoch = len(bar.seen) // 2
    ends = bar.seen[per_epoch - 1 :: per_epoch]
    expected = [f"Epoch {n}: loss {s['loss']:.3f}, cycles {s['cycles']}, staleness 0" for n, s in enumerate(ends)]
    assert lines == ([] if is_terminal else expected)
    assert bar.is_disabled != is_terminal


IN_A_TERMINAL = """
from lightning_modules import MLP, loader, make_trainer

from aimc_pl.callbacks import PipelineBar

module = MLP().double()
make_trainer("auto", callbacks=[PipelineBar()], enable_progress_bar=True).fit(module, loader(module, shuffle=False))
"""


@pytest.mark.slow
def test_lines_of_lightning_do_not_break_the_bar_in_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    variables = {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IN_A_TERMINAL]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | variables) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: read_terminal(ours), b""))
    os.close(ours)
    text = re.sub(r"\x1b\[[\d;]*m", "", written.decode())  # without colours
    assert process.returncode == 0, text
    # The line begins where the bar was erased, and the bar is drawn below it once.
    before, after = re.split(r"`Trainer.fit` stopped: `max_\w+=\d+` reached\.", text)
    assert re.search(r"(\n|\x1b\[2K)$", before)
    assert after.startswith("\r\n")
    assert after.split("\x1b[2K")[-1].count("Epoch 1/1") == 1


def read_terminal(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that the process has ended
        return b""
