"""The backward of a stage whose weights have changed since the forward."""

import copy
import weakref

import pytest
import torch
from torch import nn

from aimc_pl.stage import Stage

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "grouped conv": (lambda: nn.Conv1d(4, 4, 3, groups=2), (2, 4, 7)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "batch norm in eval mode": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(6), (5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "prelu": (lambda: nn.PReLU(), (5, 6)),
    "embedded view": (lambda: Scaled(), (5, 6)),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=False),
    "foreach sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, fused=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, fused=True),
}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x * self.scale.view(1, 6) + self.scale.flatten()


def gradients_of(layer, x, error):
    x = x.clone().requires_grad_()
    layer(x).backward(error)
    return x.grad, [parameter.grad for parameter in layer.parameters()]


@pytest.mark.parametrize("stashing", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_backward_uses_the_weights_of_its_time(layer, optimizer, stashing):
    """For a single layer, the input's gradient is that of a layer with the current (or the forward's) weights."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make().double()
    x, error = torch.randn(shape).double(), torch.randn_like(module(torch.randn(shape).double()))
    forwards_weights = copy.deepcopy(module)
    stage = Stage(0, module, delayed=True, weight_stashing=stashing)
    stage.forward(0, (x.clone().requires_grad_(),))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    step = OPTIMIZERS[optimizer](module.parameters())
    step.step()
    step.zero_grad()
    stage.version += 1
    current_weights = copy.deepcopy(module)
    (ours,) = stage.backward(0, error)
    expected, expected_parameters = gradients_of(forwards_weights if stashing else current_weights, x, error)
    other, _ = gradients_of(current_weights if stashing else forwards_weights, x, error)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, other)
    for parameter, gradient in zip(module.parameters(), expected_parameters, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_backward_uses_current_weights_under_autocast():
    module = nn.Linear(6, 4, bias=False)
    stage = Stage(0, module, delayed=True, context=lambda: torch.autocast("cpu", torch.bfloat16))
    x, error = torch.randn(5, 6), torch.randn(5, 4).bfloat16()
    out = stage.forward(0, (x.clone().requires_grad_(),))
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 6))
    (ours,) = stage.backward(0, error)
    torch.testing.assert_close(ours, (error @ module.weight.bfloat16()).float(), rtol=1e-2, atol=1e-2)


def test_stashes_one_copy_per_version():
    """Two micro-batches forwarded at one version and backwarded two versions later see that version."""
    module = nn.Linear(3, 3, bias=False).double()
    weights = [module.weight.detach().clone()]
    stage = Stage(0, module, delayed=True, weight_stashing=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    for k in range(4):
        stage.forward(k, (x.clone().requires_grad_(),))
        if k % 2:
            with torch.no_grad():
                module.weight.add_(1.0)
            stage.version += 1
            weights.append(module.weight.detach().clone())
    for k in range(4):
        (gradient,) = stage.backward(k, torch.ones(2, 3, dtype=torch.float64))
        torch.testing.assert_close(gradient, torch.ones(2, 3, dtype=torch.float64) @ weights[k // 2])


def test_activation_changed_in_place_is_an_error():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            y = torch.sigmoid(self.linear(x))
            y.mul_(2)
            return y

    stage = Stage(2, Bad(), delayed=True)
    out = stage.forward(0, (torch.randn(2, 3),))
    with pytest.raises(RuntimeError, match=r"tensor of shape \(2, 3\) that the backward needs was changed in place"):
        stage.backward(0, torch.ones_like(out))


def test_frozen_stage_passes_nothing_back():
    module = nn.Linear(3, 3).requires_grad_(False)
    stage = Stage(0, module, delayed=True)
    out = stage.forward(0, (torch.randn(2, 3),))
    assert not out.requires_grad
    assert stage.backward(0, torch.ones_like(out)) == (None,)


def test_structured_values_pass_through():
    class Twice(nn.Module):
        def forward(self, values, size):
            return {"sum": values[0] + values[1], "kept": values[1]}, size

    stage = Stage(0, Twice())
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    _, size = stage.forward(0, ([a, b], 7))
    assert size == 7
    gradients = stage.backward(0, ({"sum": torch.ones(3), "kept": None}, None))
    torch.testing.assert_close(gradients[0][0], torch.ones(3))
    assert gradients[0][1] is None


class Marked(torch.autograd.Function):
    """Identity whose node in the graph holds on to an object."""

    @staticmethod
    def forward(ctx, x, marker):
        ctx.marker = marker
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_graph_is_freed_after_the_backward():
    """Saved outputs must not keep their own graph alive."""

    class Network(nn.Linear):
        def forward(self, input):
            return torch.sigmoid(Marked.apply(super().forward(input), marker))

    class Marker:
        pass

    marker = Marker()
    alive = weakref.ref(marker)
    stage = Stage(0, Network(3, 3), delayed=True)
    out = stage.forward(0, (torch.randn(2, 3),))
    marker = None
    assert alive() is not None
    stage.backward(0, torch.ones_like(out))
    del out
    assert alive() is None
