"""These tests check which layers become analog, that their tiles compute, and what is reported of the other layers."""

import copy
import warnings

import pytest
import torch
from aihwkit.nn import AnalogLinear
from aihwkit.simulator.configs import SingleRPUConfig, SoftBoundsDevice, TorchInferenceRPUConfig
from aihwkit.simulator.presets import EcRamPreset, MixedPrecisionReRamSBPreset, PCMPreset, TikiTakaReRamSBPreset
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from aimc_pl.devices import (
    DEVICES,
    ConfiguredDevice,
    analog_layers,
    convert_to_analog,
    mixed_precision,
    pcm,
    soft_bounds,
    to_mean_field,
)
from aimc_pl.devices.conversion import check_devices_stay, describe_layers, describe_slow
from aimc_pl.errors import UsageError


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as transformers defines it."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def deprecated_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(nn.Linear(4, 4))


STAY_DIGITAL = {
    "grouped convolution": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "padding 'reflect'": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "padding 'same'": lambda: nn.Conv2d(4, 4, 3, padding="same"),
    "dilated convolution": lambda: nn.Conv1d(4, 4, 3, dilation=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "LazyLinear": lambda: nn.LazyLinear(4),
    "OwnLinear": lambda: OwnLinear(4, 4),
    "ParametrizedLinear": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "ParametrizedConv2d": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "weight is computed from others": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
    "its weight is computed from others": deprecated_weight_norm,
}


@pytest.mark.parametrize("reason", STAY_DIGITAL)
def test_what_cannot_be_analog_stays_digital_and_is_named(reason):
    network = nn.Sequential(nn.Linear(4, 4), STAY_DIGITAL[reason]())
    other = network[1]
    assert convert_to_analog(network, "ideal") == ["0"]
    assert network[1] is other
    assert describe_layers(network).startswith("1 of 2 layers analog (ideal), ")
    assert "; digital: 1 (" in describe_layers(network)
    assert f"{reason})" in describe_layers(network)
    assert convert_to_analog(network, {"*": "ideal", "1": None}) == []
    with pytest.raises(UsageError, match=rf"layer '1' cannot be analog \(.*{reason}\): keep it digital"):
        convert_to_analog(network, {"1": "ideal"})
    with pytest.raises(UsageError, match=rf"nothing to convert: .* but 0 \(.*{reason}\)"):
        convert_to_analog(nn.Sequential(other), "ideal")


def test_dilated_images_are_analog():
    digital = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=2, stride=2))
    network, x = copy.deepcopy(digital), torch.randn(2, 3, 9, 9)
    assert convert_to_analog(network, "ideal") == ["0"]
    torch.testing.assert_close(network(x), digital(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["ideal", soft_bounds(perfect_io=True)])
def test_linear_of_gpt2(device, training):
    """Check outputs, the errors sent back and the operands of the update. The weights are transposed."""
    torch.manual_seed(0)
    digital = nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)).train(training)
    for parameter in digital.parameters():
        parameter.data.mul_(0.1)
    network = copy.deepcopy(digital)
    assert convert_to_analog(network, device) == ["0", "2"]
    assert network[0].training is training
    x = torch.randn(2, 5, 4)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = network(ours), digital(theirs)
    torch.testing.assert_close(out, expected)
    error = torch.randn_like(out)
    out.backward(error)
    expected.backward(error)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert network[0].weight.shape == (4, 6)
    torch.testing.assert_close(network[0].weight, digital[0].weight.detach())
    torch.testing.assert_close(network[0].bias.grad, digital[0].bias.grad)
    if device == "ideal":
        context = network[0].analog_module.analog_ctx
        update = context.analog_input[0].flatten(0, -2).T @ context.analog_grad_output[0].flatten(0, -2)
        torch.testing.assert_close(update, digital[0].weight.grad)


def called_tiles(network):
    called = []
    for layer in analog_layers(network):
        layer.analog_module.register_forward_hook(lambda tile, *args: called.append(tile))
    return called


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # nn.TransformerEncoder's own
@pytest.mark.parametrize("mode", ["train", "eval", "no grad", "padded"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoders_go_through_the_tiles(mode, norm_first):
    """Check that the tiles are called, also in evaluation, where torch's layer would read their weights instead."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    digital = nn.Sequential(nn.TransformerEncoder(block, 2, enable_nested_tensor=not norm_first))
    digital.train(mode == "train")
    network = copy.deepcopy(digital)
    convert_to_analog(network, "ideal")
    called = called_tiles(network)
    x = torch.randn(3, 5, 8)
    arguments = {}
    if mode == "padded":
        arguments["src_key_padding_mask"] = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with torch.set_grad_enabled(mode in ("train", "eval")):
        out, expected = network[0](x, **arguments), digital[0](x, **arguments)
    valid = ~arguments.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    torch.testing.assert_close(out[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert called == [layer.analog_module for layer in analog_layers(network)]
    assert len(called) == 4
    # The output follows the weights that the tiles hold now, not those at the conversion.
    network[0].layers[1].linear2.set_weights(torch.zeros(8, 16), torch.zeros(8))
    with torch.no_grad():
        assert not torch.allclose(network[0](x, **arguments)[valid], expected[valid], atol=1e-2)


def test_padding_reaches_a_half_analog_encoder():
    """Check that no digital block takes the fast path, which would hand the analog block a nested tensor."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    digital = nn.TransformerEncoder(block, 2).eval()
    network = copy.deepcopy(digital)
    convert_to_analog(network, {"layers.1.*": "ideal"})
    padded = torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        x = torch.randn(2, 5, 8)
        out, expected = (net(x, src_key_padding_mask=padded)[~padded] for net in (network, digital))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_attention_stays_digital():
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)
    attention = network.layers[0].self_attn
    assert len(convert_to_analog(network, "soft_bounds")) == 8
    assert network.layers[0].self_attn is attention
    assert not analog_layers(attention)
    assert describe_layers(network) == (
        "8 of 16 layers analog (soft_bounds), 42.7 % of weights; digital: "
        "layers.*.self_attn (4 layers: MultiheadAttention), "
        "layers.*.self_attn.out_proj (4 layers: MultiheadAttention reads its weight)"
    )


def test_heads_tied_to_an_embedding_stay_digital():
    network = LanguageModel()
    assert convert_to_analog(network, "ideal") == ["body"]
    assert network.head.weight is network.embedding.weight
    assert (
        describe_layers(network)
        == "1 of 2 layers analog (ideal), 33.3 % of weights; digital: head (shares its weight with embedding)"
    )
    with pytest.raises(UsageError, match="'head' cannot be analog"):
        convert_to_analog(network, {"head": "ideal"})


def test_tied_layers_are_refused_before_anything_is_converted():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    with pytest.raises(UsageError, match="'0' and '1' share their weight"):
        convert_to_analog(network, "ideal")
    assert not analog_layers(network)


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    assert convert_to_analog(network, "ideal") == ["0"]
    assert network[0] is network[1][1]


def test_description_names_devices_and_reasons():
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    convert_to_analog(network, {"[01]": "ecram", "2": soft_bounds(tau=4.0)})
    assert describe_layers(network) == (
        "3 of 9 layers analog (2 ecram, 1 soft_bounds(tau=4.0)), 26.7 % of weights; digital: * (6 layers: no device)"
    )
    convert_to_analog(network, {"[3-6]": "ideal"})
    assert describe_layers(network).endswith("; digital: 7, 8 (no device)")
    convert_to_analog(network, "ideal")
    assert describe_layers(network) == (
        "9 of 9 layers analog (2 ecram, 1 soft_bounds(tau=4.0), 6 ideal), 80.0 % of weights"
    )


def test_weights_in_mixed_precision_count_as_analog():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert_to_analog(network, mixed_precision(soft_bounds()))
    assert describe_layers(network).endswith(", 80.0 % of weights")


def test_a_configuration_on_the_slow_backend_is_told():
    """Check that only the user's own configurations count, and only those that the mean-field tile can simulate."""
    slow, other = SingleRPUConfig(device=SoftBoundsDevice()), SingleRPUConfig(device=SoftBoundsDevice(diffusion=0.1))
    assert (describe_slow(slow) or "").startswith("SingleRPUConfig runs on aihwkit's tiles")
    assert describe_slow({"0": "ideal", "1": slow}) == describe_slow(slow) == describe_slow(ConfiguredDevice(slow))
    for preset in (TikiTakaReRamSBPreset(), MixedPrecisionReRamSBPreset(), PCMPreset()):
        assert (describe_slow(preset) or "").startswith(f"{type(preset).__name__} runs on aihwkit's tiles")
    for device in (
        None,
        "soft_bounds",
        soft_bounds(backend="aihwkit"),
        to_mean_field(slow),
        other,
        {"0": None},
        pcm(backend="aihwkit"),
    ):
        assert describe_slow(device) is None


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, 3)])
@pytest.mark.parametrize("is_small", [False, True])
def test_tiles_that_take_no_images_are_refused_and_the_network_stays_as_it_was(layer, is_small):
    """Check tiles of torch, which take none, and aihwkit's arrays of small tiles."""
    rpu_config = SingleRPUConfig() if is_small else TorchInferenceRPUConfig()
    if is_small:
        rpu_config.mapping.max_input_size = 4
    network = nn.Sequential(nn.Linear(2, 2), layer)
    message = rf"{type(layer).__name__} '1' cannot be analog on (TileModuleArray|TorchInferenceTile), which takes no"
    with pytest.raises(UsageError, match=message):
        convert_to_analog(network, rpu_config)
    assert analog_layers(network) == []


@pytest.mark.parametrize("name", [name for name in DEVICES if name not in {"piecewise_step", "weight_scaling"}])
def test_a_layer_stays_on_its_device(name):
    """The same device may be chosen again, for example in a second fit. Another one would be ignored, so it is not."""
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    convert_to_analog(network, name)
    check_devices_stay(network, name)
    check_devices_stay(network, {"1": name})
    for other in (soft_bounds(tau=0.123), {"1": soft_bounds(tau=0.123)}, {"1": None}):
        with pytest.raises(UsageError, match=r"layer '[01]' is on .* already, and device= asks for (soft_bounds|none)"):
            check_devices_stay(network, other)


def test_the_own_analog_layers_of_a_module_stay_beside_a_device():
    own = AnalogLinear(4, 3, True, EcRamPreset())
    network = nn.Sequential(own, nn.Linear(3, 2))
    check_devices_stay(network, "soft_bounds")
    assert convert_to_analog(network, "soft_bounds") == ["1"]
    assert network[0] is own
