"""These tests compare optimizers for stale gradients with torch's, and with their formulas in float64."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from lightning_modules import Attributes, loader, make_trainer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from aimc_pl.errors import UsageError
from aimc_pl.optim import AsyncNAdam, SpikeCompensatedSGD
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


def test_sparse_gradients_are_taken_as_by_sgd():
    """Check that an embedding with sparse gradients moves as with dense ones."""

    def trained(sparse):
        torch.manual_seed(1)
        table = nn.Embedding(5, 3, sparse=sparse, dtype=torch.float64)
        optimizer = SpikeCompensatedSGD(table.parameters(), 0.1)
        optimizer.param_groups[0]["staleness"] = 2
        for rows in ([0, 1], [1, 1, 3]):
            optimizer.zero_grad()
            table(torch.tensor(rows)).sum().backward()
            optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("delay", [0, 1, 3, 4, 6])
def test_momentum_grows_with_staleness(delay, numbers):
    """Compare with torch's NAdam of the momentum that the formula gives, and with the formula of NAdam."""

    def delayed(parameters):
        optimizer = AsyncNAdam(parameters, 4, 0.01, momentum=0.8, stale_momentum=0.96, weight_decay=0.1)
        optimizer.param_groups[0]["staleness"] = delay
        return optimizer

    momentum = 0.8 + 0.16 * min(delay / 4, 1)
    ours = train(delayed, *numbers)
    options = {"betas": (momentum, 0.999), "weight_decay": 0.1, "decoupled_weight_decay": True}
    theirs = train(lambda p: torch.optim.NAdam(p, 0.01, **options), *numbers)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)

    gradients, weight = (tensor.numpy() for tensor in numbers)
    first, second, product = np.zeros_like(weight), np.zeros_like(weight), 1.0
    for t, g in enumerate(gradients, 1):
        now, following = (momentum * (1 - 0.5 * 0.96 ** (0.004 * n)) for n in (t, t + 1))
        product *= now
        first = momentum * first + (1 - momentum) * g
        second = 0.999 * second + 0.001 * g**2
        step = following * first / (1 - product * following) + (1 - now) * g / (1 - product)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * step / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(ours, weight, rtol=1e-6)  # torch keeps the product of the momenta in float32


@pytest.fixture
def momenta(monkeypatch):
    """The momenta with which NAdam has made its steps."""
    step, seen = torch.optim.NAdam.step, []

    def noting(self, closure=None):
        seen.append(round(self.param_groups[0]["betas"][0], 6))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.NAdam, "step", noting)
    return seen


@pytest.mark.parametrize("duplex", ["half", "full"])
def test_every_stage_has_its_own_momentum(duplex, momenta):
    """Check the momentum of each update of three stages. In full duplex the first is staler than there are stages."""

    class Noted(Attributes):
        def configure_optimizers(self):
            return AsyncNAdam(self.parameters(), 3, 0.05)

    L.seed_everything(1)
    module = Noted().double()
    strategy = AnalogPipelineStrategy(3, "async", 4, split_at=["l2", "l4"], duplex=duplex)
    make_trainer(strategy, max_epochs=1).fit(module, loader(module, length=16))
    delays = [min(k, (2 - stage) * (2 if duplex == "full" else 1)) for stage in range(3) for k in range(8)]
    assert sorted(momenta) == sorted(round(0.9 + 0.09 * min(d, 3) / 3, 6) for d in delays)


def test_a_scheduler_and_a_group_set_the_momentum_without_delay(momenta):
    """Check OneCycleLR, which cycles the momentum, and a group with betas of its own, with and without staleness."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AsyncNAdam([{"params": [parameter], "betas": (0.5, 0.999)}], 4)
    parameter.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["staleness"] = 2
    optimizer.step()
    schedule = OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.step()
    schedule.step()
    assert momenta == [0.5, 0.745, 0.97]
    assert optimizer.param_groups[0]["betas"][0] < 0.95


def test_a_group_that_is_added_is_told_the_staleness():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = AsyncNAdam([first], 4)
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert torch.equal(first, second)
    assert [group["staleness"] for group in optimizer.param_groups] == [0, 0]


def test_a_copy_makes_the_same_steps():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AsyncNAdam([parameter], 4, stale_momentum=0.95)
    optimizer.param_groups[0]["staleness"] = 2
    copied = copy.deepcopy(optimizer)
    (other,) = copied.param_groups[0]["params"]
    for each, own in ((parameter, optimizer), (other, copied)):
        each.grad = torch.ones(1)
        own.step()
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("options", [{"num_stages": 0}, {"lr": -1.0}, {"stale_momentum": 0.5}, {"momentum": 1.0}])
def test_arguments_of_nadam_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        AsyncNAdam([nn.Parameter(torch.ones(1))], **{"num_stages": 4} | options)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"lr": -1.0}, {"weight_decay": -1.0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SpikeCompensatedSGD([nn.Parameter(torch.ones(1))], **options)
