"""These tests compare counted work with closed forms of small networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aimc_pl.cost import Learning, Matrix, count_work
from aimc_pl.devices import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.models import GPT, ResNet


class Skipping(nn.Module):
    """Three layers, the output of the first of which the third uses too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x):
        first = self.a(x)
        return self.c(self.b(first).relu() + first)


def count(network, x, split_at=(), **kwargs):
    return count_work(network, lambda: network(x).sum(), split_at, **kwargs)


@pytest.mark.parametrize("batch", [1, 6])
def test_a_linear_layer_and_an_activation(batch):
    (work,) = count(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), torch.randn(batch, 5))
    products, outputs = 2 * batch * 5 * 7, 7 * batch
    # The activation and the sum take a FLOP for each output. The input needs no gradient.
    assert work.forward_flops == products + outputs + outputs
    assert work.backward_flops == products + outputs + outputs
    assert work.parameters == 5 * 7 + 7
    assert work.batch == 5 * batch
    assert work.kept == 5 * batch + outputs  # the input of the layer, and the output of the activation
    # The layer reads its input and writes its output, the activation and the sum likewise; the sum writes one number.
    assert work.moved == 5 * batch + outputs + 2 * outputs + outputs + 1


def test_the_backward_of_a_layer_whose_input_needs_a_gradient_takes_twice_the_products():
    network = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    first, second = count(network, torch.randn(4, 5), ["1"])
    assert first.forward_flops == first.backward_flops == first.gradient_flops == 2 * 4 * 5 * 7
    assert second.gradient_flops == 2 * 4 * 7 * 3
    assert (first.gradient_numbers, second.gradient_numbers) == (4 * (5 + 7), 4 * (7 + 3))  # inputs and errors
    assert second.forward_flops == 2 * 4 * 7 * 3 + 4 * 3
    assert second.backward_flops == 2 * 2 * 4 * 7 * 3 + 4 * 3


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(stride):
    (work,) = count(nn.Conv2d(3, 8, 3, stride, padding=1, bias=False), torch.randn(2, 3, 16, 16))
    positions = (16 // stride) ** 2
    assert work.forward_flops == 2 * 2 * positions * 8 * 27 + 2 * 8 * positions
    assert work.gradient_flops == 2 * 2 * positions * 8 * 27
    assert work.gradient_numbers == 2 * (3 * 16 * 16 + 8 * positions)


def test_attention():
    heads, length, size = 2, 12, 16
    x = torch.randn(3, heads, length, size, requires_grad=True)
    (work,) = count_work(nn.Identity(), lambda: F.scaled_dot_product_attention(x, x, x).sum())
    scores = 3 * heads * length**2
    softmax = 5 * scores
    assert work.forward_flops == 2 * 2 * scores * size + softmax + x.numel()
    # The backward computes the scores again. Four products follow: the errors of values, scores, queries and keys.
    assert work.backward_flops == (2 * scores * size + softmax) + 4 * 2 * scores * size + softmax + x.numel()
    assert work.gradient_flops == work.gradient_numbers == 0  # no product has weights


def test_a_norm_takes_eight_flop_for_each_element():
    (work,) = count(nn.LayerNorm(6), torch.randn(4, 6))
    assert work.forward_flops == 8 * 4 * 6 + 4 * 6


def test_what_a_later_stage_uses_passes_through_all_stages_between():
    parts = count(Skipping(), torch.randn(4, 5), ["b", "c"])
    # The skip and the activation are added in the part of "b".
    assert [part.sent for part in parts] == [4 * 7, 4 * 7, 0]
    network = Skipping()
    network.forward = lambda x: network.c(network.b(first := network.a(x))).sum() + first.sum()
    parts = count(network, torch.randn(4, 5), ["b", "c"])
    assert [part.sent for part in parts] == [4 * 7, 2 * 4 * 7, 0]
    assert [part.returned for part in parts] == [4 * 7, 2 * 4 * 7, 0]


def test_what_needs_no_gradient_does_not_come_back():
    network = Skipping()
    network.forward = lambda x: network.b(network.a(x)) * x.abs().sum()
    first, second = count(network, torch.randn(4, 5), ["b"])
    assert first.sent == 4 * 7
    network.forward = lambda x: (network.b(first := network.a(x)) * first.detach().abs().mul(2)).sum()
    first, second = count(network, torch.randn(4, 5), ["b"])
    assert (first.sent, first.returned) == (4 * 7, 4 * 7)
    assert second.sent == 0


def test_what_reads_a_view_reads_no_more():
    network, x = nn.Linear(5, 7), torch.randn(40, 5)
    (work,) = count_work(network, lambda: network(x[:4]).sum())
    assert work.batch == work.kept == 4 * 5


def test_parts_add_up_to_the_whole():
    network, x = ResNet(8, width=4), torch.randn(2, 3, 16, 16)
    (whole,) = count(network, x)
    parts = count(network, x, ["group1.0.conv2", "group2", "group3.0.bn1", "fc"])
    for name in ("forward_flops", "backward_flops", "moved", "batch", "parameters"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    # A boundary keeps copies on both sides.
    assert sum(part.kept for part in parts) >= whole.kept


def test_calls_without_gradients_open_no_part():
    network = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    x = torch.randn(4, 5)

    def step():
        with torch.no_grad():
            mean = network[1](x).mean()
        return (network(x) - mean).sum()

    first, second = count_work(network, step, ["1"])
    assert first.forward_flops == 2 * 2 * 4 * 5 * 5 + 4 * 5  # two products and the mean
    assert second.forward_flops == 2 * 4 * 5 * 5 + 2 * 4 * 5
    with torch.no_grad():
        assert [part.backward_flops for part in count_work(network, step, ["1"])] == [0, 0]


def test_counting_is_deterministic_and_leaves_the_network_alone():
    torch.manual_seed(0)
    network, tokens = GPT(11, 2, 8, 2, 6), torch.randint(11, (3, 6))
    before = network(tokens).sum()
    assert count(network, tokens, ["blocks.1", "head"]) == count(network, tokens, ["blocks.1", "head"])
    assert network(tokens).sum() == before
    assert not torch.nn.modules.module._has_any_global_hook()


@pytest.mark.parametrize("device", ["ideal", "soft_bounds"])
def test_layers_on_crossbars(device):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    digital = count(network, x := torch.randn(2, 3, 6, 6), ["3"])
    convert_to_analog(network, device)
    first, second = count(network, x, ["3"])
    learning = Learning()
    assert first.matrices == [Matrix("0", 8, 27, 2 * 36, 2 * 3 * 36, 0, 2 * 36, 0, learning)]
    assert second.matrices == [Matrix("3", 5, 8 * 36, 2, 2 * 8 * 36, 2, 2, 0, learning)]
    # What the simulation of a tile computes is no work of the digital unit. The bias is.
    assert first.forward_flops == 2 * 8 * 36 + 2 * 8 * 36
    assert first.parameters == 8
    assert first.gradient_flops == second.gradient_flops == 0
    # Activations, and what crosses the boundary, are the same as in the digital network.
    for analog, same in zip((first, second), digital, strict=True):
        for name in ("kept", "sent", "returned", "batch"):
            assert getattr(analog, name) == getattr(same, name), name


@pytest.mark.parametrize(
    ("split_at", "message"), [(["x"], "split_at names 'x', which the step does not call"), (["1", "0"], "out of order")]
)
def test_wrong_boundaries_are_refused(split_at, message):
    with pytest.raises(UsageError, match=message):
        count(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(1, 2), split_at)
