"""These tests run one stage per process without processes: each stage has a copy of the module."""

import copy
import gc
import pickle
import random
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Precision

from aimc_pl.devices.conversion import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.ghosts import Ghosts, Unknown
from aimc_pl.private_torch import TorchDispatchMode
from aimc_pl.weights import read_gradients


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """A network that computes its loss. ``boundaries`` suffice for up to four stages."""

    boundaries: tuple[str, ...] = ("layers.1", "layers.2", "layers.3")
    width = 6

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(4))
        self.steps = 0

    @staticmethod
    def batch(size=4):
        return torch.randn(size, 6), torch.randn(size, 6)

    def step(self, batch):
        x, y = batch
        return F.mse_loss(self.run(x), y)

    def run(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def own(module, boundaries, batch):
    """Return the names of all parameters with their stages.

    It is the first stage in which a module with the parameter is called that has no boundary inside.
    """
    stage, owners, hooks = 0, {}, []

    def note(name, inner):
        def hook(*_):
            nonlocal stage
            if name in boundaries[stage : stage + 1]:
                stage += 1
            if not any(b.startswith(f"{name}.") or not name for b in boundaries):
                for p, _ in inner.named_parameters(remove_duplicate=False):
                    owners.setdefault(f"{name}.{p}", stage)

        return hook

    for name, inner in module.named_modules():
        hooks.append(inner.register_forward_pre_hook(note(name, inner)))
    module.step(batch)
    for hook in hooks:
        hook.remove()
    return owners


class Pipeline:
    """A copy of the module for every stage, and the calls that the processes of the stages would make."""

    def __init__(self, module, boundaries, batch, owners=None):
        self.plain = module
        probe = copy.deepcopy(module)
        self.owners = own(probe, boundaries, batch) | (owners or {})
        self.modules = [copy.deepcopy(module) for _ in range(len(boundaries) + 1)]
        self.ghosts = [Ghosts(m, boundaries, stage, self.owners) for stage, m in enumerate(self.modules)]
        for ghosts in self.ghosts:
            ghosts.free()

    def forward(self, batch, seed=1, method="step", infer=False):
        flights, message = [], None
        for module, ghosts in zip(self.modules, self.ghosts, strict=True):
            run = ghosts.infer if infer else ghosts.forward
            step = getattr(module, method)
            with ghosts.intercepting():
                flight = run(lambda step=step: step(batch), message, seed, (method, batch))
            message = pickle.loads(pickle.dumps(flight.outgoing))
            flights.append(flight)
        return flights

    def backward(self, flights):
        message = None
        for stage in reversed(range(len(flights))):
            weight = torch.ones(()) if stage == len(flights) - 1 else None
            message = pickle.loads(pickle.dumps(self.ghosts[stage].backward(flights[stage], message, weight)))
        assert message is None

    def gradients(self):
        return {n: self.modules[stage].get_parameter(n).grad for n, stage in self.owners.items()}

    def zero_grad(self):
        for module in (self.plain, *self.modules):
            module.zero_grad()

    def check(self, batch, seed=1):
        """Compare the loss and every gradient with those of the undivided module."""
        flights = self.forward(batch, seed)
        self.backward(flights)
        self.compare(batch)
        return flights

    def compare(self, *batches):
        for batch in batches:
            loss = self.plain.step(batch)
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
        for name, gradient in self.gradients().items():
            expected = self.plain.get_parameter(name).grad
            assert (gradient is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12, msg=name)
        self.zero_grad()


class Residual(Net):
    boundaries = ("blocks.1", "blocks.2", "blocks.3.conv")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)) + x, inplace=True)

    def __init__(self):
        super().__init__()
        del self.layers
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(4)))
        self.head = nn.Linear(3, 5)

    @staticmethod
    def batch(size=4):
        return torch.randn(size, 2, 5, 5), torch.randint(5, (size,))

    def run(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def step(self, batch):
        return F.cross_entropy(self.run(batch[0]), batch[1])


class Skips(Net):
    """A network in which only the last stage needs a value of stage 0."""

    def run(self, x):
        first = self.layers[0](x)
        second = self.layers[1](torch.tanh(first))
        third = self.layers[2](torch.tanh(second)) * second
        return self.layers[3](third + first) + first * x


class UNet(Residual):
    boundaries = ("down.1", "bottom", "up.0")

    def __init__(self):
        super().__init__()
        del self.blocks, self.head
        self.down = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(2))
        self.bottom = nn.Conv2d(3, 3, 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(6, 3, 2, stride=2) for _ in range(2))
        self.head = nn.Conv2d(6, 2, 1)

    @staticmethod
    def batch(size=2):
        return torch.randn(size, 2, 8, 8), torch.randint(2, (size, 8, 8))

    def run(self, x):
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(torch.relu(down(skips[-1])))
        x = self.bottom(skips[-1])
        for up in self.up:
            x = torch.relu(up(torch.cat([x, skips.pop()], 1)))
        return self.head(torch.cat([x, skips.pop()], 1))


class EncoderDecoder(Net):
    boundaries = ("net.encoder.layers.1", "net.decoder.layers.0", "net.decoder.layers.1")

    def __init__(self):
        super().__init__()
        del self.layers
        self.embed = nn.Embedding(11, 8)
        self.net = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    @staticmethod
    def batch(size=3):
        return torch.randint(11, (size, 5)), torch.randint(11, (size, 4))

    def step(self, batch):
        source, target = batch
        source = self.embed(source)
        mask = self.net.generate_square_subsequent_mask(4)
        hidden = self.net(source, F.one_hot(target, 8 + 3)[..., :8].to(source), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten())


class Recurrent(Net):
    boundaries = ("second", "third", "head")

    def __init__(self):
        super().__init__()
        del self.layers
        self.first, self.second = nn.LSTM(6, 5, batch_first=True), nn.LSTM(5, 5, 2, batch_first=True)
        self.third, self.head = nn.GRU(5, 5, batch_first=True), nn.Linear(5, 6)

    @staticmethod
    def batch(size=3):
        return torch.randn(size, 4, 6), torch.randn(size, 4, 6)

    def run(self, x):
        x, (h, c) = self.first(x)
        x, (h, _) = self.second(x, (h.repeat(2, 1, 1), c.repeat(2, 1, 1)))
        return self.head(self.third(x, h[:1].contiguous())[0] + c.transpose(0, 1))


class Block(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.in_place = in_place

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        scores = (q @ k.transpose(-2, -1)).masked_fill(mask, -torch.inf)
        if self.in_place:
            middle = self.out(scores.softmax(-1) @ v)
            middle += x
            out = self.mlp(self.norm2(middle))
            out += middle
            return out
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.mlp(self.norm2(x))


class GPT(Net):
    boundaries = ("blocks.1", "blocks.2", "blocks.3.mlp")
    in_place = False

    def __init__(self):
        super().__init__()
        del self.layers
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block(self.in_place) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    @staticmethod
    def batch(size=3, length=7):
        return torch.randint(11, (size, length + 1))

    def step(self, batch):
        tokens, targets = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = torch.ones(len(positions), len(positions), dtype=torch.bool).triu(1)
        x = self.token(tokens)
        if self.in_place:
            x += self.position(positions)
        else:
            x = x + self.position(positions)
        for block in self.blocks:
            x = block(x, mask)
            if self.in_place:
                x.mul_(0.9)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class InPlaceGPT(GPT):
    in_place = True


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.tanh(x) * scale

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * ctx.scale * (1 - torch.tanh(x) ** 2), None


class CustomFunctions(Net):
    def run(self, x):
        for layer in self.layers:
            hidden = Squash.apply(layer(x), 1.5)
            with torch.no_grad():
                scale = hidden.abs().mean() + 1
            x = hidden / scale
        return Squash.apply(x, 2.0)


@dataclass
class State:
    hidden: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    named: dict[str, torch.Tensor]
    depth: int = 0


class StateLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.side = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, state):
        hidden = torch.tanh(self.linear(state.hidden)) + sum(state.parts)
        named = {**state.named, str(state.depth): self.side(hidden)}
        return replace(state, hidden=hidden, parts=(*state.parts, hidden / 2), named=named, depth=state.depth + 1)


class Structures(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(StateLayer() for _ in range(4))

    def run(self, x):
        state = State(x, (x,), {})
        for layer in self.layers:
            state = layer(state)
        assert state.depth == 4
        return state.hidden + state.named["0"] + state.named["2"] * state.parts[1]


class InPlace(Net):
    def run(self, x):
        memory = torch.zeros(len(x), 4, 6)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x[:, 0] = 0
            memory[:, i] = x
            x = x.mul_(2) if i % 2 else x.neg_()
            x += memory[:, : i + 1].mean(1)
            x = F.relu_(x) + 0.1
        return x + memory.sum(1)


class Auxiliary(Net):
    """A network that collects losses in a list, some of them inside its layers."""

    class Layer(nn.Linear):
        def forward(self, x, losses):
            losses.append(self.weight.square().sum() * x.mean())
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(6, 6) for _ in range(4))

    def step(self, batch):
        x, losses = batch[0], []
        for layer in self.layers:
            x = torch.tanh(layer(x, losses))
            losses.append(x.square().mean())
        return {"loss": F.mse_loss(x, batch[1]) + 0.1 * sum(losses), "losses": losses}


class BatchOnly(Net):
    """A network with masks and lengths that are computed from the batch, also in Python."""

    def run(self, x):
        mask = x > 0
        shift = torch.linspace(0, 1, int(mask.any(0).sum()) + 1)[-1]
        for layer in self.layers:
            x = layer(x).masked_fill(mask, 0) + shift
            if mask.float().mean() > 2:
                raise AssertionError
        return x


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.linear(torch.sin(x)) * self.scale


class Nested(Net):
    """A network with boundaries inside of modules whose own code continues after them."""

    boundaries = ("net.layers.1.linear", "net.layers.2.linear", "net.layers.3")

    def __init__(self):
        super().__init__()
        del self.layers
        self.net = nn.Module()
        self.net.layers = nn.Sequential(*(Inner() for _ in range(4)))

    def run(self, x):
        return self.net.layers(x)


class Views(Net):
    """A network of functions that may return their own argument, in several layouts."""

    def run(self, x):
        for layer in self.layers:
            hidden = layer(x).t().contiguous().t()
            same = F.dropout(hidden.to(torch.float64), 0.5, training=False).contiguous()
            x = same.reshape(hidden.shape) + nn.Identity()(hidden) * F.dropout(same, 0.0)
        a, b = x.unsqueeze(0).repeat(2, 1, 1)
        return a + b.view(-1).view_as(a)


class Checkpointed(Net):
    def run(self, x):
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return x


class Reentrant(Net):
    def run(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = checkpoint(torch.sin, layer(x), use_reentrant=True)
        return x


class Experts(nn.Module):
    """A layer that sends every row to the expert with the row's highest score."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(scores.argmax(-1) == number)
            if len(rows) > 0:
                out = out.index_add(0, rows, expert(x[rows]) * scores[rows, number, None])
        return x + out


class Routed(Net):
    """A network in which shapes inside of modules depend on values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(4))


class RoutedByTheBatch(Net):
    """A network in which shapes between modules depend on values of the batch."""

    def run(self, x):
        rows = x.mean(1) > 0
        for layer in self.layers:
            hidden = layer(x)
            x = hidden.index_add(0, *torch.where(rows), torch.tanh(hidden[rows]))
        return x


class Bag:
    """An object that holds values but is no container."""

    def __init__(self, x):
        self.x, self.depth = x, 0


class Bags(Net):
    class Layer(nn.Linear):
        def forward(self, bag):
            bag.x = torch.tanh(super().forward(bag.x))
            bag.depth += 1
            return bag

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(6, 6) for _ in range(4))

    def run(self, x):
        bag = Bag(x)
        for layer in self.layers:
            bag = layer(bag)
            bag.x = bag.x * bag.depth
        return bag.x


class Swaps(Net):
    """A network whose layers swap values in their argument, which shapes alone do not show."""

    class Layer(nn.Linear):
        def forward(self, pair):
            pair[0], pair[1] = pair[1], pair[0]
            return torch.tanh(super().forward(pair[0]))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(6, 6) for _ in range(4))

    def run(self, x):
        first = self.layers[0]([x, 2 * x])
        pair = [first + 1, 2 * first]
        for layer in self.layers[1:]:
            y = layer(pair)
            pair[0] = pair[0] + y
        return pair[0] - 2 * pair[1]


class Remembering(Net):
    """A network whose layers read values from attributes into which the step has put them."""

    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.memory

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), *(self.Layer(6, 6) for _ in range(3))])

    def run(self, x):
        x = first = self.layers[0](x)
        for layer in self.layers[1:]:
            layer.memory = first
            x = layer(torch.tanh(x))
            first = first if len(x) % 2 else x
        return x


class Gathering(Net):
    """A network in which shapes inside of modules depend on values of the batch."""

    class Layer(nn.Linear):
        def forward(self, x, rows):
            return super().forward(x)[rows]

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(6, 6) for _ in range(4))

    def run(self, x):
        for number, layer in enumerate(self.layers):
            rows = x.new_ones(len(x)).bool() if number else x[:, 0] > -0.5
            x = F.pad(layer(x, rows), (0, 0, 1, 0))
        return x.mean(0).expand(4, 6)


class ReentrantLayers(Net):
    """A network that runs whole modules inside of custom autograd functions."""

    def __init__(self):
        super().__init__()
        self.tails = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def run(self, x):
        for layer, tail in zip(self.layers, self.tails, strict=True):
            x = checkpoint(tail, layer(x), use_reentrant=True)
        return x


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.layers[2].requires_grad_(False)


class Swallowing(Net):
    def run(self, x):
        try:
            return super().run(x)
        except Exception:
            raise AssertionError from None


class Compiled(Net):
    def __init__(self):
        super().__init__()
        for number, layer in enumerate(self.layers):
            if number % 2:
                layer.compile(backend="eager")


class Hooked(Net):
    """A network with hooks on modules and on tensors, and with retained gradients."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, out: out * 2)
            layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
            layer.register_full_backward_hook(
                lambda module, ins, outs: tuple(3 * x if x is not None else x for x in ins)
            )

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient / 2)
                x.retain_grad()
        return x


MODELS = (
    *(Net, Residual, Skips, UNet, EncoderDecoder, Recurrent, GPT, InPlaceGPT, CustomFunctions, Structures, InPlace),
    *(Auxiliary, BatchOnly, Nested, Views, Checkpointed, Reentrant, ReentrantLayers, Routed, RoutedByTheBatch, Bags),
    *(Swaps, Remembering, Gathering, Frozen, Swallowing, Compiled, Hooked),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # inputs without gradients are part of the case
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads .grad
@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_the_undivided_module(model, num_stages):
    module = model()
    owners = (
        {
            f"net.layers.{i}.scale": sum(f"net.layers.{i}" >= b[:12] for b in model.boundaries[: num_stages - 1])
            for i in range(4)
        }
        if model is Nested
        else None
    )
    pipeline = Pipeline(module, model.boundaries[: num_stages - 1], model.batch(), owners)
    for _ in range(3):
        pipeline.check(model.batch())


def test_one_stage_alone():
    Pipeline(GPT(), (), GPT.batch(), owners={name: 0 for name, _ in GPT().named_parameters()}).check(GPT.batch())


class HalfPrecision(Net):
    def step(self, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return super().step(batch)


def test_autocast():
    torch.set_default_dtype(torch.float32)
    pipeline = Pipeline(HalfPrecision(), Net.boundaries, Net.batch())
    for _ in range(3):
        pipeline.check(Net.batch())
    assert pipeline.check(Net.batch())[0].outgoing[2][0].dtype is torch.bfloat16


@pytest.mark.slow
def test_nothing_grows():
    pipeline = Pipeline(InPlace(), Net.boundaries, Net.batch())

    def num_objects():
        for _ in range(10):
            pipeline.check(Net.batch())
        gc.collect()
        return len(gc.get_objects())

    num_objects()
    assert num_objects() <= num_objects() + 5


def test_batches_may_be_uneven():
    pipeline = Pipeline(GPT(), GPT.boundaries, GPT.batch())
    for size, length in [(3, 6), (1, 5), (3, 6), (2, 3), (1, 5)]:
        pipeline.check(GPT.batch(size, length))


def test_several_micro_batches_may_be_in_flight():
    pipeline = Pipeline(Residual(), Residual.boundaries, Residual.batch())
    batches = [Residual.batch(size) for size in (4, 4, 3)]
    flights = [pipeline.forward(batch) for batch in batches]
    for flight in flights:
        pipeline.backward(flight)
    pipeline.compare(*batches)


def test_inference_gives_what_the_undivided_module_gives():
    module = GPT()
    pipeline = Pipeline(module, GPT.boundaries, GPT.batch())
    for batch in (GPT.batch(), GPT.batch(), GPT.batch(2)):
        flights = pipeline.forward(batch, infer=True)
        assert flights[-1].result == module.step(batch)
        assert not any(tensor.requires_grad for tensor in flights[0].outgoing[2])
        pipeline.check(batch)
    with torch.inference_mode():
        batch = GPT.batch()
        assert pipeline.forward(batch, infer=True)[-1].result == module.step(batch)


def test_messages_hold_what_later_stages_need_and_nothing_else():
    pipeline = Pipeline(Skips(), Skips.boundaries, Skips.batch())
    for _ in range(2):
        sent = [len(flight.outgoing[1]) for flight in pipeline.forward(Skips.batch())[:-1]]
        assert sent == [2, 3, 2]  # layer 0 and its tanh; layers 0 and 1 and the tanh of 1; layer 0 and the product


class TwoHeads(Net):
    """A network that needs a value of stage 0 in the last stage with some batches only."""

    def step(self, batch):
        x, y, *more = batch
        first = self.layers[0](x)
        hidden = self.layers[1](torch.tanh(first))
        loss = F.mse_loss(self.layers[3](self.layers[2](hidden)), y)
        return loss + first.mean() if more and more[0] else loss


class Choosing(Remembering):
    """A network whose last layer finds different values in its attribute."""

    def step(self, batch):
        x, y, *flag = batch
        for layer in self.layers[1:]:
            layer.memory = 0
        first = self.layers[0](x)
        second = self.layers[1](torch.tanh(first))
        self.layers[3].memory = first if any(flag) else second
        return F.mse_loss(self.layers[3](self.layers[2](second)), y)


@pytest.mark.parametrize("model", [TwoHeads, Choosing])
def test_another_kind_of_batch_is_looked_at_anew(model):
    pipeline = Pipeline(model(), ("layers.1", "layers.3"), Net.batch())
    for flag in ((), (True,), (), (False,), (True,)):
        pipeline.check((*Net.batch(), *flag))


class Alternating(Net):
    """A network in which a counter in the module decides what the last stage needs."""

    def step(self, batch):
        first = self.layers[0](batch[0])
        x = self.layers[3](self.layers[2](torch.tanh(self.layers[1](first))))
        self.steps += 1
        return F.mse_loss(x, batch[1]) + (first.mean() if self.steps % 2 else 0)


class Scheduled(Net):
    """A network that changes, at the end of the step, a number that the first layer reads."""

    class Layer(nn.Linear):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    def __init__(self):
        super().__init__()
        self.layers[0] = self.Layer(6, 6)

    def step(self, batch):
        loss = super().step(batch)
        self.layers[0].scale *= 0.9
        return loss


class ScheduledByATensor(Net):
    """A network that changes, at the end of the step, a tensor that the first stage reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def step(self, batch):
        loss = super().step((batch[0] * self.scale, batch[1]))
        self.scale *= 0.9
        return loss


class ScheduledByAnObject(Net):
    """A network that changes, at the end of the step, a number in an object in a list, which the first stage reads."""

    class Scale:
        now = 1.0

    def __init__(self):
        super().__init__()
        self.scales = {"input": [self.Scale()]}

    def step(self, batch):
        scale = self.scales["input"][0]
        loss = super().step((batch[0] * scale.now, batch[1]))
        scale.now *= 0.9
        return loss


@pytest.mark.parametrize("model", [Alternating, Scheduled, ScheduledByATensor, ScheduledByAnObject])
def test_a_step_that_writes_to_modules_is_run_to_its_end(model):
    pipeline = Pipeline(model(), ("layers.1", "layers.3"), Net.batch())
    for _ in range(4):
        pipeline.check(Net.batch())
    assert [copied.steps for copied in pipeline.modules] == 3 * [pipeline.plain.steps]


class Skipping(Net):
    """A network that skips a batch of size 2 in stage 0, one of size 3 in stage 1, and one of size 5 at the end."""

    def step(self, batch):
        x, y = batch
        x = self.layers[0](x)
        if len(x) == 2:
            return None
        x = self.layers[1](torch.tanh(x))
        if len(x) == 3:
            return None
        loss = F.mse_loss(self.layers[3](self.layers[2](torch.tanh(x))), y)
        return None if len(x) == 5 else loss


def test_a_step_may_skip_a_batch_in_any_stage():
    pipeline = Pipeline(Skipping(), ("layers.1", "layers.3"), Net.batch())
    for size in (4, 2, 3, 5, 4, 3, 2, 4):
        flights = pipeline.forward(Net.batch(size))
        assert (flights[-1].result is None) == (size != 4)
    for size in (4, 4):
        pipeline.check(Net.batch(size))


class Deciding(Net):
    """A network that draws numbers in Python and records them outside of the module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def draw(self, number):
        if "replay" in vars(self):
            return self.replay.pop(0)
        DRAWN.setdefault(self, []).append(drawn := number())
        return drawn


DRAWN = {}


class RandomSkip(Deciding):
    """A network in which random numbers of Python and numpy decide what is needed, in all stages."""

    def run(self, x):
        first = x
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if self.draw(random.random) < 0.5 or self.draw(np.random.rand) < 0.3:
                x = x + first
            if self.draw(random.random) < 0.5:
                first = x
        return x


class LayerDrop(Deciding):
    """A network that leaves out some layers at random, but none that begins a stage."""

    def run(self, x):
        for i, layer in enumerate(self.layers):
            if i % 3 == 0 or self.draw(random.random) < 0.5:
                x = torch.tanh(layer(x)) + x
        return x


@pytest.mark.parametrize("model", [RandomSkip, LayerDrop])
def test_stages_draw_the_same_python_random_numbers(model):
    module = model()
    owners = {f"layers.{i}.{p}": i // 3 for i in range(8) for p in ("weight", "bias")}
    pipeline = Pipeline(module, ("layers.3", "layers.6"), Net.batch(), owners)
    batch, taken = Net.batch(), set()
    for seed in (*range(10), *range(10)):
        DRAWN.clear()
        pipeline.backward(pipeline.forward(batch, seed))
        ways = [DRAWN[copied] for copied in pipeline.modules]
        assert all(way == ways[-1][: len(way)] for way in ways)
        module.replay = list(ways[-1])
        pipeline.compare(batch)
        taken.add(tuple(ways[-1]))
    assert len(taken) == 10


class Dropout(Net):
    def run(self, x):
        noise = x
        for layer in self.layers:
            noise = torch.randn(x.shape)
            x = F.dropout(layer(x) + 0.1 * noise, 0.3) * torch.rand_like(x)
        return x + noise


def test_runs_of_equal_seed_are_equal():
    pipeline = Pipeline(Dropout(), Net.boundaries, Net.batch())
    batch = Net.batch()
    losses = [pipeline.forward(batch, seed)[-1].result.item() for seed in (1, 2, 1, 2)]
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


class Measured(Net):
    """A network that logs numbers from all stages."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=6)
        self.several = MetricCollection([Accuracy("multiclass", num_classes=6), Precision("multiclass", num_classes=6)])
        self.logged = {}

    def step(self, batch):
        x, labels = batch[0], batch[1].argmax(1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.logged[f"mean{i}"] = 100 * x.mean().item() / 2
        self.accuracy.update(x, labels)
        self.logged |= {"accuracy": self.accuracy.compute(), "several": self.several(x, labels)}
        self.logged |= {"hits": (x.argmax(1) == labels).sum().item(), "text": f"{x.mean():.3f}"}
        return F.cross_entropy(x, labels)


def test_numbers_of_other_stages_are_unknown():
    pipeline = Pipeline(Measured(), Net.boundaries, Net.batch())
    pipeline.check(Net.batch())
    first, *_, last = (module.logged for module in pipeline.modules)
    assert isinstance(first["mean0"], float)
    assert all(isinstance(first[name], Unknown) for name in ("mean1", "hits", "accuracy", "several"))
    assert isinstance(last["accuracy"], torch.Tensor)
    assert isinstance(last["hits"], int)
    assert last["several"].keys() == {"MulticlassAccuracy", "MulticlassPrecision"}
    with pytest.raises(UsageError, match=r"the step reads a value of stage 3 in Python \(item\)"):
        bool(first["hits"])
    assert f"{first['hits'] + 1}" == "unknown"


def test_what_a_step_leaves_behind_can_be_logged_and_not_read():
    pipeline = Pipeline(Remembering(), Net.boundaries, Net.batch())
    pipeline.forward(Net.batch())
    left = torch.stack([pipeline.modules[-1].layers[1].memory]).mean()
    assert isinstance(left, Unknown)
    with pytest.raises(UsageError, match="a value that a step has left behind is read outside of the step, and only"):
        float(left)


def test_foreign_parameters_stay_the_same_objects():
    module = Net()
    before = dict(module.named_parameters())
    owners = own(module, Net.boundaries, Net.batch())
    ghosts = Ghosts(module, Net.boundaries, 1, owners)
    ghosts.free()
    assert dict(module.named_parameters()).keys() == before.keys()
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert parameter.untyped_storage().nbytes() == (8 if owners[name] != 1 else 8 * parameter.numel())
    state = Net().state_dict()
    kept = {name: module.get_parameter(name).clone() for name in owners if owners[name] == 1}
    ghosts.restore(state)
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, kept.get(name, state[name]))


def test_what_has_been_used_is_let_go():
    pipeline = Pipeline(Residual(), Residual.boundaries, Residual.batch())
    for _ in range(3):
        activations = []

        def pack(tensor, activations=activations):
            activations.append(weakref.ref(packed := tensor.detach()))
            return packed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
            flights = pipeline.forward(Residual.batch())
        assert any(reference() is not None for reference in activations)
        gc.disable()
        pipeline.backward(flights)
        del flights
        assert all(reference() is None for reference in activations)
        gc.enable()


def test_nothing_is_left_patched():
    module = Net()
    pipeline = Pipeline(module, Net.boundaries, Net.batch())
    before = [dict(vars(inner)) for inner in pipeline.modules[0].modules()], torch.autograd.Function.__dict__["apply"]
    pipeline.forward(Net.batch())

    def fail():
        pipeline.modules[0].step(Net.batch())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), pipeline.ghosts[0].intercepting():
        pipeline.ghosts[0].forward(fail, None, 1)
    after = [dict(vars(inner)) for inner in pipeline.modules[0].modules()], torch.autograd.Function.__dict__["apply"]
    assert before == after


def layers(module, x, *, start=0, end=4):
    for layer in module.layers[start:end]:
        x = torch.tanh(layer(x))
    return x


class Unreached(Net):
    def run(self, x):
        return layers(self, x, end=2)


class Tied(Net):
    def run(self, x):
        return layers(self, x) @ self.layers[0].weight


class CalledTwice(Net):
    def run(self, x):
        return self.layers[0](layers(self, x))


class Reading(Net):
    def run(self, x):
        x = layers(self, x, end=1)
        return layers(self, x, start=1) if x.mean() < 10 else x


class ReadingLater(Net):
    def run(self, x):
        x = layers(self, x)
        return x if x.mean() < 10 else 2 * x


class Selecting(Net):
    def run(self, x):
        x = layers(self, x, end=1)
        return layers(self, x[x.mean(1) > -10], start=1)


class Packing(Net):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(6, 6, batch_first=True)

    def run(self, x):
        x = layers(self, x)[:, None].repeat(1, 3, 1)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 2, 1]), batch_first=True)
        packed, _ = self.recurrent(packed)
        return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0].sum(1)


class Hiding(Net):
    class Layer(nn.Linear):
        def forward(self, x):
            self.hidden = super().forward(x)
            return torch.tanh(self.hidden)

    def __init__(self):
        super().__init__()
        self.layers[0] = self.Layer(6, 6)

    def run(self, x):
        return layers(self, x) + self.layers[0].hidden


class ThroughAView(Net):
    def run(self, x):
        x = layers(self, x, end=1)
        row = x[0]
        hidden = self.layers[1](x.detach())
        row.zero_()
        return layers(self, hidden, start=2) + x


class ThroughAViewOfTheNext(Net):
    """A network whose stage 1 changes a received value through a view that stage 1 makes; stage 2 reads the value."""

    def run(self, x):
        x = layers(self, x, end=1)
        hidden = self.layers[1](x.detach())
        x[0].mul_(2)
        return layers(self, hidden, start=2) + x


class ThroughAnAttribute(Net):
    """A network with a layer that changes a value which is not among its arguments."""

    class Layer(nn.Linear):
        def forward(self, x):
            self.memory.mul_(2)
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.layers[1] = self.Layer(6, 6)

    def run(self, x):
        self.layers[1].memory = first = self.layers[0](x)
        return layers(self, x.detach(), start=1) + first


class ThroughAViewOfTheBatch(Net):
    def run(self, x):
        memory = torch.zeros(4, 6)
        memory[0].add_(layers(self, x, end=1)[0].detach())
        return layers(self, x) + 2 * memory


class LeavingBehind(Net):
    def run(self, x):
        x = layers(self, x, end=1)
        last, self.last = vars(self).get("last", 0), x
        return layers(self, x + last, start=1)


class HookedAround(Net):
    def __init__(self):
        super().__init__()
        self.register_full_backward_hook(lambda *_: None)


class PerSample(Net):
    def run(self, x):
        x = layers(self, x)
        per_sample = torch.func.vmap(torch.func.grad(lambda row: torch.tanh(row).sum()))
        return x + per_sample(x.detach())


class Dispatched(Net):
    """A network that counts operations of its first stage, and multiplies its loss by their number."""

    class Mode(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    def run(self, x):
        with self.Mode() as mode:
            x = layers(self, x, end=1)
        return layers(self, x, start=1) * mode.count


class MetricOfStages(Net):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            self.mean.update(x.detach().mean())
        return x


class Penalty(Net):
    def run(self, x):
        x = layers(self, x.requires_grad_())
        (gradient,) = torch.autograd.grad(x.sum(), self.layers[3].weight, create_graph=True)
        return x + gradient.square().sum()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Dispatched, "a torch dispatch mode that the step enters spans stages"),
        (MetricOfStages, "a MeanMetric is used by stages 0 and 1, each of which knows its own updates only"),
        (Unreached, "the step ended in stage 1: it does not call 'layers.2' after the boundaries before it"),
        (Tied, "parameter 'layers.0.weight' is used by stages 0 and 2: keep both uses on one stage"),
        (CalledTwice, "parameter 'layers.0.weight' is used by stages 0 and 2: keep both uses on one stage"),
        (Reading, r"the step reads a value of stage 0 in Python \(bool\): keep what depends on values inside one"),
        (ReadingLater, r"the step reads a value of stage 2 in Python \(bool\)"),
        (Selecting, r"the step reads a value of stage 0 in Python \(getitem\)"),
        (Packing, "the step reads a value of stage 2 in Python"),
        (Hiding, "reads a value made inside a module of an earlier stage"),
        (ThroughAView, "a value of stage 0 was changed in place, through a view, by stage 1: use the out-of-place"),
        (ThroughAViewOfTheNext, "a value of stage 0 was changed in place, through a view, by stage 1"),
        (ThroughAnAttribute, "a value of stage 0 was changed in place, through a view, by stage 1"),
        (ThroughAViewOfTheBatch, "a value of stage 0 was changed in place, through a view, by stage 0"),
        (LeavingBehind, "a micro-batch reads an activation that another has left behind"),
        (HookedAround, "a backward hook on HookedAround spans stages: keep it inside one module"),
        (PerSample, "a transform of torch.func spans stages"),
        (Penalty, "grad spans stages"),
    ],
)
def test_what_stages_in_processes_cannot_do_is_refused(model, match):
    def run():
        pipeline = Pipeline(model(), Net.boundaries[:2], Net.batch())
        for _ in range(2):
            pipeline.check(Net.batch())

    with pytest.raises(UsageError, match=match):
        run()


def test_backward_hooks_on_all_modules_are_refused():
    with (
        register_module_full_backward_hook(lambda *_: None),
        pytest.raises(UsageError, match="a backward hook on all modules spans stages"),
    ):
        Pipeline(Net(), Net.boundaries[:2], Net.batch()).check(Net.batch())


class Drifting(Net):
    """A network that does more operations in one process than in the others, with the same shapes."""

    extra = 0

    def run(self, x):
        x = self.layers[0](x)
        for _ in range(self.extra):
            x = -x
        return layers(self, x, start=1)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ((1, 0), "operation 1 is nothing more for stage 1 and something else"),
        ((0, 1), "operation 1 is 'neg'"),
    ],
)
def test_processes_that_take_different_ways_are_stopped(extra, match):
    pipeline = Pipeline(Drifting(), ("layers.1",), Net.batch())
    pipeline.check(Net.batch())
    for module, more in zip(pipeline.modules, extra, strict=True):
        module.extra = more
    with pytest.raises(UsageError, match=f"stages do not take the same way through the step.*{match}"):
        pipeline.forward(Net.batch())


class Averaging(Net):
    """A network whose last stage keeps running means of its loss and, in a buffer, of its output."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0
        self.register_buffer("seen", torch.zeros(6))

    def step(self, batch):
        x = layers(self, batch[0])
        loss = F.mse_loss(x * (1 + self.seen), batch[1])
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return loss * (1 + self.mean)


def test_state_may_stay_within_a_stage():
    pipeline = Pipeline(Averaging(), Net.boundaries, Net.batch())
    for _ in range(3):
        pipeline.check(Net.batch())
    assert torch.equal(pipeline.modules[-1].seen, pipeline.plain.seen)
    pipeline.ghosts[0].restore({})
    assert type(pipeline.modules[0].seen) is torch.Tensor


class Counts(Net):
    """A network with a buffer that the first stage replaces, and does not change in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))

    def step(self, batch):
        first = self.layers[0](batch[0])
        self.seen = first.detach().mean(0)
        return F.mse_loss(self.layers[3](self.layers[2](self.layers[1](torch.tanh(first)))), batch[1])


def test_a_buffer_that_another_stage_has_replaced_gets_memory():
    pipeline = Pipeline(Counts(), Net.boundaries, Net.batch())
    pipeline.check(Net.batch())
    assert torch.equal(pipeline.modules[0].seen, pipeline.plain.seen)
    pipeline.ghosts[-1].restore({})
    seen = pipeline.modules[-1].seen
    assert (type(seen), seen.device.type, seen.shape, seen.dtype) == (torch.Tensor, "cpu", (6,), torch.float64)


class Analog(Net):
    """A network with aihwkit's layers as whole stages, inside of larger modules, and next to digital layers."""

    boundaries = ("features.1", "features.2", "head")

    def __init__(self):
        super().__init__()
        del self.layers
        second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Sequential(nn.Tanh()), second)
        self.head = nn.Linear(4, 3)
        convert_to_analog(self, "ideal")
        self.features[2].add_module("last", nn.Conv2d(4, 4, 1))

    @staticmethod
    def batch(size=4):
        return torch.randn(size, 1, 9, 9), torch.randint(3, (size,))

    def step(self, batch):
        return F.cross_entropy(self.head(self.features(batch[0]).mean((2, 3))), batch[1])


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_analog_layers(num_stages):
    torch.set_default_dtype(torch.float32)
    module = Analog()
    pipeline = Pipeline(module, Analog.boundaries[: num_stages - 1], Analog.batch())
    for _ in range(2):
        batch = Analog.batch()
        pipeline.backward(pipeline.forward(batch))
        module.step(batch).backward()
        for name, stage in pipeline.owners.items():
            gradients = [read_gradients(m, [m.get_parameter(name)]) for m in (module, pipeline.modules[stage])]
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
            assert gradients[0].any()
    # A stage does not run the tiles of other stages.
    assert not pipeline.modules[0].get_parameter("head.analog_module.analog_ctx").analog_input


class GPT2(Net):
    boundaries = ("model.transformer.h.1", "model.transformer.h.2", "model.transformer.h.3")

    def __init__(self):
        super().__init__()
        del self.layers
        transformers = pytest.importorskip("transformers")
        self.model = self.make(transformers).double()

    @staticmethod
    def make(transformers):
        config = transformers.GPT2Config(
            vocab_size=29, n_positions=16, n_embd=16, n_layer=4, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )
        config.tie_word_embeddings = False
        return transformers.GPT2LMHeadModel(config)

    @staticmethod
    def batch(size=3, length=8):
        return torch.randint(29, (size, length))

    def step(self, batch):
        mask = torch.ones_like(batch)
        mask[0, -2:] = 0
        return self.model(input_ids=batch, attention_mask=mask, labels=batch).loss


class Llama(GPT2):
    boundaries = ("model.model.layers.1", "model.model.layers.2", "model.model.layers.3")

    @staticmethod
    def make(transformers):
        config = transformers.LlamaConfig(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        return transformers.LlamaForCausalLM(config)


class BERT(GPT2):
    boundaries = ("model.bert.encoder.layer.1", "model.bert.encoder.layer.2", "model.bert.encoder.layer.3")

    @staticmethod
    def make(transformers):
        config = transformers.BertConfig(
            vocab_size=29,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            tie_word_embeddings=False,
        )
        return transformers.BertForMaskedLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("model", [GPT2, Llama, BERT])
def test_models_of_hugging_face(model, num_stages):
    pipeline = Pipeline(model(), model.boundaries[: num_stages - 1], model.batch())
    for size, length in ((3, 8), (2, 5), (3, 8)):
        pipeline.check(model.batch(size, length))
