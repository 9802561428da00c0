"""These tests check which optimizers and parameters are refused before training starts."""

import copy

import pytest
import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import StepLR

from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage
from aimc_pl.strategies.checks import check_optimizer, check_parameters


class Normalized(Optimizer):
    """An optimizer that divides by the norm of all gradients."""

    def step(self, closure=None):
        loss = closure() if closure else None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grads_with_norm_(self.param_groups[0]["params"], 1.0, nn.utils.get_total_norm(gradients))
        super().step()
        return loss


class NormalizedSGD(Normalized, SGD):
    pass


class NormalizedAdam(Normalized, Adam):
    """Adam with normalized gradients. Apart from rounding and eps, its first steps hide a common factor of them."""


class Noisy(SGD):
    """Langevin dynamics with a step counter in an attribute."""

    steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / self.steps + 0.01 * torch.randn_like(p))
        return loss


class SharpnessAware(SGD):
    def step(self, closure=None):
        assert closure is not None
        closure()
        super().step()
        return closure()


APART = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "noisy": lambda p: Noisy(p, lr=0.1),
    "muon": lambda p: Muon([x for x in p if x.dim() == 2], lr=0.1),
    "lars": lambda p: Lars(p, lr=0.1),
    "lamb without clipping": lambda p: Lamb(p, lr=0.1, max_grad_norm=None),
    "lookahead": lambda p: Lookahead(SGD(p, lr=0.1), k=2),
    "fused": lambda p: AdamW(p, lr=0.1, fused=True),
    **{k.__name__: lambda p, k=k: k(p, lr=0.1) for k in (Adam, NAdam, Adagrad, RMSprop, Rprop, Adafactor)},
}
COUPLED = {
    "normalized": lambda p: NormalizedSGD(p, lr=0.1),
    "normalized adam": lambda p: NormalizedAdam(p, lr=0.1),
    "lamb": lambda p: Lamb(p, lr=0.1),
}


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def check(net, optimizer, stage):
    net(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
    gradients = {parameter: parameter.grad for parameter in net.parameters()}
    check_optimizer(optimizer, gradients, Stage(1, net[stage].parameters()))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", APART)
def test_optimizers_that_update_each_parameter_by_itself_pass(name, stage):
    net = network()
    check(net, APART[name]([*net.parameters()]), stage)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", COUPLED)
def test_optimizers_that_compute_with_all_gradients_are_refused(name, stage):
    net = network()
    optimizer = COUPLED[name]([*net.parameters()])
    with pytest.raises(UsageError, match=rf"{type(optimizer).__name__} updates a stage by the gradients of other"):
        check(net, optimizer, stage)


def test_optimizers_that_evaluate_the_loss_are_refused():
    net = network()
    with pytest.raises(UsageError, match="SharpnessAware evaluates the loss itself"):
        check(net, SharpnessAware(net.parameters(), lr=0.1), 0)


def test_parameters_of_a_module_in_a_plain_list_are_refused():
    net, hidden = network(), nn.Linear(2, 7)
    check_parameters(net, [SGD(net.parameters(), lr=0.1)])
    with pytest.raises(UsageError, match=r"a parameter of shape \(7, 2\) that is none of Sequential.parameters"):
        check_parameters(net, [SGD([*net.parameters(), *hidden.parameters()], lr=0.1)])


def test_the_check_leaves_no_trace():
    net = network()
    optimizer = Noisy(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook was called"))
    scheduler = StepLR(optimizer, 1)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    check(net, optimizer, 0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert optimizer.steps == 0
    assert scheduler.get_last_lr() == [0.1]
    assert str((net.state_dict(), optimizer.state_dict())) == str(before[0])
