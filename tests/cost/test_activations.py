"""These tests count what is kept and sent by the addresses of numbers, and compare with closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from aimc_pl.cost import count_work
from aimc_pl.cost.distinct import Distinct
from aimc_pl.models import GPT, ResNet


def addresses(tensor):
    """Return the addresses of all numbers of a tensor."""
    found = {tensor.data_ptr()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = {address + tensor.itemsize * stride * index for address in found for index in range(size)}
    return found


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_views_count_once(seed):
    torch.manual_seed(seed)
    base = torch.arange(60)
    views = [
        base,
        base.view(3, 20).chunk(4, 1)[seed % 4],
        base[7:30],
        base.view(6, 10).t()[2:, ::2],
        base[5].expand(8, 3),
    ]
    views += [base.unfold(0, 8, 3)[:4], base[:0], base.view(torch.int32)[:4]]
    distinct, seen = Distinct(), set()
    for index in torch.randperm(7).tolist():
        before = len(seen)
        seen |= addresses(views[index]) if views[index].numel() else set()
        assert distinct.add(views[index]) == len(seen) - before
    assert distinct.add(torch.zeros(4)) == 4


class Attention(nn.Module):
    """Attention over a boundary: the three parts of one tensor are sent to the second stage, and kept there."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.mix, self.out = nn.Linear(width, 3 * width), nn.Identity(), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.out((self.mix(query) @ key.transpose(1, 2)).softmax(-1) @ value)


@pytest.mark.parametrize(("batch", "length", "width"), [(4, 10, 16), (1, 3, 2)])
def test_parts_of_a_tensor_are_sent_and_kept(batch, length, width):
    network, x = Attention(width), torch.randn(batch, length, width)
    first, second = count_work(network, lambda: network(x).sum(), ["mix"])
    part = batch * length * width
    assert (first.sent, first.returned) == (3 * part, 3 * part)
    assert first.kept == part  # the input of the first layer
    # The three parts, the weights of attention and the input of the last layer.
    assert second.kept == 3 * part + batch * length**2 + part


def test_what_is_sent_first_without_a_gradient_and_then_with_one_comes_back():
    network = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 4)})

    def step(x):
        x = network["a"](x)
        return (network["b"](x.detach()) + x).sum()

    first, _ = count_work(network, lambda: step(torch.ones(2, 3)), ["b"])
    assert (first.sent, first.returned) == (8, 8)


def kept_by(function, network):
    """Return the number of addresses that autograd keeps, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept, alive = set(), []

    def keep(tensor):
        alive.append(tensor)
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in own:
            kept.update(addresses(tensor))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = function()  # noqa: F841, the graph must live
    return len(kept)


def on_images(network, size=32):
    return network, lambda: network(torch.randn(2, 3, size, size)).sum()


def torchvision_network(name, **arguments):
    models = pytest.importorskip("torchvision").models
    return on_images(getattr(models, name)(**arguments))


def vision_transformer():
    models = pytest.importorskip("torchvision").models
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return on_images(models.VisionTransformer(**size))


def gpt():
    network = GPT(11, 2, 8, 2, 6, dropout=0.1)
    return network, lambda: network(torch.zeros(3, 6, dtype=torch.int64)).sum()


def lstm():
    network = nn.LSTM(5, 7, 2, bidirectional=True, dropout=0.1)
    return network, lambda: network(torch.randn(6, 4, 5))[0].sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_images(ResNet(8, width=4), 16),
        gpt,
        lstm,
        lambda: torchvision_network("resnet18", num_classes=10),
        lambda: torchvision_network("mobilenet_v3_small", num_classes=10),
        vision_transformer,
    ],
    ids=["resnet", "gpt", "lstm", "resnet18", "mobilenet_v3_small", "vit"],
)
def test_what_networks_keep(make, monkeypatch):
    network, step = make()
    (work,) = count_work(network, step)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # it would hide the inside of an LSTM
    assert work.kept == kept_by(step, network)
    assert work.parameters == work.trained == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("layers", [1, 3])
def test_copies_of_weights_in_autocast_are_weights(layers):
    width, batch = 6, 4
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    x = torch.randn(batch, width)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return network(x).sum()

    (work,) = count_work(network, step)
    (plain,) = count_work(network, lambda: network(x).sum())
    assert work == plain
    assert work.kept == layers * batch * width
    assert work.gradient_flops == layers * 2 * batch * width**2


def test_a_weight_for_every_sample_is_an_activation():
    token = nn.Linear(4, 1)
    (work,) = count_work(
        token, lambda: (token.weight.expand(5, 4).clone() * torch.zeros(5, 4, requires_grad=True)).sum()
    )
    assert work.kept == 2 * 5 * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_is_computed_again(reentrant):
    network = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    (plain,) = count_work(network, lambda: network(x).sum())
    (found,) = count_work(
        network, lambda: network[3](checkpoint(network[1:3], network[0](x), use_reentrant=reentrant)).sum()
    )
    again = 2 * 4 * 6 * 7 + 4 * 7
    assert found.forward_flops == plain.forward_flops
    assert found.backward_flops == plain.backward_flops + again
    assert found.moved_back == plain.moved_back + 4 * (6 + 7) + 2 * 4 * 7
    assert (found.parameters, found.parameters_back, found.trained) == (plain.parameters,) * 3
    # The input of the region is kept, and so is its output, as the input of the last layer. The first layer's, too.
    assert found.kept == 4 * (5 + 6 + 7)


def test_what_dropout_keeps():
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5))
    (work,) = count_work(network, lambda: network(torch.randn(4, 3)).sum())
    assert work.kept == 4 * 3 + 4 * 8  # the input, and the mask


def test_tied_weights_count_once_in_a_stage():
    network = nn.ModuleDict(
        {"tokens": nn.Embedding(10, 6), "mix": nn.Linear(6, 6), "head": nn.Linear(6, 10, bias=False)}
    )
    network["head"].weight = network["tokens"].weight

    def step():
        return network["head"](network["mix"](network["tokens"](torch.arange(4)))).sum()

    (whole,) = count_work(network, step)
    assert whole.parameters == whole.trained == 60 + 42
    # Stages that share it each have a copy.
    assert [work.parameters for work in count_work(network, step, ["mix", "head"])] == [60, 42, 60]


def test_weights_that_share_one_storage_count_all():
    network = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)])
    flat = torch.randn(20)
    network[0].weight = nn.Parameter(flat[:12].view(4, 3))
    network[1].weight = nn.Parameter(flat[12:].view(2, 4))
    (work,) = count_work(network, lambda: network[1](network[0](torch.ones(1, 3))).sum())
    assert work.parameters == work.trained == 20


def test_what_is_frozen_or_without_gradients_does_not_learn():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    network[1].requires_grad_(False)

    def step():
        with torch.no_grad():
            x = network[0](torch.ones(2, 3))
        return network[2](network[1](x)).sum()

    (work,) = count_work(network, step)
    assert work.parameters == 16 + 25 + 12
    # The second layer has no backward: nothing before it learns.
    assert work.parameters_back == work.trained == 12
    assert work.backward_flops == 2 * 2 * 5 * 2 + 2 * 2
    assert work.moved_back == 2 * (5 + 2) + 2 * 2 + 1
    assert work.kept == 2 * 5


def test_an_uneven_batch_and_a_batch_in_a_dict():
    network = nn.Linear(3, 4)
    for batch in ({"x": torch.ones(7, 3), "y": torch.zeros(7, dtype=torch.int64)}, None):
        x, y = (batch["x"], batch["y"]) if batch else (torch.ones(3, 3), torch.zeros(3, dtype=torch.int64))
        (work,) = count_work(network, lambda: F.cross_entropy(network(x), y))  # noqa: B023, called at once
        assert work.batch == len(x) * 4
        assert work.gradient_flops == 2 * len(x) * 12
