"""These tests train digital networks in the core and with the strategy, without aihwkit being installed."""

import subprocess
import sys

import pytest

BLOCKED = "import sys; sys.modules['aihwkit'] = None\n"

CORE = """
import torch
from torch import nn
from aimc_pl import boundaries
from aimc_pl.flight import Flight, StagedStep
from aimc_pl.passage import StageProcess
from aimc_pl.pipeline import Pipeline
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage
from aimc_pl.trial import Trials, verify

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
x = torch.randn(32, 4)
parts = [lambda part=part: (network(part) - part.sum(1, keepdim=True)).square().mean() for part in x.split(8)]
trials, calls = Trials(network, parts), boundaries.Calls()
reference = trials.undivided(calls.recorded(network))
names, _ = boundaries.find(trials, calls, 2, may_share=False)
step = StagedStep(network, names, [Stage(0), Stage(1)], delayed=True, may_share=False)
trials.record(step)
verify(trials, step, reference)
optimizers = [torch.optim.SGD(stage.parameters, lr=0.05) for stage in step.stages]

def update(stage):
    optimizers[stage.index].step()
    optimizers[stage.index].zero_grad()

pipeline = Pipeline(step.stages, Schedule("async", 2, 4), update)
losses = []
for _ in range(50):
    flights = [Flight(step, part, 0.25) for part in parts]
    with step.running():
        pipeline.run(flights)
        pipeline.drain()
    losses.append(sum(flight.loss.item() for flight in flights))
assert losses[-1] < 0.1 * losses[0], losses
"""

STRATEGY = """
import torch
from aimc_pl.callbacks import ClockMonitor, DeviceMonitor, DeviceNoise, StalenessMonitor, WriteNoise
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy
from lightning_modules import MLP, loader, make_trainer

module = MLP().double()
before = [parameter.detach().clone() for parameter in module.parameters()]
callbacks = [ClockMonitor(), DeviceMonitor(), DeviceNoise([WriteNoise(0.01)]), StalenessMonitor()]
trainer = make_trainer(AnalogPipelineStrategy(3, "async", 4), callbacks=callbacks, max_epochs=1)
trainer.fit(module, loader(module))
trainer.save_checkpoint("one.ckpt")
trainer = make_trainer(AnalogPipelineStrategy(3, "sync", 4), max_epochs=2)
trainer.fit(module, loader(module), ckpt_path="one.ckpt")
assert trainer.global_step == 6
assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
"""


@pytest.mark.slow
def test_digital_training_needs_no_aihwkit():
    environment = {"PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED + CORE + STRATEGY], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
