"""These tests check which weights a backward uses when weights have changed since its forward."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from aimc_pl.private_torch import versions_of
from aimc_pl.saved import SavedParameters, casts_parameters, current_weights

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
    "part of a larger storage": (lambda: InPlace(torch.randn(9, 6)[3:7]), (5, 6)),
    "every second column": (lambda: InPlace(torch.randn(4, 12)[:, 1::2]), (5, 6)),
    "another memory order": (lambda: InPlace(torch.randn(6, 4).T), (5, 6)),
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


class InPlace(nn.Module):
    """A layer whose weight has another storage offset, strides or memory order than a new tensor."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def double(self):
        size = self.weight.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(self.weight.shape, self.weight.stride(), strict=True)
        )
        storage = torch.zeros(size + 1, dtype=torch.float64)
        weight = storage.as_strided(self.weight.shape, self.weight.stride(), self.weight.storage_offset())
        weight.copy_(self.weight.detach())
        self.weight = nn.Parameter(weight)
        return self

    def __deepcopy__(self, memo):
        return InPlace(self.weight.detach().clone())

    def forward(self, x):
        return x @ self.weight.T + x[:, :4] @ self.weight[:, :4]


def gradients_of(layer, x, error):
    x = x.clone().requires_grad_()
    layer(x).backward(error)
    return x.grad, [parameter.grad for parameter in layer.parameters()]


def update(module, optimizer):
    """Change all weights in place by a step of an optimizer."""
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    step = OPTIMIZERS[optimizer](module.parameters())
    step.step()
    step.zero_grad()


def backward(module, loss, versions, error):
    with current_weights([*module.parameters()], versions):
        loss.backward(error)


@pytest.mark.parametrize("saved", ["references", "references through hooks", "copies"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_backward_uses_the_weights_of_its_time(layer, optimizer, saved):
    """Check that a layer's input gradient is that of a layer with the current weights, or with those of the forward."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make().double()
    x, error = torch.randn(shape).double(), torch.randn_like(module(torch.randn(shape).double()))
    ours = x.clone().requires_grad_()
    forwards_weights = copy.deepcopy(module)
    if saved == "references":
        out = module(ours)
    else:
        with SavedParameters(module.parameters(), stash=saved == "copies").hooks(0):
            out = module(ours)
    versions = versions_of([*module.parameters()])
    update(module, optimizer)
    now = versions_of([*module.parameters()])
    weights = copy.deepcopy(module)
    backward(module, out, versions, error)
    assert versions_of([*module.parameters()]) == now
    seen, other = (forwards_weights, weights) if saved == "copies" else (weights, forwards_weights)
    expected, expected_parameters = gradients_of(seen, x, error)
    torch.testing.assert_close(ours.grad, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours.grad, gradients_of(other, x, error)[0])
    for parameter, gradient in zip(module.parameters(), expected_parameters, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_without_the_forwards_versions_autograd_refuses():
    """Check that torch raises an error without the forward's versions, so the other tests do depend on them."""
    module = nn.Linear(3, 3)
    out = module(torch.randn(2, 3, requires_grad=True))
    update(module, "sgd")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(module, out, versions_of([*module.parameters()]), torch.ones(2, 3))


@pytest.mark.parametrize("stash", [False, True])
def test_backward_under_autocast(stash):
    """Check that autocast's copies come from the current weights or, with stashing, from those of the forward."""
    module = nn.Linear(6, 4, bias=False)
    x, error = torch.randn(5, 6, requires_grad=True), torch.randn(5, 4).bfloat16()
    before = module.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16), SavedParameters(module.parameters(), stash=stash).hooks(0):
        out = module(x)
    assert out.dtype == torch.bfloat16
    versions = versions_of([module.weight])
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 6))
    backward(module, out, versions, error)
    weight = (before if stash else module.weight.detach()).bfloat16()
    torch.testing.assert_close(x.grad, (error @ weight).float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(module.weight.grad, (error.T @ x.bfloat16()).float(), rtol=1e-2, atol=1e-2)


def test_one_copy_per_version():
    """Check that two micro-batches with the same version in their forwards see that version in later backwards."""
    module = nn.Linear(3, 3, bias=False).double()
    saved = SavedParameters(module.parameters(), stash=True)
    weights, flights = [module.weight.detach().clone()], []
    for k in range(4):
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        with saved.hooks(version=k // 2):
            flights.append((x, module(x), versions_of([module.weight])))
        if k % 2:
            with torch.no_grad():
                module.weight.add_(1.0)
            weights.append(module.weight.detach().clone())
    for k, (x, out, versions) in enumerate(flights):
        backward(module, out, versions, torch.ones(2, 3, dtype=torch.float64))
        torch.testing.assert_close(x.grad, torch.ones(2, 3, dtype=torch.float64) @ weights[k // 2])


@pytest.mark.parametrize("stash", [False, True])
def test_activation_changed_in_place_is_an_error(stash):
    linear = nn.Linear(3, 3)
    with SavedParameters(linear.parameters(), stash=stash).hooks(0):
        y = torch.sigmoid(linear(torch.randn(2, 3)))
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) .* modified by an inplace operation of the forward"):
        y.backward(torch.ones(2, 3))


@pytest.mark.parametrize("stash", [False, True])
def test_saved_outputs_do_not_keep_their_graph_alive(stash):
    class Marker:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = Marker()
            alive.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    alive = []
    linear = nn.Linear(3, 3)
    gc.disable()
    try:
        with SavedParameters(linear.parameters(), stash=stash).hooks(0):
            out = torch.sigmoid(Marked.apply(linear(torch.randn(2, 3))))
        assert alive[0]() is not None
        del out
        assert alive[0]() is None
    finally:
        gc.enable()


def test_casts_parameters():
    linear, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear(x)
    assert casts_parameters(cast.float().sum())
    assert casts_parameters(linear(x).sum() + linear.weight.double().sum())
    assert not casts_parameters(linear(x).double().sum())
    assert not casts_parameters(linear(x.detach().double().float()).sum())
