"""These tests compare exported modules with the analog modules from which they were made."""

import copy
from math import sqrt

import pytest
import torch
from aihwkit.nn import AnalogRNN
from aihwkit.nn.conversion import convert_to_analog as aihwkits_convert_to_analog
from aihwkit.nn.modules.rnn.cells import AnalogVanillaRNNCell
from aihwkit.simulator.configs import InferenceRPUConfig
from aihwkit.simulator.parameters.io import IOParameters
from lightning_modules import MLP, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.analog import analog_layers
from aimc_pl.devices import (
    DEVICES,
    convert_to_analog,
    make_analog_aware,
    residual_learning,
    soft_bounds,
    symmetric_point_tracking,
)
from aimc_pl.errors import UsageError
from aimc_pl.export import to_digital
from aimc_pl.strategies import AnalogPipelineStrategy

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, stride=2), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), (1, 2), padding=(0, 1), dilation=(2, 1)), (3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1), (2, 3, 3, 4)),
}
DEVICES_OF_TESTS = {
    "ideal": DEVICES["ideal"](),
    "mean field": soft_bounds(tau=3.0, perfect_io=True),
    "aihwkit": soft_bounds(tau=3.0, perfect_io=True, backend="aihwkit"),
    "residual learning": residual_learning(soft_bounds(tau=3.0, perfect_io=True), gamma=0.3),
    "tracking": symmetric_point_tracking(soft_bounds(tau=3.0, perfect_io=True), gamma=0.3, chop_prob=0.5),
    "residual learning, aihwkit": residual_learning(soft_bounds(3.0, perfect_io=True, backend="aihwkit"), gamma=0.3),
}
MAPPINGS = {
    "plain": {},
    "scaled": {"weight_scaling_omega": 0.6, "weight_scaling_columnwise": True},
    "bias on the crossbar": {"digital_bias": False, "weight_scaling_omega": 0.6},
    "array": {"max_input_size": 4, "max_output_size": 3, "weight_scaling_omega": 0.6},
    "learned scales": {"learn_out_scaling": True, "out_scaling_columnwise": True},
}


def trained(layer, shape, device, **mapping):
    """Return a network of one analog layer after a few updates, which also move digital biases and scales."""
    torch.manual_seed(0)
    config = copy.deepcopy(device.rpu_config)
    vars(config.mapping).update(mapping)
    network = nn.Sequential(layer)
    convert_to_analog(network, config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (network(torch.randn(6, *shape)) - 1).square().mean().backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("device", DEVICES_OF_TESTS)
def test_outputs_are_those_of_the_analog_layer(layer, device):
    make, shape = LAYERS[layer]
    original = make()
    network = trained(copy.deepcopy(original), shape, DEVICES_OF_TESTS[device])
    digital, x = to_digital(network), torch.randn(7, *shape)
    assert type(digital[0]) is type(original)
    assert repr(digital[0]) == repr(original)
    assert digital.state_dict().keys() == nn.Sequential(original).state_dict().keys()
    torch.testing.assert_close(digital(x), network(x), rtol=1e-5, atol=1e-5)
    assert (digital[0].weight - original.weight).abs().max() > 1e-3


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("device", ["mean field", "aihwkit", "residual learning"])
def test_scales_biases_and_arrays_are_carried_over(mapping, device):
    network = trained(nn.Linear(11, 7), (11,), DEVICES_OF_TESTS[device], **MAPPINGS[mapping])
    x = torch.randn(9, 11)
    torch.testing.assert_close(to_digital(network)(x), network(x), rtol=1e-5, atol=1e-5)


def test_the_weight_of_residual_learning_is_that_of_both_crossbars():
    network = trained(nn.Linear(5, 4), (5,), DEVICES_OF_TESTS["residual learning"])
    p, w = (crossbar.weight for crossbar in analog_layers(network)[0].analog_module.tile.crossbars)
    assert p.abs().max() > 0.01
    torch.testing.assert_close(to_digital(network)[0].weight.detach(), w + 0.3 * p)


def test_the_mean_of_noisy_outputs_is_the_digital_output():
    """Check 28 means of 400 reads to 5 standard errors: one false alarm in 60,000 seeds."""
    device = soft_bounds(tau=3.0)
    device.rpu_config.forward = IOParameters(inp_res=-1, out_res=-1, out_noise=0.06)
    network = trained(nn.Linear(5, 4), (5,), device)
    x = torch.rand(7, 5)
    reads = torch.stack([network(x) for _ in range(400)])
    assert (reads.std(0) > 0.01).all()
    error = (reads.mean(0) - to_digital(network)(x)).abs()
    assert (error < 5 * reads.std(0) / sqrt(400)).all()


def test_the_analog_module_and_random_numbers_stay():
    network = trained(nn.Linear(5, 4), (5,), DEVICES_OF_TESTS["mean field"])
    weight, bias, random = network[0].weight.clone(), network[0].bias.detach().clone(), torch.get_rng_state()
    digital = to_digital(network)
    assert torch.equal(torch.get_rng_state(), random)
    for parameter in digital.parameters():
        nn.init.constant_(parameter, 7.0)
    assert torch.equal(network[0].weight, weight)
    assert torch.equal(network[0].bias, bias)
    assert len(analog_layers(network)) == 1


def test_layers_stay_shared_frozen_and_in_evaluation_mode():
    layer, dropout = nn.Linear(5, 5), nn.Dropout()
    network = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, dropout), "c": nn.Linear(5, 5)})
    convert_to_analog(network, "ideal")
    network["a"].requires_grad_(False).eval()
    digital = to_digital(network)
    assert digital["a"] is digital["b"][0]
    assert [parameter.requires_grad for parameter in digital.parameters()] == [False, False, True, True]
    assert (digital["a"].training, digital["c"].training, digital["b"].training) == (False, True, True)


def test_a_layer_itself_and_a_digital_module_are_copied():
    layer = trained(nn.Linear(5, 4), (5,), DEVICES_OF_TESTS["ideal"])[0]
    assert type(to_digital(layer)) is nn.Linear
    digital = nn.Linear(5, 4)
    copied = to_digital(digital)
    assert copied is not digital
    assert torch.equal(copied.weight, digital.weight)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(5, 4)

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_what_aihwkit_converted_is_plain_again():
    analog = aihwkits_convert_to_analog(Branches(), DEVICES["ideal"]().rpu_config)
    digital, x = to_digital(analog), torch.randn(3, 5)
    assert [*map(type, digital.modules())] == [Branches, nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(digital(x), analog(x))
    recurrent = AnalogRNN(AnalogVanillaRNNCell, 3, 4, rpu_config=DEVICES["ideal"]().rpu_config)
    steps = torch.randn(6, 2, 3)
    digital = to_digital(recurrent)
    assert analog_layers(recurrent)
    assert not analog_layers(digital)
    torch.testing.assert_close(digital(steps)[0], recurrent(steps)[0])


@pytest.mark.slow
def test_the_conv1d_of_transformers_comes_back():
    from transformers.pytorch_utils import Conv1D

    network = trained(Conv1D(4, 5), (5,), DEVICES_OF_TESTS["mean field"])
    digital, x = to_digital(network), torch.randn(3, 5)
    assert type(digital[0]) is Conv1D
    assert digital[0].weight.shape == (5, 4)
    torch.testing.assert_close(digital(x), network(x))


def drifted():
    config = InferenceRPUConfig()
    network = nn.Sequential(nn.Linear(5, 4))
    convert_to_analog(network, config)
    network.eval()
    network[0].drift_analog_weights(1e6)
    return network


def scaled():
    device = soft_bounds()
    device.rpu_config.forward.out_scale = 2.0
    network = nn.Sequential(nn.Linear(5, 4))
    convert_to_analog(network, device)
    return network


@pytest.mark.parametrize("make", [drifted, scaled])
def test_scales_that_a_digital_layer_does_not_have_are_refused(make):
    with pytest.raises(UsageError, match="'0' scales its outputs apart") as error:
        to_digital(make())
    assert len(str(error.value)) <= 200


@pytest.mark.slow
def test_a_fitted_lightning_module_becomes_a_plain_one():
    strategy = AnalogPipelineStrategy(2, "async", 2, device=soft_bounds(perfect_io=True), split_at=["net.4"])
    module = MLP()
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(3, (32,))), 8)
    make_trainer(strategy, max_epochs=1, limit_val_batches=0, precision="32-true").fit(module, data)
    digital, x = to_digital(module), torch.randn(5, 6)
    assert type(digital) is MLP
    torch.testing.assert_close(digital.net(x), module.net(x))
    MLP().load_state_dict(digital.state_dict())
    make_trainer("auto", max_epochs=1, limit_val_batches=0, precision="32-true").fit(digital, data)


@pytest.fixture
def exportable():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    convert_to_analog(network, soft_bounds(perfect_io=True))
    return network.eval(), to_digital(network).eval()


@pytest.mark.slow
def test_torch_export(exportable):
    analog, digital = exportable
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(digital, (torch.randn(2, 1, 6, 6),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 1, 6, 6)
    torch.testing.assert_close(program.module()(x), analog(x))


@pytest.mark.slow
def test_onnx(exportable, tmp_path):
    import onnxruntime

    analog, digital = exportable
    x = torch.randn(2, 1, 6, 6)
    torch.onnx.export(digital, (x,), tmp_path / "net.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), analog(x))
