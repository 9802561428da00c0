"""These tests compare micro-batches that overlap with the same steps run one after the other, without stages."""

import random

import numpy as np
import pytest
import torch
from staged import fly, make_step, overlapping
from torch import nn
from torch.utils.checkpoint import checkpoint

from aimc_pl.errors import UsageError
from aimc_pl.flight import Flight
from aimc_pl.private_torch import set_versions
from aimc_pl.trial import Trials


class Network(nn.Module):
    """Three layers that open the stages, and attributes of all kinds that a step may set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4).double() for _ in range(3))
        self.drop = nn.Dropout(0.0)
        self.outputs, self.nested, self.log = [], {"a": {}, "list": [[]]}, []
        self.count, self.total, self.hidden = 0, 0.0, None
        self.stat = nn.Buffer(torch.zeros(4, dtype=torch.float64))

    def keep(self, module, args, out):
        """Keep the output of a module. This is a forward hook."""
        self.nested["a"][module] = out

    def loss(self, h):
        return h.square().mean()


def set_and_read(net, x):
    net.hidden = torch.tanh(net.a(x))
    net.scale = x.abs().max()
    h = net.b(net.hidden)
    return net.loss(net.c(h) * net.scale + net.hidden)


def on_another_module(net, x):
    net.c.residual = net.a(x)
    h = net.b(torch.tanh(net.c.residual))
    net.a.late = h
    return net.loss(net.c(h) + net.c.residual + net.a.late)


def list_cleared_at_the_start(net, x):
    net.outputs.clear()
    h = net.a(x)
    net.outputs.append(h)
    h = net.b(torch.tanh(h))
    net.outputs.append(h)
    return net.loss(net.c(h) + sum(net.outputs) + len(net.outputs))


def list_cleared_at_the_end(net, x):
    h = net.a(x)
    net.outputs.append(h)
    h = net.b(torch.tanh(h))
    net.outputs.append(h)
    loss = net.loss(net.c(h) + sum(net.outputs) + len(net.outputs))
    net.outputs.clear()
    return loss


def list_bound_anew(net, x):
    net.outputs = [net.a(x)]
    net.outputs += [net.b(net.outputs[-1])]
    return net.loss(net.c(net.outputs[1]) + sum(net.outputs) + len(net.outputs))


def dict_filled_by_hooks(net, x):
    handles = [module.register_forward_hook(net.keep) for module in (net.a, net.b, net.c)]
    out = net.c(torch.tanh(net.b(torch.tanh(net.a(x)))))
    for handle in handles:
        handle.remove()
    seen = net.nested["a"]
    loss = net.loss(out + seen[net.a] * seen[net.b] + seen[net.c])
    seen.clear()
    return loss


def nested_containers(net, x):
    net.nested["list"][0][:] = [net.a(x)]
    h = net.b(net.nested["list"][0][0])
    net.nested["list"][0].append(h)
    return net.loss(net.c(h) + sum(net.nested["list"][0]))


def tuple_of_containers(net, x):
    net.pair = ([], {})
    net.pair[0].append(net.a(x))
    net.pair[1]["h"] = net.b(net.pair[0][0])
    return net.loss(net.c(net.pair[1]["h"]) + net.pair[0][0])


def training_flags(net, x):
    net.drop.eval()
    h = torch.tanh(net.a(x))
    was = net.drop.training
    net.drop.train()
    h = net.b(h)
    net.drop.eval()
    out = net.loss(net.c(h) * (2.0 if was or net.drop.training else 1.0))
    net.drop.train()
    return out


def buffer_bound_anew(net, x):
    net.stat = net.a(x).detach().mean(0)
    h = net.b(net.a(x) + net.stat)
    return net.loss(net.c(h) - net.stat)


def deleted_attribute(net, x):
    net.temporary = net.a(x)
    h = net.b(net.temporary)
    out = net.c(h) + net.temporary
    del net.temporary
    return net.loss(out)


def accumulators_in_the_last_stage(net, x):
    h = net.b(torch.tanh(net.a(x)))
    loss = net.loss(net.c(h))
    net.log.append(loss.item())
    net.count += 1
    net.total += loss.item()
    return loss


def accumulators_in_the_middle(net, x):
    h = net.b(torch.tanh(net.a(x)))
    net.log.append(h.sum().item())
    net.count += len(x)
    return net.loss(net.c(h) * net.count)


def accumulators_in_every_stage(net, x):
    """Count in every stage, each with its own counter."""
    net.a.n = getattr(net.a, "n", 0) + 1
    h = net.a(x) * net.a.n
    h = net.b(h)
    net.b.n = getattr(net.b, "n", 0) + 1
    h = net.c(h * net.b.n)
    net.c.n = getattr(net.c, "n", 0) + 1
    return net.loss(h * net.c.n)


def set_at_times(net, x):
    """Set an attribute in the first stage with some micro-batches only."""
    if x.sum() < 2:
        net.scale = x.max()
    h = net.b(net.a(x))
    loss = net.loss(net.c(h) * getattr(net, "scale", 1.0))
    net.scale = 1.0
    return loss


def set_where_needed(net, x):
    """Set an attribute only where needed, as a mask for another size. Other steps may replace it meanwhile."""
    if x.sum() < 2:
        net.hidden = x.max()
    h = net.b(net.a(x))
    return net.loss(net.c(h) * net.hidden)


def list_filled_at_times(net, x):
    h = net.a(x)
    if x.sum() < 2:
        net.outputs.append(h)
    h = net.b(h)
    loss = net.loss(net.c(h) + sum(net.outputs) + len(net.outputs))
    net.outputs.clear()
    return loss


def parameter_frozen_for_a_while(net, x):
    net.c.requires_grad_(False)
    h = net.b(net.a(x))
    out = net.c(h)
    net.c.requires_grad_(True)
    return net.loss(out + net.c(h.detach()))


STEPS = [
    set_and_read,
    on_another_module,
    list_cleared_at_the_start,
    list_cleared_at_the_end,
    list_bound_anew,
    dict_filled_by_hooks,
    nested_containers,
    tuple_of_containers,
    training_flags,
    buffer_bound_anew,
    deleted_attribute,
    accumulators_in_the_last_stage,
    accumulators_in_the_middle,
    accumulators_in_every_stage,
    set_at_times,
    set_where_needed,
    list_filled_at_times,
    parameter_frozen_for_a_while,
]


def make_inputs(count=4):
    generator = torch.Generator().manual_seed(3)
    return [(1 + k) * torch.randn(3, 4, generator=generator, dtype=torch.float64) for k in range(count)]


def plain(value):
    """Return the value of an attribute in a form that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, nn.Module):
        return "a module"
    if isinstance(value, dict):
        return [(plain(key), plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def left_on(net):
    return {
        (name, key): plain(value)
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") or key == "_buffers"
    }


@pytest.mark.slow
@pytest.mark.parametrize("order", ["one after the other", "overlapping", "all at once"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_what_a_step_keeps_belongs_to_its_micro_batch(step, order):
    inputs = make_inputs()
    expected = Network()
    losses = []
    for x in inputs:
        loss = step(expected, x)
        losses.append(loss.detach())
        loss.backward()
    net = Network()
    functions = [lambda x=x: step(net, x) for x in inputs]
    orders = {
        "one after the other": None,
        "overlapping": overlapping(3, len(inputs)),
        "all at once": [("F", stage, k) for stage in range(3) for k in range(len(inputs))]
        + [("B", stage, k) for stage in (2, 1, 0) for k in range(len(inputs))],
    }
    # The step is recorded on a micro-batch that sets what some others do not set.
    assert [bool(x.sum() < 2) for x in inputs] == [True, False, True, True]
    flights = fly(make_step(net, ["b", "c"], functions[0]), functions, orders[order])
    assert [flight.loss for flight in flights] == losses
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert left_on(net) == left_on(expected)


def test_outside_of_its_stages_nothing_of_a_waiting_step_is_seen():
    """Check that hooks and callbacks between its stages find modules as the earlier steps have left them."""
    net = Network()
    inputs = make_inputs(2)

    def function(x):
        net.hidden = x
        h = net.a(x)
        net.count += 1
        h = net.b(h)
        net.hidden = None
        net.count -= 1
        return net.loss(net.c(h))

    step = make_step(net, ["b", "c"], lambda: function(inputs[0]))
    flights = [Flight(step, lambda x=x: function(x)) for x in inputs]
    with step.running():
        for stage in range(3):
            for flight in flights:
                flight.forward(stage)
                assert (net.hidden, net.count) == (None, 0)


def test_a_new_stage_that_sets_an_attribute_is_refused():
    net = Network()
    late = []

    def function(x):
        net.hidden = x
        h = net.b(net.a(x))
        if late:
            net.hidden = h
        return net.loss(net.c(h))

    inputs = make_inputs(2)
    step = make_step(net, ["b", "c"], lambda: function(inputs[0]))
    fly(step, [lambda: function(inputs[0])])
    late.append(True)
    with pytest.raises(UsageError, match=r"sets 'hidden' in stage 1, and has so far set it in stage 0"):
        fly(step, [lambda: function(inputs[1])])


def between_a_number(net, k):
    net.temperature = 1.0 + k


def between_a_container(net, k):
    net.nested["temperature"] = 1.0 + k


def between_a_mode(net, k):
    net.drop.train(k % 2 == 0)


def between_a_frozen_layer(net, k):
    net.c.requires_grad_(k % 2 == 0)


def between_a_new_parameter(net, k):
    net.c.bias = nn.Parameter(torch.full((4,), float(k), dtype=torch.float64))


def affected(net, x):
    """Compute a loss that depends, in its last stage, on everything that the functions above set."""
    out = net.c(net.b(net.a(x)))
    return net.loss(out * net.temperature * net.nested["temperature"] * (2.0 if net.drop.training else 1.0))


BETWEEN = [between_a_number, between_a_container, between_a_mode, between_a_frozen_layer, between_a_new_parameter]


@pytest.mark.slow
@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_what_is_set_between_mini_batches_is_for_those_that_follow(between):
    """Check that waiting micro-batches keep the values with which they began, as in undivided training."""
    inputs = make_inputs()
    expected, net = Network(), Network()
    losses, gradients = [], []
    for network in (expected, net):
        network.temperature = network.nested["temperature"] = 1.0
    for k, x in enumerate(inputs):
        between(expected, k)
        loss = affected(expected, x)
        losses.append(loss.detach())
        loss.backward()
        gradients.append([p.grad for p in expected.parameters()])
        expected.zero_grad()
    functions = [lambda x=x: affected(net, x) for x in inputs]
    step = make_step(net, ["b", "c"], functions[0])
    flights = [Flight(step, function) for function in functions]
    for clock in range(len(inputs) + 2):
        if clock < len(inputs):
            between(net, clock)
        now = left_on(net), [p.requires_grad for p in net.parameters()]
        with step.running():
            for k, flight in reversed([*enumerate(flights)]):
                if 0 <= clock - k < 3:
                    flight.forward(clock - k)
        # Outside of the steps nobody sees the values that waiting micro-batches keep.
        assert (left_on(net), [p.requires_grad for p in net.parameters()]) == now
    assert [flight.loss for flight in flights] == losses
    assert step.waiting == []
    # A parameter that is frozen during a backward gets no gradient.
    net.requires_grad_(True)
    for flight, theirs in zip(flights, gradients, strict=True):
        for stage in (2, 1, 0):
            flight.backward(stage)
        for parameter, gradient in zip([*net.parameters()][:5], theirs[:5], strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
        net.zero_grad()


def test_what_is_set_again_while_micro_batches_are_under_way_is_for_those_that_begin_later():
    """Check an attribute that is set twice, for example between mini-batches and by an observer of updates."""
    net, expected = Network(), Network()
    (x,) = make_inputs(1)

    def function(network):
        return network.loss(network.c(network.b(network.a(x))) * network.temperature)

    net.temperature = 1.0
    step = make_step(net, ["b", "c"], lambda: function(net))
    fly(step, [lambda: function(net)])
    net.temperature = 2.0
    before, after = (Flight(step, lambda: function(net)) for _ in range(2))
    with step.running():
        before.forward(0)
        net.temperature = 3.0
        for flight, stage in ((before, 1), (after, 0), (before, 2), (after, 1), (after, 2)):
            flight.forward(stage)
            assert net.temperature == 3
    for flight, temperature in ((before, 2.0), (after, 3.0)):
        expected.temperature = temperature
        assert torch.equal(flight.loss, function(expected).detach())


def test_an_aborted_micro_batch_waits_no_longer():
    net = Network()
    (x,) = make_inputs(1)
    step = make_step(net, ["b", "c"], lambda: set_and_read(net, x))
    flight = Flight(step, lambda: set_and_read(net, x))
    with step.running():
        flight.forward(0)
        assert step.waiting == [flight]
        flight.abort()
        flight.abort()
    assert step.waiting == []


@pytest.mark.parametrize("source", ["torch", "numpy", "Python"])
def test_a_step_that_seeds_draws_its_own_numbers_in_every_stage(source):
    draw = {"torch": lambda: torch.rand(1).item(), "numpy": np.random.rand, "Python": random.random}[source]
    inputs = make_inputs()

    def function(net, x):
        seed = {"torch": torch.manual_seed, "numpy": np.random.seed, "Python": random.seed}[source]
        seed(int(1000 * x.abs().sum()))
        h = net.a(x) * draw()
        h = net.b(h) * draw()
        return net.loss(net.c(h) * draw())

    expected, net = Network(), Network()
    losses = [function(expected, x).detach() for x in inputs]
    functions = [lambda x=x: function(net, x) for x in inputs]
    step = make_step(net, ["b", "c"], functions[0])
    flights = fly(step, functions, overlapping(3, len(inputs)))
    assert [flight.loss for flight in flights] == losses


def test_without_overlap_attributes_are_as_the_step_leaves_them():
    net = Network()
    inputs = make_inputs(2)

    def function(x):
        net.count += 1
        h = net.b(net.a(x))
        net.count += 1
        return net.loss(net.c(h))

    step = make_step(net, ["b", "c"], overlaps=False)
    flights = [Flight(step, lambda x=x: function(x)) for x in inputs]
    with step.running():
        seen = []
        for flight in flights:
            for stage in range(3):
                flight.forward(stage)
                seen.append(net.count)
    assert seen == [1, 2, 2, 3, 4, 4]


def test_parameters_and_modules_belong_to_the_stage_that_uses_them_first():
    class Tied(Network):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4).double().requires_grad_(False)
            self.unused = nn.Linear(4, 4)
            self.gain = nn.Parameter(torch.ones(4, dtype=torch.float64))

    net = Tied()
    (x,) = make_inputs(1)

    def function():
        h = net.a(x) * net.gain
        h = net.b(h) @ net.a.weight + net.frozen(h)
        return net.loss(net.drop(net.c(h)) * net.gain)

    step = make_step(net, ["b", "c"], function)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    held = [sorted(names[id(parameter)] for parameter in stage.parameters) for stage in step.stages]
    assert held == [
        ["a.bias", "a.weight", "gain"],
        ["b.bias", "b.weight", "frozen.bias", "frozen.weight"],
        ["c.bias", "c.weight"],
    ]
    modules = {id(module): name for name, module in net.named_modules()}
    assert [[modules[id(module)] for module in stage.modules] for stage in step.stages] == [
        ["a"],
        ["b", "frozen"],
        ["c", "drop"],
    ]


@pytest.mark.parametrize("used", ["twice", "once"])
def test_shared_parameters_under_delayed_updates(used):
    net = Network()
    (x,) = make_inputs(1)

    def function():
        h = net.b(net.a(x))
        return net.loss(net.c(h) + (h @ net.a.weight if used == "twice" else 0))

    if used == "once":
        make_step(net, ["b", "c"], function, delayed=True, may_share=False)
        return
    make_step(net, ["b", "c"], function)
    with pytest.raises(UsageError, match=r"'a\.weight' is used by stages 0 and 2"):
        make_step(net, ["b", "c"], function, delayed=True, may_share=False)


@pytest.mark.parametrize("reader", [1, 2])
@pytest.mark.parametrize(
    "view", [lambda token: token[1], lambda token: token.unbind(0)[0], lambda token: token.expand(3, 2, 4)[2, 0]]
)
def test_a_view_of_a_parameter_belongs_to_the_stage_that_makes_it(view, reader):
    """Check that a view shows the weights of the moment when it is read, and sends its gradient back to its stage."""
    net, inputs = Network(), make_inputs(2)
    net.token = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))

    def function(x):
        h, part = net.a(x), view(net.token)
        h = net.b(h) + (part if reader == 1 else 0)
        return net.loss(net.c(h) + (part if reader == 2 else 0))

    step = make_step(net, ["b", "c"], lambda: function(inputs[0]), delayed=True, may_share=False)
    flights = [Flight(step, lambda x=x: function(x)) for x in inputs]
    losses, gradients = [], []
    with step.running():
        for stage in range(3):
            for flight in flights:
                flight.forward(stage)
            if stage == reader:
                losses = [function(x) for x in inputs]
                gradients = [torch.autograd.grad(loss, net.token)[0] for loss in losses]
            with torch.no_grad():
                net.token.add_(0.5)
        assert [flight.loss.item() for flight in flights] == [loss.item() for loss in losses]
        for flight, gradient in zip(flights, gradients, strict=True):
            net.token.grad = None
            flight.backward(2)
            flight.backward(1)
            assert net.token.grad is None
            flight.backward(0)
            torch.testing.assert_close(net.token.grad, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("factor", ["cast", "computed"])
def test_the_backward_uses_a_cast_as_it_is_now_and_what_was_computed_as_it_was(factor):
    net = Network()
    net.gain = nn.Parameter(torch.full((4,), 1.5, dtype=torch.float64))
    (x,) = make_inputs(1)

    def function():
        return (net.a(x) * (net.gain.float() if factor == "cast" else net.gain.float().exp())).sum()

    trials = Trials(net, [function])
    trials.undivided()
    assert trials.casts
    step = make_step(net, [], function, delayed=True)
    step.follow_casts()
    flight = Flight(step, function)
    seen = net.gain.detach().clone()
    with step.running():
        flight.forward(0)
        with torch.no_grad():
            net.gain.add_(1)
        flight.backward(0)
    used = net.gain.detach() if factor == "cast" else seen.float().exp().double()
    torch.testing.assert_close(net.a.bias.grad, len(x) * used, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("what", ["parameter", "layer", "further layer"])
def test_parameters_that_come_between_mini_batches_are_followed(what):
    net = Network()
    net.a = nn.Sequential(net.a)
    x, *inputs = make_inputs(3)

    def function(x):
        return net.loss(net.c(torch.tanh(net.b(torch.tanh(net.a(x))))))

    step = make_step(net, ["b", "c"], lambda: function(x), delayed=True, may_share=False)
    fly(step, [lambda: function(x)])
    with torch.no_grad():
        new = nn.Linear(4, 4).double()
        if what == "parameter":
            net.b.weight = new.weight
        elif what == "layer":
            net.b = new
        else:
            net.a.append(new)
    net.zero_grad()
    sum(function(x) for x in inputs).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    flights = [Flight(step, lambda x=x: function(x)) for x in inputs]
    order = overlapping(3, 2)
    with step.running():
        for kind, stage, k in order:
            (flights[k].forward if kind == "F" else flights[k].backward)(stage)
            set_versions([*net.parameters()], [parameter._version + 1 for parameter in net.parameters()])
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
    held = [set(map(id, stage.parameters)) for stage in step.stages]
    assert held == [set(map(id, layer.parameters())) for layer in (net.a, net.b, net.c)]


def test_a_step_that_leaves_out_the_module_that_opens_a_stage_is_told_so():
    net = Network()
    x, *_ = make_inputs(1)

    def function(skip):
        h = net.a(x)
        return net.loss(net.c(h if skip else net.b(h)) @ torch.ones(4, 1, dtype=torch.float64) + net.d(h))

    net.d = nn.Linear(4, 1).double()
    step = make_step(net, ["b", "c", "d"], lambda: function(False), delayed=True, may_share=False)
    fly(step, [lambda: function(True)])  # stage 1 has nothing to do

    def without_c():
        return net.loss(net.d(net.b(net.a(x))))

    step = make_step(net, ["b", "c"], lambda: function(False), delayed=True, may_share=False)
    with pytest.raises(UsageError, match=r"did not call 'c', with which stage 2 begins, so that stage 1 used .* 'd\."):
        fly(step, [without_c])


def test_the_earliest_stages_that_share_a_parameter_are_named():
    net = Network()
    (x,) = make_inputs(1)

    def function():
        h = net.c(net.b(net.a(x)))
        return net.loss(h @ net.b.weight + h @ net.a.weight)

    with pytest.raises(UsageError, match=r"'a\.weight' is used by stages 0 and 2"):
        make_step(net, ["b", "c"], function, delayed=True, may_share=False)


def test_a_module_whose_parameters_another_stage_uses_is_refused():
    """Check that the use is found even if the graph does not show it, unless the module ran without gradients."""
    (x,) = make_inputs(1)

    def function(net, way):
        with torch.set_grad_enabled(way != "no_grad"):
            h = net.b(x)
        h = net.c(net.a(x) + h.detach())
        return net.loss(h @ net.b.weight + net.b.bias)

    for way in ("detach", "no_grad"):
        net = Network()
        make_step(net, ["a", "c"], lambda net=net, way=way: function(net, way))
        if way == "detach":
            with pytest.raises(UsageError, match=r"'b\.weight' is used by stages 0 and 2"):
                make_step(net, ["a", "c"], lambda net=net: function(net, "detach"), may_share=False)
        else:
            step = make_step(net, ["a", "c"], lambda net=net: function(net, "no_grad"), may_share=False)
            assert step.stages[2].parameters == [*net.b.parameters(), *net.c.parameters()]


def test_parameters_that_are_used_without_gradients_only_belong_to_the_stage_that_calls_their_module():
    net = Network()
    (x,) = make_inputs(1)

    def function():
        h = net.a(x)
        with torch.no_grad():
            target = net.c(x)
        return net.loss(net.b(h) - target)

    step = make_step(net, ["b"], function, may_share=False)
    assert step.stages[0].parameters == [*net.a.parameters(), *net.c.parameters()]
    assert step.stages[0].modules == [net.a]


@pytest.mark.parametrize("boundaries", [["b"], ["b", "c"]])
def test_weight_scales_the_gradient(boundaries):
    net, expected = Network(), Network()
    (x,) = make_inputs(1)
    (0.3 * set_and_read(expected, x)).backward()
    step = make_step(net, boundaries, lambda: set_and_read(net, x))
    flight = Flight(step, lambda: set_and_read(net, x), 0.3)
    with step.running():
        for stage in range(len(step.stages)):
            flight.forward(stage)
        for stage in reversed(range(len(step.stages))):
            flight.backward(stage)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    assert not flight.loss.requires_grad


def test_control_flow_may_leave_stages_out():
    """Check steps that skip one boundary or two, or that call the modules again."""
    (x, *_) = make_inputs(1)

    def no_b(net):
        return net.loss(net.c(net.a(x)))

    def no_c(net):
        return net.loss(net.b(net.a(x)))

    def again(net):
        return net.loss(net.c(net.b(net.a(net.c(net.b(net.a(x)))))))

    def none(net):
        return net.loss(net.a(x))

    for function in (no_b, no_c, again, none):
        expected, net = Network(), Network()
        function(expected).backward()
        step = make_step(net, ["b", "c"])
        fly(step, [lambda net=net, function=function: function(net)])
        for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_skipped_and_detached_losses():
    net = Network()
    (x,) = make_inputs(1)
    step = make_step(net, ["b", "c"])

    def skip():
        set_and_read(net, x)

    (flight,) = fly(step, [skip])
    assert flight.loss is None
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(UsageError, match="depends on no parameter that requires grad; to skip a batch, return None"):
        fly(step, [lambda: set_and_read(net, x).detach()])
    # Another way to skip a batch is to return a constant that requires grad.
    fly(step, [lambda: torch.zeros((), requires_grad=True)])
    assert all(parameter.grad is None for parameter in net.parameters())


def without_gradients(net, x, context):
    """Compute a loss after calling the modules of the later stages without gradients."""
    with context():
        target = net.c(net.b(x))
    return net.loss(net.c(net.b(net.a(x))) - target.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_begin_no_stage(context):
    inputs = make_inputs()
    net, expected = Network(), Network()
    losses = [without_gradients(expected, x, context) for x in inputs]
    for loss in losses:
        loss.backward()
    functions = [lambda x=x: without_gradients(net, x, context) for x in inputs]
    step = make_step(net, ["b", "c"], functions[0])
    assert [stage.modules for stage in step.stages] == [[net.a], [net.b], [net.c]]
    stages = []
    for module in (net.a, net.b, net.c):
        module.register_forward_pre_hook(lambda *args: stages.append(flight.stage))
    flight = Flight(step, functions[0])
    with step.running():
        for stage in range(3):
            flight.forward(stage)
    assert stages == [0, 0, 0, 1, 2]
    flights = fly(step, functions, overlapping(3, len(inputs)))
    assert [flight.loss for flight in flights] == losses
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_calls_without_gradients_may_begin_stages():
    """Check steps of evaluation, which run without gradients."""
    net = Network()
    (x,) = make_inputs(1)
    stages = []
    step = make_step(net, ["b", "c"], with_gradients=False)
    for module in (net.a, net.b, net.c):
        module.register_forward_pre_hook(lambda *args: stages.append(flight.stage))

    def function():
        with torch.no_grad():
            net.c(net.b(net.a(x)))

    flight = Flight(step, function)
    with step.running(), step.recording():
        for stage in range(3):
            flight.forward(stage)
    assert stages == [0, 1, 2]
    assert [stage.modules for stage in step.stages] == [[net.a], [net.b], [net.c]]


def test_a_boundary_in_inference_mode_is_refused():
    """Check the refusal where calls without gradients begin stages."""
    net = Network()
    (x,) = make_inputs(1)

    def function():
        with torch.inference_mode():
            net.b(x)
        return net.loss(net.a(x))

    with pytest.raises(UsageError, match="'b' is called in inference_mode"):
        fly(make_step(net, ["b"], with_gradients=False), [function])


@pytest.mark.parametrize(
    "transform",
    [
        lambda function, x: torch.func.vmap(function)(x).sum(),
        lambda function, x: torch.func.grad(lambda h: function(h).sum())(x).sum(),
        lambda function, x: torch.func.jvp(function, (x,), (x,))[1].sum(),
    ],
)
def test_a_boundary_in_a_transform_is_refused(transform):
    net = Network()
    (x,) = make_inputs(1)
    with pytest.raises(UsageError, match=r"'b' is called inside a transform of torch\.func"):
        fly(make_step(net, ["b"]), [lambda: transform(lambda h: net.b(net.c(h)), net.a(x))])


def test_a_boundary_in_a_checkpoint_is_refused():
    net = Network()
    (x,) = make_inputs(1)

    def function():
        return net.loss(checkpoint(lambda h: net.b(net.c(h)), net.a(x), use_reentrant=False))

    with pytest.raises(UsageError, match="'b' lies inside a checkpointed region"):
        fly(make_step(net, ["b"]), [function])


def test_a_reentrant_checkpoint_belongs_to_the_stage_that_begins_it():
    """Check a reentrant checkpoint, whose region runs without gradients, and again in the backward."""
    net, expected = Network(), Network()
    inputs = make_inputs(2)

    def function(net, x):
        h = checkpoint(lambda h: net.b(net.a(h)), net.a(x), use_reentrant=True)
        return net.loss(net.c(h))

    for x in inputs:
        function(expected, x).backward()
    step = make_step(net, ["b", "c"], lambda: function(net, inputs[0]))
    fly(step, [lambda x=x: function(net, x) for x in inputs], overlapping(3, 2))
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_buffer_that_the_next_micro_batch_changes_in_place_is_an_error():
    """Check two forwards of a stage before the first backward, which still needs the old buffer."""
    net = Network()
    inputs = make_inputs(2)

    def function(x):
        net.stat.copy_(x.mean(0))
        return net.loss(net.b(net.a(x) * net.stat))

    step = make_step(net, ["b"], delayed=True)
    with pytest.raises(UsageError, match=r"stage 0 cannot differentiate, .* changed in place"):
        fly(step, [lambda x=x: function(x) for x in inputs], overlapping(2, 2))
    # Without overlap this is no error.
    fly(make_step(net, ["b"], delayed=True), [lambda x=x: function(x) for x in inputs])


def test_weights_that_change_before_a_step_differentiates_are_an_error():
    """Check a step that differentiates in its forward. Other errors of torch must stay as they are."""
    net = Network()
    (x,) = make_inputs(1)

    def function():
        h = net.a(x).square()
        (slope,) = torch.autograd.grad(net.b(net.a(h)).sum(), h, create_graph=True)
        return net.loss(slope)

    step = make_step(net, ["b"], delayed=True)
    flight = Flight(step, function)
    with step.running():
        flight.forward(0)
        with torch.no_grad():
            net.a.weight.mul_(2)
        with pytest.raises(UsageError, match=r"stage 1 cannot differentiate, .* changed in place"):
            flight.forward(1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fly(step, [lambda: net.loss(net.b(x[:, :3]))])


def test_steps_outside_of_a_flight_do_not_wait():
    """Check that validation, or another call of the network, runs through while a micro-batch waits."""
    net = Network()
    (x,) = make_inputs(1)
    step = make_step(net, ["b", "c"], lambda: set_and_read(net, x))
    flight = Flight(step, lambda: set_and_read(net, x))
    expected = set_and_read(Network(), x)
    with step.running():
        flight.forward(0)
        assert torch.equal(net.c(net.b(net.a(x))), Network().c(Network().b(Network().a(x))))
        flight.forward(1)
        flight.forward(2)
    assert torch.equal(flight.loss, expected.detach())
    assert not net.b._forward_pre_hooks
