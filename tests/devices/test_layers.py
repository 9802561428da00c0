"""These tests compare what analog layers report of their weights with the digital layers, and check the refusals."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from aihwkit.nn.conversion import convert_to_digital
from aihwkit.simulator.configs import FloatingPointRPUConfig
from torch import nn
from torch.nn import functional as F

from aimc_pl.devices import (
    convert_to_analog,
    make_analog_aware,
    mixed_precision,
    pcm,
    reram_sb,
    residual_learning,
    soft_bounds,
    symmetric_point_tracking,
    tiki_taka,
    tiki_taka_v2,
)
from aimc_pl.errors import UsageError

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "linear without bias": lambda: nn.Linear(5, 4, bias=False),
    # This layer has more inputs than a tile.
    "several tiles": lambda: nn.Linear(600, 4),
    "conv1d": lambda: nn.Conv1d(3, 4, 5),
    "conv2d": lambda: nn.Conv2d(3, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
}


def analog(layer, device="ideal"):
    network = nn.Sequential(copy.deepcopy(layer))
    convert_to_analog(network, device)
    return network[0]


@pytest.mark.parametrize("device", ["ideal", "soft_bounds", soft_bounds(backend="aihwkit")])
@pytest.mark.parametrize("name", LAYERS)
def test_weight_and_bias_are_the_digital_layers(name, device):
    digital = LAYERS[name]()
    layer = analog(digital, device)
    assert layer.weight.shape == layer.weight.size() == digital.weight.shape
    assert (layer.weight.dtype, layer.weight.device) == (torch.float32, torch.device("cpu"))
    assert layer.weight.numel() == digital.weight.numel()
    assert len(layer.weight) == layer.out_features
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer.weight, digital.weight.detach())
    torch.testing.assert_close(layer.bias, digital.bias)
    assert repr(layer.weight) == repr(digital.weight.detach())
    assert type(layer.weight.detach()) is torch.Tensor
    np.testing.assert_array_equal(layer.weight.numpy(), digital.weight.detach().numpy())
    assert bool((layer.weight == digital.weight).all())
    assert torch.zeros(2, dtype=torch.float64).to(layer.weight).dtype == torch.float32
    assert not torch.zeros_like(layer.weight).any()


def test_weight_is_the_tiles_of_now_and_copies_stay():
    layer = analog(nn.Linear(3, 2))
    weight, before = layer.weight, layer.weight.clone()
    layer.set_weights(torch.full((2, 3), 0.25), torch.ones(2))
    assert torch.equal(weight, torch.full((2, 3), 0.25))
    assert not torch.equal(before, weight)
    before.fill_(7.0)
    assert torch.equal(layer.weight, torch.full((2, 3), 0.25))


def test_looking_at_the_metadata_reads_no_weights(monkeypatch):
    layer = analog(nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(layer, "get_weights", lambda: pytest.fail("read the weights"))
    assert (layer.weight.dtype, layer.weight.shape[0], layer.weight.dim()) == (torch.float32, 4, 4)


def test_bias_on_the_crossbar_answers():
    config = FloatingPointRPUConfig()
    config.mapping.digital_bias = False
    digital = nn.Linear(3, 2)
    layer = analog(digital, config)
    torch.testing.assert_close(layer.bias, digital.bias.detach())
    with pytest.raises(UsageError, match="computes with the weight of analog layer '0'"):
        layer.bias.add(1)


def test_digital_bias_is_the_parameter():
    layer = analog(nn.Linear(3, 2))
    assert layer.bias is layer.analog_module.bias
    assert isinstance(layer.bias, nn.Parameter)


@pytest.mark.parametrize("device", ["ideal", "soft_bounds"])
def test_weight_is_no_parameter_and_survives_copies(device):
    layer = analog(nn.Linear(5, 4), device)
    assert {name.rpartition(".")[2] for name, _ in layer.named_parameters()} == {"analog_ctx", "bias"}
    assert "weight" not in layer.state_dict()
    assert not dict(layer.named_buffers(recurse=False))
    other = analog(nn.Linear(5, 4), device)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert type(twin) is type(layer)
        assert torch.equal(twin.weight, layer.weight)
        assert torch.equal(twin.bias, layer.bias)
        layer_before = layer.weight.clone()
        twin.set_weights(torch.zeros(4, 5), torch.zeros(4))
        assert not twin.weight.clone().any()
        assert torch.equal(layer.weight, layer_before)


COMPUTATIONS = {
    "F.linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "matmul": lambda layer, x: x @ layer.weight.T,
    "einsum": lambda layer, x: torch.einsum("bi,oi->bo", x, layer.weight),
    "cast first": lambda layer, x: F.linear(x, layer.weight.to(x.dtype)),
    "fused": lambda layer, x: F.linear(x, torch.cat([layer.weight, layer.weight])),
    "sliced": lambda layer, x: x @ layer.weight[:2].T,
    "penalty": lambda layer, x: layer.weight.square().sum(),
    "out of place": lambda layer, x: layer.weight * 2,
    "through data": lambda layer, x: F.linear(x, layer.weight.data),
}
WRITES = {
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "data": lambda layer: layer.weight.data.normal_(),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(4, 5)),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "assigned": lambda layer: setattr(layer, "weight", torch.zeros(4, 5)),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 5))),
    "bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", COMPUTATIONS)
def test_computing_past_the_tile_is_refused(case, grad):
    layer = analog(nn.Linear(5, 4))
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(UsageError, match=r"computes with .* '0'.*device=\{..., '0': None"),
    ):
        COMPUTATIONS[case](layer, torch.randn(2, 5))


@pytest.mark.parametrize("case", WRITES)
def test_writing_past_the_tile_is_refused(case):
    layer = analog(nn.Linear(5, 4))
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(UsageError, match=r"analog layer '0' .* layer\.set_weights"):
        WRITES[case](layer)
    assert torch.equal(layer.weight, before)


def test_code_that_gets_past_the_guard_sees_no_number():
    with torch._C.DisableTorchFunctionSubclass():
        assert analog(nn.Linear(5, 4)).weight.isnan().all()


def test_optimizers_do_not_take_it():
    layer = analog(nn.Linear(5, 4))
    with pytest.raises(UsageError, match="give it parameters"):
        make_analog_aware(torch.optim.SGD([layer.weight], lr=0.1))


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_draws_as_the_digital_layer(name):
    digital = LAYERS[name]()
    layer = analog(digital)
    torch.manual_seed(1)
    layer.to_digital(layer)  # draws random numbers too
    digital.reset_parameters()
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight, digital.weight.detach())
    torch.testing.assert_close(layer.bias, digital.bias)


def test_aihwkit_converts_them_back():
    digital = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    network = copy.deepcopy(digital)
    convert_to_analog(network, "ideal")
    back: Any = convert_to_digital(network)
    assert [type(layer) for layer in back] == [nn.Conv2d, nn.Flatten, nn.Linear]
    for ours, theirs in zip(back.parameters(), digital.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


SHAPES = [nn.Linear(1, 6), nn.Linear(6, 1), nn.Linear(1, 1), nn.Conv1d(1, 5, 1)]


@pytest.mark.parametrize("device", [reram_sb(), residual_learning(reram_sb()), tiki_taka(), tiki_taka_v2(), pcm()])
@pytest.mark.parametrize("layer", SHAPES, ids=repr)
def test_small_layers_keep_their_devices(layer, device):
    """Check that cross-points that vary are not taken for equal ones where a layer has one input or one output."""
    network = nn.Sequential(analog(layer, device))
    (tile,) = network[0].analog_tiles()
    parameters, weight = tile.tile.get_hidden_parameters(), tile.get_weights()[0]
    network.load_state_dict(network.state_dict())
    for other in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        (tile,) = other[0].analog_tiles()
        assert torch.equal(tile.tile.get_hidden_parameters(), parameters)
        assert torch.equal(tile.get_weights()[0], weight)


@pytest.mark.parametrize(
    "device", [soft_bounds(), residual_learning(), symmetric_point_tracking(), tiki_taka_v2(), mixed_precision()]
)
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_a_batch_of_no_samples_goes_through(shape, device):
    layer = analog(nn.Linear(5, 4), device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    weight = layer.weight.clone()
    y = layer(torch.zeros(shape, requires_grad=True))
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    optimizer.step()
    torch.testing.assert_close(torch.as_tensor(layer.weight), weight)
