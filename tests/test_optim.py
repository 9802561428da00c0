"""These tests compare optimizers for stale gradients with torch's, and with their formulas in float64."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning_modules import Attributes, loader, make_trainer
from torch import nn

from aimc_pl.errors import UsageError
from aimc_pl.optim import SpikeCompensatedSGD
from aimc_pl.strategies import AnalogPipelineStrategy


def train(optimizer, gradients, start):
    parameter = nn.Parameter(start.clone())
    made = optimizer([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 3, 2, generator=generator, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_delay_it_is_sgd(momentum, weight_decay, numbers):
    ours = train(lambda p: SpikeCompensatedSGD(p, 0.2, momentum, weight_decay), *numbers)
    theirs = train(lambda p: torch.optim.SGD(p, 0.2, momentum, weight_decay=weight_decay), *numbers)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_gradient_makes_the_missed_steps_at_once(delay, momentum, numbers):
    """Check one gradient and then none: after n steps its weight is that of n + d steps without a delay."""
    gradients, start = numbers
    alone = [gradients[0], *[torch.zeros_like(start)] * 5]

    def delayed(parameters):
        optimizer = SpikeCompensatedSGD(parameters, 0.2, momentum)
        optimizer.param_groups[0]["staleness"] = delay
        return optimizer

    for steps in range(1, 6):
        moved = train(delayed, alone[:steps], start) - start
        total = sum(momentum**n for n in range(steps + delay))
        np.testing.assert_allclose(moved, -0.2 * total * gradients[0], rtol=1e-12)


def test_stages_step_with_their_staleness():
    """Check with a network of three stages that each update knows its closed form, and that sync steps have none."""
    seen = []

    class Noting(SpikeCompensatedSGD):
        def step(self, closure=None):
            result = super().step(closure)
            seen.append(self.param_groups[0]["staleness"])
            return result

    class Noted(Attributes):
        def configure_optimizers(self):
            return Noting(self.parameters(), 0.05)

    def run(schedule):
        seen.clear()
        L.seed_everything(1)
        module = Noted().double()
        strategy = AnalogPipelineStrategy(3, schedule, 4, split_at=["l2", "l4"])
        make_trainer(strategy, max_epochs=1).fit(module, loader(module, length=16))
        assert module.optimizers().param_groups[0]["staleness"] == 0
        return seen

    assert sorted(run("async")) == sorted(min(k, 2 - stage) for stage in range(3) for k in range(8))
    assert set(run("sync")) == {0}


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"lr": -1.0}, {"weight_decay": -1.0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SpikeCompensatedSGD([nn.Parameter(torch.ones(1))], **options)
