"""These tests run hooks that compute with the gradients of all stages, in a thread for the process of each stage."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector

from aimc_pl.errors import UsageError
from aimc_pl.ghosts import Exchange, Ghosts, gradients_known, loss_of

STAGES = 3
OWNERS = {"0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1, "4.weight": 2, "4.bias": 2, "5.weight": 2}


def network():
    torch.manual_seed(3)
    layers = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3, bias=False)
    return nn.Sequential(*layers).double()


def with_gradients(net):
    """Return the network with gradients of all parameters except one, which its loss does not use."""
    net[:5](torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)).square().sum().backward()
    return net


def in_all_stages(hook, net=network):
    """Run a hook in every stage and return its result, the stage's own gradients and weights, and the network."""
    values, barrier = [None] * STAGES, Barrier(STAGES, timeout=20)

    def gather(stage, value):
        values[stage] = value
        barrier.wait()
        everyone = [*values]
        barrier.wait()
        return everyone

    def run(stage):
        whole = with_gradients(networks[stage])
        Ghosts(whole, ["2", "4"], stage, OWNERS).free()
        try:
            with gradients_known(dict(whole.named_parameters()), Exchange(stage, lambda value: gather(stage, value))):
                result = hook(whole)
        except Exception:
            barrier.abort()
            raise
        named = whole.named_parameters()
        return result, {name: (p.grad, p.data) for name, p in named if OWNERS[name] == stage}, whole

    networks = [net() for _ in range(STAGES)]
    with ThreadPoolExecutor(STAGES) as pool:
        runs = [pool.submit(run, stage) for stage in range(STAGES)]
        errors = [run.exception() for run in runs]
        first = next((error for error in errors if isinstance(error, UsageError)), next(filter(None, errors), None))
        if first is not None:
            raise first
        return [run.result() for run in runs]


def clips(net):
    return float(clip_grad_norm_(net.parameters(), 0.5))


def clips_to_the_largest(net):
    return float(clip_grad_norm_(net.parameters(), 0.1, norm_type=float("inf")))


def clips_values(net):
    clip_grad_value_(net.parameters(), 0.1)


def norms(net):
    return {name: float(norm) for name, norm in grad_norm(net, 2).items()}


def norm_of_all(net):
    return float(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm())


def norm_by_numbers(net):
    return sum(p.grad.norm().item() ** 2 for p in net.parameters() if p.grad is not None) ** 0.5


def scales_by_the_mean(net):
    mean = sum(p.grad.abs().mean() for p in net.parameters() if p.grad is not None)
    for p in net.parameters():
        if p.grad is not None:
            p.grad = p.grad / mean


def skips_if_large(net):
    if max(p.grad.data.abs().max() for p in net.parameters() if p.grad is not None) > 1e-3:
        for p in net.parameters():
            p.grad = None


def zeroes_small_ones(net):
    for p in net.parameters():
        if p.grad is not None:
            p.grad[p.grad.abs() < 0.2] = 0


def sums_up(net):
    total = torch.zeros(4, 4, dtype=torch.float64)
    for index in (0, 2):
        total += net[index].weight.grad
    return float(total.norm())


def penalizes(net):
    for p in net.parameters():
        if p.grad is not None:
            p.grad.add_(p, alpha=0.1)


def decays(net):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
            p.data.sub_(1)
            p.sub_(p.grad if p.grad is not None else 1)


HOOKS = (
    clips,
    clips_to_the_largest,
    clips_values,
    norms,
    norm_of_all,
    norm_by_numbers,
    scales_by_the_mean,
    skips_if_large,
    zeroes_small_ones,
    sums_up,
    penalizes,
    decays,
)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_what_they_see_in_one_process(hook):
    whole = with_gradients(network())
    expected = hook(whole)
    parameters = dict(whole.named_parameters())
    for result, own, _ in in_all_stages(hook):
        assert result == (expected if expected is None else pytest.approx(expected, rel=1e-12))
        for name, (gradient, weight) in own.items():
            torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-12, atol=0)
            assert gradient is None or type(gradient) is torch.Tensor
            torch.testing.assert_close(weight, parameters[name].data, rtol=1e-12, atol=0)


def test_afterwards_only_own_parameters_have_gradients():
    for stage, (_, _, net) in enumerate(in_all_stages(clips)):
        have = {name for name, p in net.named_parameters() if p.grad is not None}
        assert have == {name for name, owner in OWNERS.items() if owner == stage and name != "5.weight"}


def averages(net):
    mean = torch.zeros(4, 4, dtype=torch.float64)
    mean.lerp_(net[0].weight.data, 0.1)


def weight_norm(net):
    return float(parameters_to_vector(net.parameters()).norm())


def copies_a_weight(net):
    net[2].weight.data.copy_(net[0].weight)


@pytest.mark.parametrize("hook", [averages, weight_norm, copies_a_weight])
def test_weights_of_other_stages_cannot_be_read(hook):
    with pytest.raises(UsageError, match=r"outside of training_step reads '.*weight', which only the process of stage"):
        in_all_stages(hook)


def test_a_loss_elsewhere_can_be_passed_on_but_not_decided_by():
    loss = loss_of(2, torch.device("cpu")).detach() / 2
    assert f"{loss.item():.3f}" == "unknown"
    with pytest.raises(UsageError, match="bool outside of training_step reads 'loss', which only the process of st"):
        assert loss < 1


def test_hooks_must_do_the_same_everywhere():
    owners = iter(range(STAGES))

    def hook(net):
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        return torch.stack([g.norm() for g in gradients]) if next(owners) else torch.cat([*map(torch.ravel, gradients)])

    with pytest.raises(UsageError, match="Hooks must do the same in all processes"):
        in_all_stages(hook)
