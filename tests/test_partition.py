"""Networks split into stages compute what they computed before, and what cannot be split says why."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from aimc_pl.devices import convert_to_analog
from aimc_pl.models import ResNet
from aimc_pl.partition import PartitionError, balance, bind_inputs, partition
from aimc_pl.stage import Stage


class Attributes(nn.Module):
    """Layers as attributes, a skip over two layers, a constant argument and a mask that every layer uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.rand(6))
        self.shift = nn.Buffer(torch.rand(6))

    def forward(self, x, mask, flip: bool = False, *, scale=None):
        first = F.relu(self.a(x) * mask)
        second = torch.tanh(self.b(first) * mask) + self.shift
        if flip:
            second = second.flip(1)
        if scale is not None:
            second = second * scale
        return {"out": self.c(second + first) * self.gain, "shape": x.shape[0]}


def run_stages(stages, values):
    stages = [Stage(index, stage) for index, stage in enumerate(stages)]
    for stage in stages:
        values = stage.forward(0, values)
    return values, stages


@pytest.mark.parametrize("kwargs", [{}, {"flip": True}, {"scale": 2.0}, {"scale": torch.tensor(3.0)}])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_stages_compute_the_network(num_stages, kwargs):
    torch.manual_seed(0)
    network = Attributes().double()
    x, mask = torch.randn(4, 6).double(), torch.rand(6).double()
    expected = network(x, mask, **kwargs)
    parts = partition(copy.deepcopy(network), num_stages, (x, mask), kwargs)
    stages = partition(network, num_stages, (x, mask), kwargs, parts.split_at).stages
    out, _ = run_stages(stages, bind_inputs(network, (x, mask), kwargs))
    torch.testing.assert_close(out["out"], expected["out"], rtol=0, atol=0)
    assert out["shape"] == 4


@pytest.mark.parametrize("num_stages", [2, 3, 5, 8])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), (2, 3, 32, 32)),
        (lambda: ResNet(14, width=4), (2, 3, 16, 16)),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), (2, 3, 32, 32)),
    ],
)
def test_gradients_per_parameter(make, shape, num_stages):
    """Outputs and the gradient of every parameter are bitwise those of the unsplit network."""
    torch.manual_seed(0)
    network = make().double()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    reference, x = copy.deepcopy(network), torch.randn(shape).double()
    split_at = partition(copy.deepcopy(network), num_stages, (x,)).split_at
    out, stages = run_stages(partition(network, num_stages, (x,), split_at=split_at).stages, (x,))
    gradient = torch.randn_like(out)
    expected = reference(x)
    assert torch.equal(out, expected)
    expected.backward(gradient)
    for stage in reversed(stages):
        gradient = stage.backward(0, gradient)
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14, msg=name)
    for ours, theirs in zip(network.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_stages", [2, 4, 7])
def test_every_parameter_and_buffer_on_exactly_one_stage(num_stages):
    network = ResNet(8)
    x = torch.randn(2, 3, 16, 16)
    stages = partition(network, num_stages, (x,)).stages
    for kind in ("named_parameters", "named_buffers"):
        expected = {name: id(tensor) for name, tensor in getattr(network, kind)()}
        found = [item for stage in stages for item in getattr(stage, kind)()]
        assert len(found) == len(expected)
        assert {name: id(tensor) for name, tensor in found} == expected


def test_split_inside_a_residual_block():
    network = torchvision.models.resnet18(num_classes=3).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    stages = partition(network, 3, (x,), split_at=["layer1.0.conv2", "layer2.0.downsample.0"]).stages
    out, _ = run_stages(stages, (x,))
    assert torch.equal(out, network(x))


def test_split_before_an_inplace_layer_leaves_the_sender_alone():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(3, 4).double()
    _, stages = run_stages(partition(network, 2, (x,), split_at=["2"]).stages, (x,))
    gradient = torch.ones(3, 2).double()
    for stage in reversed(stages):
        gradient = stage.backward(0, gradient)
    reference = copy.deepcopy(network)
    reference.zero_grad()
    reference[2].inplace = False
    reference(x).backward(torch.ones(3, 2).double())
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_split_at_names_containers_and_layers():
    network = ResNet(14)
    parts = partition(network, 3, (torch.randn(2, 3, 8, 8),), split_at=["group2", "group3.1"])
    names = [{name.split(".")[0] for name, _ in stage.named_parameters()} for stage in parts.stages]
    assert names == [{"conv", "bn", "group1"}, {"group2", "group3"}, {"group3", "fc"}]
    assert parts.split_at == ["group2", "group3.1"]


def test_analog_layers_stay_whole():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    convert_to_analog(network, "ideal")
    x = torch.randn(2, 1, 4, 4)
    parts = partition(network, 2, (x,), split_at=["3"])
    out, _ = run_stages(parts.stages, (x,))
    torch.testing.assert_close(out, network(x))


def test_control_flow_in_a_submodule_keeps_it_whole():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.up(x) if x.sum() > 0 else self.down(x)

    network = nn.Sequential(nn.Linear(4, 4), Branch(), nn.Linear(4, 2))
    stages = partition(network, 3, (torch.randn(2, 4),), split_at=["1", "2"]).stages
    for x in (torch.ones(2, 4), -torch.ones(2, 4), 10 * torch.randn(2, 4)):
        out, _ = run_stages(stages, (x,))
        assert torch.equal(out, network(x))


def test_a_module_with_a_hook_stays_whole():
    seen = []
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    network[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    run_stages(partition(network, 2, (torch.randn(3, 4),), split_at=["2"]).stages, (torch.randn(3, 4),))
    assert seen == [(3, 4)]


def test_control_flow_in_forward_names_the_line():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            if x.sum() > 0:
                x = self.b(x)
            return x

    with pytest.raises(PartitionError, match=r"`if x\.sum\(\) > 0:` .*test_partition\.py:\d+.*submodule of its own"):
        partition(Bad(), 2, (torch.randn(2, 4),))


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen = None

    def forward(self, x):
        self.seen = self.a(x)
        return self.b(self.seen)


def test_a_forward_that_stores_values_stays_whole():
    network = nn.Sequential(Remembers(), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    stages = partition(network, 2, (x,), split_at=["1"]).stages
    assert network[0].seen is None
    run_stages(stages, (x,))
    assert torch.equal(network[0].seen, network[0].a(x))
    with pytest.raises(PartitionError, match=r"it stores a value in self\.seen.*submodule of its own"):
        partition(Remembers(), 2, (x,))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.d(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


def test_tied_layers_stay_together():
    parts = partition(Tied(), 2, (torch.randn(2, 4),))
    assert parts.split_at == ["d"]
    with pytest.raises(PartitionError, match=r"3 stages need at least 3 layers .* has 2 .*share a parameter"):
        partition(Tied(), 3, (torch.randn(2, 4),))
    with pytest.raises(PartitionError, match="Tied parameters must stay on one stage"):
        partition(Tied(), 2, (torch.randn(2, 4),), split_at=["b"])


@pytest.mark.parametrize(
    ("num_stages", "split_at", "message"),
    [
        (9, None, "9 stages need at least 9 layers"),
        (3, ["2"], "3 stages need 2 names in split_at, got 1"),
        (2, ["nowhere"], "names 'nowhere', which the network does not call; it calls"),
        (3, ["4", "2"], "out of order"),
        (3, ["2", "2"], "out of order"),
        (2, ["0"], "leaves a stage empty"),
    ],
)
def test_bad_splits(num_stages, split_at, message):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(PartitionError, match=message):
        partition(network, num_stages, (torch.randn(2, 4),), split_at=split_at)


def test_a_network_without_layers():
    with pytest.raises(PartitionError, match="Flatten has 0"):
        partition(nn.Flatten(), 2, (torch.randn(2, 4),))


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_balance_is_the_best_of_all_splits(groups):
    generator = torch.Generator().manual_seed(groups)
    for length in range(groups, 9):
        costs = torch.rand(length, generator=generator).tolist()

        def worst(cuts, costs=costs):
            return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))

        best = min(worst(cuts) for cuts in itertools.combinations(range(1, length), groups - 1))
        assert worst(balance(costs, groups)) == pytest.approx(best)


def test_balance_follows_measured_cost():
    """Two layers a hundred times as large as the others do not share a stage."""
    layers = [nn.Linear(16, 16) for _ in range(3)] + [nn.Linear(16, 4096), nn.Linear(4096, 16)]
    network = nn.Sequential(*layers, *[nn.Linear(16, 16) for _ in range(3)])
    assert "4" in partition(network, 4, (torch.randn(512, 16),)).split_at
