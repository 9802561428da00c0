"""These tests check that trials of a step leave no trace, repeat themselves, and find steps that stages change."""

import copy
import random
import warnings
from contextlib import nullcontext
from itertools import count, tee

import numpy as np
import pytest
import torch
from staged import make_step
from torch import nn

from aimc_pl.devices import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.trial import Trials, verify


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.b = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))
        self.c = nn.Linear(4, 4)
        self.generator = torch.Generator().manual_seed(4)
        self.generators = [np.random.default_rng(4), np.random.RandomState(4), random.Random(4)]
        self.rng, self.old_rng, self.pythons = self.generators
        self.stat = nn.Buffer(torch.zeros(4))
        self.kept = torch.zeros(4)
        self.losses, self.nested, self.count = [], {"a": [torch.zeros(4)]}, 0
        self.double()
        self.stat, self.kept = self.stat.double(), self.kept.double()
        self.memory, self.source = np.zeros(2), count()

    def forward(self, x):
        return self.c(self.b(self.a(x)))

    def loss(self, x):
        return self(x).square().mean()


def messy(net, x):
    """Compute a loss, leave something in every place, and draw from every source."""
    noise = torch.randn(4, generator=net.generator).double() + np.random.rand() + random.random()
    noise += net.rng.random() + net.old_rng.rand() + net.pythons.random()
    h = net.a(x) + noise
    net.stat.add_(1)
    net.kept += 2
    net.nested["a"][0].mul_(3).add_(1)
    net.nested["b"] = 1
    net.losses.append(h)
    net.count += 1
    net.new = h
    net.c.eval()
    net.b.hidden = h.detach()
    with torch.no_grad():
        net.c.bias.add_(0.5)
    net.memory += 1
    next(net.source)
    net.a[0].bias.requires_grad_(False)
    out = net.c(net.b(h))
    net.a[1].running_mean = net.a[1].running_mean + 1
    return out.square().mean() + noise.sum() * 0


def snapshot(net):
    """Return everything that a trial might change, found without the code under test."""
    states = [torch.get_rng_state(), net.generator.get_state()]
    arrays = np.random.get_state()
    net.source, peek = tee(net.source)
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "identities": {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]},
        "gradients": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()
        },
        "kept": (id(net.kept), net.kept.clone(), id(net.nested["a"][0]), net.nested["a"][0].clone()),
        "plain": (net.count, list(net.losses), id(net.losses), sorted(net.nested), id(net.nested), hasattr(net, "new")),
        "hidden": hasattr(net.b, "hidden"),
        "memory": (id(net.memory), net.memory.tolist()),
        "source": next(peek),
        "frozen": [parameter.requires_grad for parameter in net.parameters()],
        "training": [module.training for module in net.modules()],
        "generators": (net.rng.bit_generator.state, net.old_rng.get_state()[1].tolist(), net.pythons.getstate()),
        "random": (states, arrays[1].tolist(), arrays[2], random.getstate()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make_inputs(count=2):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("run", ["undivided", "gradients", "record", "staged", "check_memory", "losses", "fails"])
def test_trials_leave_no_trace(run, gradients):
    net = Network()
    if gradients:
        net.loss(make_inputs()[0]).backward()
    functions = [lambda x=x: messy(net, x) for x in make_inputs()]
    if run == "fails":

        def failing():
            messy(net, make_inputs()[0])
            raise KeyError

        functions = [failing]
    np.random.rand(3)
    before = snapshot(net)
    trials = Trials(net, functions)
    step = make_step(net, ["b", "c"])
    if run == "undivided":
        assert trials.undivided() is not None
    elif run == "gradients":
        assert trials.gradients([*net.c.parameters()]).numel() == 20
    elif run == "record":
        trials.record(step)
    elif run == "staged":
        assert trials.staged(step) is not None
    elif run == "losses":
        assert trials.losses(functions) is None  # the losses are random, so they are not comparable
    elif run == "fails":
        with pytest.raises(KeyError):
            trials.undivided()
    else:
        with pytest.raises(UsageError):
            trials.check_memory(step, trials.undivided())
    after = snapshot(net)
    assert {key for key in before if not same(before[key], after[key])} == set()


def test_messy_leaves_its_mark():
    """Check that everything that the test above compares does change without a trial."""
    net = Network()
    before = snapshot(net)
    messy(net, make_inputs()[0]).backward()
    after = snapshot(net)
    assert {key for key in before if same(before[key], after[key])} == set()


def test_pending_updates_of_tiles_are_put_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    convert_to_analog(net, "ideal")
    x = torch.randn(3, 4)
    net(x).sum().backward()
    contexts = [parameter for parameter in net.parameters() if hasattr(parameter, "analog_tile")]
    before = [(list(context.analog_input), list(context.analog_grad_output)) for context in contexts]
    assert all(len(inputs) == len(errors) == 1 for inputs, errors in before)
    trials = Trials(net, [lambda: net(2 * x).sum()])
    first, second = trials.undivided(), trials.undivided()
    for a, b in zip(first.gradients, second.gradients, strict=True):
        assert torch.equal(a, b)
    for context, (inputs, errors) in zip(contexts, before, strict=True):
        assert [id(value) for value in context.analog_input] == [id(value) for value in inputs]
        assert [id(value) for value in context.analog_grad_output] == [id(value) for value in errors]


def test_gradients_are_those_of_a_plain_backward():
    net, reference = Network().eval(), Network().eval()
    x, _ = make_inputs()
    reference.loss(x).backward()
    parameters = [net.c.bias, net.a[0].weight]
    found = Trials(net, [lambda: net.loss(x)]).gradients(parameters)
    expected = torch.cat([reference.c.bias.grad, reference.a[0].weight.grad.flatten()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
    assert all(parameter.grad is None for parameter in net.parameters())


class Watched:
    times = 0

    def __enter__(self):
        self.times += 1

    def __exit__(self, *error):
        pass


def test_undivided_is_a_plain_backward():
    """Check the first two micro-batches, one after the other."""
    net, reference = Network(), Network()
    x, other = make_inputs()
    states = torch.get_rng_state()
    losses = []
    for inputs in (x, other):
        # Both start from the same random states and statistics.
        torch.set_rng_state(states)
        buffers = copy.deepcopy(dict(reference.named_buffers()))
        losses.append(reference.loss(inputs))
        losses[-1].backward()
        reference.load_state_dict(buffers, strict=False)
    torch.set_rng_state(states)
    ignored = make_inputs(3)[2]
    watched = Watched()
    outcome = Trials(net, [lambda x=x: net.loss(x) for x in (x, other, ignored)]).undivided(watched)
    assert watched.times == 1
    assert all(map(torch.equal, outcome.losses, losses))
    assert len(outcome.losses) == 2
    assert not any(value.requires_grad for value in (*outcome.losses, *outcome.gradients))
    for ours, theirs in zip(outcome.gradients, reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
@pytest.mark.parametrize("delayed", [False, True])
def test_staged_equals_undivided_with_random_numbers(delayed, num_microbatches):
    """Check that micro-batches draw the same dropout masks, although others draw between their stages."""
    net = Network()
    functions = [lambda x=x: net.loss(x) for x in make_inputs(num_microbatches)]
    trials = Trials(net, functions)
    reference = trials.undivided()
    assert trials.draws
    staged = trials.staged(make_step(net, ["b", "c"], delayed=delayed))
    assert len(staged.losses) == len(reference.losses) == min(num_microbatches, 2)
    assert all(map(torch.equal, staged.losses, reference.losses))
    for ours, theirs in zip(staged.gradients, reference.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_what_a_step_draws_and_casts_is_noticed():
    (x,) = make_inputs(1)
    net = nn.Linear(4, 4).double()
    trials = Trials(net, [lambda: net(x).sum()])
    trials.undivided()
    assert not trials.draws
    assert not trials.casts
    net.held = Network().rng
    for draw in (torch.rand, np.random.rand, lambda n: random.random(), lambda n: net.held.random()):
        trials = Trials(net, [lambda draw=draw: net(x).sum() + 0 * torch.as_tensor(draw(1)).sum()])
        trials.undivided()
        assert trials.draws
    trials = Trials(net, [lambda: net.weight.float().sum()])
    trials.undivided()
    assert trials.casts


def test_a_step_that_skips_its_first_micro_batch():
    net = Network()
    x, _ = make_inputs()
    assert Trials(net, [lambda: None]).undivided() is None
    assert Trials(net, [lambda: None, lambda: net.loss(x)]).undivided() is None
    with pytest.raises(UsageError, match="depends on no parameter that requires grad; to skip a batch"):
        Trials(net, [lambda: net.loss(x).detach()]).undivided()
    assert Trials(net, [lambda: None]).losses([lambda: None]) is None


def test_losses_are_each_from_the_same_state():
    """Check that each loss starts from the same state. Dropout is switched off if nothing else is random."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    inputs = make_inputs(3)
    functions = [lambda x=x: (net(x) + net[1].running_mean).square().mean() for x in inputs]
    trials = Trials(net, functions[:1])
    assert trials.losses(functions) is None
    trials.undivided()
    losses = trials.losses(functions)
    assert losses is not None
    assert net[2].training
    assert not any(loss.requires_grad for loss in losses)
    net[2].eval()
    assert losses == Trials(net, functions[:1]).losses(functions)
    for function, loss in zip(functions, losses, strict=True):
        net[1].reset_running_stats()
        assert torch.equal(function().detach(), loss)
    net[2] = nn.LSTM(4, 4, num_layers=2, dropout=0.5).double()
    functions = [lambda x=x: net(x)[0].square().mean() for x in inputs]
    trials = Trials(net, functions[:1])
    trials.undivided()
    assert trials.losses(functions) is None


@pytest.mark.parametrize("differentiates", [False, True])
def test_forwards_alone_run_without_gradients(differentiates):
    """Check that forwards run without gradients, which saves memory, unless the step differentiates in its forward."""
    net = Network().eval()
    inputs = make_inputs(3)
    enabled = []

    def function(x):
        enabled.append(torch.is_grad_enabled())
        x = x.clone().requires_grad_()
        loss = net.loss(x)
        return loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum() if differentiates else loss

    functions = [lambda x=x: function(x) for x in inputs]
    trials = Trials(net, functions)
    reference = trials.undivided()
    trials.check_repeats(reference)
    enabled.clear()
    losses = trials.losses(functions, reference)
    assert enabled == [differentiates]  # the losses of the first two are already known
    assert torch.equal(torch.stack(losses), torch.stack([function(x).detach() for x in inputs]))


@pytest.mark.parametrize("remembers", [False, True])
def test_recording_shows_whether_a_step_remembers(remembers):
    """Check that the step is searched for memory only if it remembers. test_memory_is_named checks the search."""
    m = Remembering()
    calls = []

    def function(x):
        calls.append(1)
        return hidden_state(m, x) if remembers else nothing(m, x)

    trials = Trials(m, [lambda x=x: function(x) for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(m, ["net.1", "net.2"])
    trials.record(step, reference)
    calls.clear()
    with pytest.raises(UsageError, match="left in") if remembers else nullcontext():
        trials.check_memory(step, reference)
    assert bool(calls) == remembers


SHARED = []


class Holder:
    value = None


def through_a_global_list(net, x):
    SHARED.append(x)
    h = net.b(net.a(x))
    return (net.c(h) * SHARED.pop()).square().mean()


def through_a_global_list_from_the_front(net, x):
    SHARED.insert(0, x)
    h = net.b(net.a(x))
    return (net.c(h) * SHARED.pop(0)).square().mean()


def through_a_class(net, x):
    Holder.value = x
    h = net.b(net.a(x))
    return (net.c(h) + Holder.value).square().mean()


def through_a_buffer_in_place(net, x):
    net.stat.copy_(x.mean(0))
    h = net.b(net.a(x))
    return (net.c(h) * net.stat).square().mean()


def through_a_tensor_in_place(net, x):
    net.kept.copy_(x.mean(0))
    h = net.b(net.a(x))
    return (net.c(h) * net.kept).square().mean()


WRONG = [
    through_a_global_list_from_the_front,
    through_a_class,
    through_a_buffer_in_place,
    through_a_tensor_in_place,
]


@pytest.mark.slow
@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_verify_refuses_what_micro_batches_share(function):
    SHARED.clear()
    net = Network().eval()
    trials = Trials(net, [lambda x=x: function(net, x) for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(net, ["b", "c"])
    trials.record(step)
    with pytest.raises(UsageError, match=r"gives (a loss of .* in the place of|another gradient of) .*verify=False"):
        verify(trials, step, reference)


def test_verify_refuses_another_gradient():
    """Check a step with the right loss but another gradient."""

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factors):
            factors.append(len(factors) + 1.0)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factors[-1], None

    net = Network().eval()
    factors = []

    def function(x):
        factors[:] = []
        return net.c(Leaks.apply(net.b(net.a(x)), factors)).square().mean()

    def other(x):
        return net.c(Leaks.apply(net.b(net.a(x)), factors)).square().mean()

    x, y = make_inputs()
    trials = Trials(net, [lambda: function(x), lambda: other(y)])
    reference = trials.undivided()
    with pytest.raises(UsageError, match=r"gives another gradient of 'a\.0\.weight'"):
        verify(trials, make_step(net, ["b", "c"]), reference)


def test_a_step_that_does_not_repeat_itself_is_refused():
    net = Network()
    inputs = make_inputs()
    trials = Trials(net, [lambda x=x: net.loss(x) for x in inputs])
    reference = trials.undivided()
    trials.check_repeats(reference)
    verify(trials, make_step(net, ["b", "c"], delayed=True), reference)
    # This step gives another loss at each run.
    times = []

    def restless(x):
        times.append(1)
        return net.loss(x) * len(times)

    trials = Trials(net, [lambda x=x: restless(x) for x in inputs])
    reference = trials.undivided()
    message = r"gives a loss of .* when it runs again from the same state: it keeps something where"
    with pytest.raises(UsageError, match=message):
        trials.check_repeats(reference)
    with pytest.raises(UsageError, match=message):
        verify(trials, make_step(net, ["b", "c"]), reference)


def test_verify_looks_at_the_second_loss_too():
    """Check a step in which only the second micro-batch meets what another one has left."""
    net = Network().eval()

    def function(x):
        Holder.value = 0.0
        loss = net.c(net.b(net.a(x))).square().mean() + Holder.value
        Holder.value = 1.0
        return loss

    trials = Trials(net, [lambda x=x: function(x) for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(net, ["b", "c"])
    first, second = (loss.item() for loss in reference.losses)
    assert [loss.item() for loss in trials.staged(step).losses] == pytest.approx([first, second + 1], rel=1e-12)
    with pytest.raises(UsageError, match="gives a loss of"):
        verify(trials, step, reference)


def test_verify_looks_at_the_second_gradient_too():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            Holder.value = 1.0
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            scale, Holder.value = Holder.value, 2.0
            return gradient * scale

    net = Network().eval()
    trials = Trials(net, [lambda x=x: Scaled.apply(net.c(net.b(net.a(x)))).square().mean() for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(net, ["b", "c"])
    assert all(map(torch.equal, trials.staged(step).losses, reference.losses))
    with pytest.raises(UsageError, match="gives another gradient of"):
        verify(trials, step, reference)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        self.norm = nn.BatchNorm1d(4)
        self.hidden, self.queue, self.count, self.losses = None, [], 0, []
        self.seen = {"last": torch.zeros(4)}
        self.u = nn.Buffer(torch.ones(4))
        self.memory, self.vocabulary = np.zeros(4), {k: k for k in range(1000)}
        self.double()
        self.seen["last"] = self.seen["last"].double()


def hidden_state(m, x):
    h = m.net[0](x)
    h = h if m.hidden is None else h + m.hidden
    m.hidden = h.detach()
    return m.net[2](m.net[1](h)).square().mean()


def memory_queue(m, x):
    h = m.net[1](m.net[0](x))
    loss = m.net[2](h).square().mean() + sum(((h - old) ** 2).mean() for old in m.queue)
    m.queue.append(h.detach())
    return loss


def power_iteration(m, x):
    weight = m.net[1].weight
    with torch.no_grad():
        m.u.copy_(nn.functional.normalize(weight @ (weight.T @ m.u), dim=0))
    sigma = (weight.T @ m.u).norm()
    return m.net[2](m.net[1](m.net[0](x)) / sigma).square().mean()


def tensor_in_a_dict(m, x):
    h = m.net[1](m.net[0](x)) + m.seen["last"]
    m.seen["last"].copy_(h.detach().mean(0))
    return m.net[2](h).square().mean()


def array_in_place(m, x):
    h = m.net[1](m.net[0](x)) + torch.as_tensor(m.memory.copy())
    m.memory[:] = h.detach().mean(0)
    return m.net[2](h).square().mean()


def large_dict(m, x):
    h = m.net[1](m.net[0](x)) * m.vocabulary[3]
    m.vocabulary[3] += 1
    return m.net[2](h).square().mean()


def running_mean_in_eval(m, x):
    h = m.norm(m.net[0](x))
    m.norm.eval()
    loss = m.net[2](m.net[1](m.norm(h))).square().mean()
    m.norm.train()
    return loss


def warm_up(m, x):
    m.count += 1
    return m.net[2](m.net[1](m.net[0](x))).square().mean() * m.count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "names"),
    [
        (hidden_state, "'hidden'"),
        (memory_queue, "'queue'"),
        (power_iteration, "'u'"),
        (tensor_in_a_dict, "'seen.last'"),
        (array_in_place, "'memory'"),
        (running_mean_in_eval, "'norm.running_mean', 'norm.running_var'"),
        (warm_up, "'count'"),
        (large_dict, "'vocabulary'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_memory_is_named(function, names):
    """Check that only attributes are named that the step also reads, and not others that it writes."""

    def run(x):
        m.losses.append(x)
        m.step_of = 3
        return function(m, x)

    m = Remembering()
    trials = Trials(m, [lambda x=x: run(x) for x in make_inputs()])
    step = make_step(m, ["net.1", "net.2"])
    with pytest.raises(UsageError, match=f"left in {names}, and micro-batches overlap"):
        trials.check_memory(step, trials.undivided())


def counters(m, x):
    m.count += 1
    m.losses.append(x)
    return m.net[2](m.net[1](m.norm(m.net[0](x)))).square().mean()


def set_anew(m, x):
    m.hidden = m.net[0](x)
    m.queue.clear()
    m.queue.append(m.net[1](m.hidden))
    return m.net[2](m.hidden + m.queue[0]).square().mean()


def cleared_at_the_end(m, x):
    m.queue.append(m.net[0](x))
    m.hidden = m.net[1](m.queue[0])
    loss = m.net[2](m.hidden + m.queue[0]).square().mean()
    m.queue.clear()
    m.hidden = None
    return loss


def started_anew_before_it_is_set(m, x):
    """Reset an attribute in the first stage and set it in another one. At the first step there is nothing to reset."""
    m.hidden = None
    h = m.net[1](m.net[0](x))
    m.hidden = h if m.hidden is None else m.hidden + h
    return m.net[2](m.hidden).square().mean()


def set_anew_by_several_stages(m, x):
    m.queue = [m.net[0](x)]
    m.queue.append(m.net[1](m.queue[0]))
    m.queue.append(m.net[2](m.queue[1]))
    return sum(m.queue).square().mean()


def nothing(m, x):
    return m.net[2](m.net[1](m.net[0](x))).square().mean()


@pytest.mark.parametrize(
    "function",
    [counters, set_anew, cleared_at_the_end, started_anew_before_it_is_set, set_anew_by_several_stages, nothing],
    ids=lambda function: function.__name__,
)
def test_what_is_not_read_again_is_no_memory(function):
    m = Remembering()
    trials = Trials(m, [lambda x=x: function(m, x) for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(m, ["net.1", "net.2"])
    trials.record(step)
    trials.check_memory(step, reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(trials, step, reference)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_that_reads_gradients_is_refused(overlaps):
    """Check a penalty on the last step's gradient, whether micro-batches overlap or not."""
    m = Remembering()

    def function(x):
        loss = nothing(m, x)
        grad = m.net[1].weight.grad
        return loss if grad is None else loss + grad.square().sum()

    trials = Trials(m, [lambda x=x: function(x) for x in make_inputs()])
    step = make_step(m, ["net.1", "net.2"], overlaps=overlaps)
    with pytest.raises(UsageError, match="reads gradients of parameters"):
        trials.check_memory(step, trials.undivided())


def test_gradients_taken_within_the_step_are_no_memory():
    """Check a gradient with respect to the input, in a graph of its own."""
    m = Remembering()

    def function(x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m.net[0](x).square().sum(), x, create_graph=True)
        return nothing(m, x) + slope.square().mean()

    trials = Trials(m, [lambda x=x: function(x) for x in make_inputs()])
    reference = trials.undivided()
    trials.check_memory(make_step(m, ["net.1", "net.2"]), reference)
    assert all(parameter.grad is None for parameter in m.parameters())


def test_a_batch_that_the_step_changes_is_put_back_between_runs():
    """Check that every run starts from the unchanged batch."""
    m = Remembering()
    batches = [{"x": x, "scale": torch.tensor(2.0).double()} for x in make_inputs()]
    before = [{name: value.clone() for name, value in batch.items()} for batch in batches]

    def function(batch):
        x = batch.pop("x").mul_(batch["scale"])
        batch["scale"].add_(1)
        return nothing(m, x)

    expected = [nothing(m, 2 * batch["x"]).detach() for batch in before]
    trials = Trials(m, [lambda batch=batch: function(batch) for batch in batches], batches)
    reference = trials.undivided()
    assert all(map(torch.equal, reference.losses, expected))
    step = make_step(m, ["net.1", "net.2"])
    trials.record(step)
    trials.check_memory(step, reference)
    verify(trials, step, reference)
    for batch, known in zip(batches, before, strict=True):
        assert batch.keys() == known.keys()
        assert all(torch.equal(batch[name], known[name]) for name in known)


def test_iterators_on_modules_start_each_run_anew():
    m = Remembering()
    m.source = (k + 1.0 for k in range(9))
    x, _ = make_inputs()
    trials = Trials(m, [lambda: nothing(m, x) * next(m.source)])
    first, second = trials.undivided(), trials.undivided()
    assert torch.equal(first.losses[0], second.losses[0])
    assert torch.equal(first.losses[0], nothing(m, x).detach())
    assert next(m.source) == 1


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_recording_notices_seeding(seeds, overlaps):
    m = Remembering()
    x, _ = make_inputs()

    def function():
        if seeds:
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                noise = torch.randn(4).double()
        else:
            noise = torch.randn(4).double()
        return nothing(m, x + noise)

    step = make_step(m, ["net.1", "net.2"], overlaps=overlaps)
    Trials(m, [function]).record(step)
    assert (step.random is not None) == (seeds and overlaps)


@pytest.mark.parametrize("delayed", [False, True])
def test_staged_runs_pretend_updates(delayed):
    """Check that a step that differentiates another stage's values finds changed weights there."""
    m = Remembering()

    def function(x):
        h = m.net[0](x)
        out = m.net[2](m.net[1](h))
        (slope,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
        return out.square().mean() + slope.square().sum()

    trials = Trials(m, [lambda x=x: function(x) for x in make_inputs()])
    step = make_step(m, ["net.1", "net.2"], delayed=delayed)
    if delayed:
        with pytest.raises(UsageError, match=r"stage 2 cannot differentiate, .* changed in place"):
            trials.staged(step)
    else:
        verify(trials, step, trials.undivided())


def test_a_list_that_several_stages_add_to_is_refused():
    m = Remembering()

    def function(x):
        h = m.net[0](x)
        m.queue.append(h.detach())
        h = m.net[1](h)
        m.queue.append(h.detach())
        return m.net[2](h).square().mean()

    trials = Trials(m, [lambda x=x: function(x) for x in make_inputs()])
    reference = trials.undivided()
    step = make_step(m, ["net.1", "net.2"])
    trials.record(step)
    with pytest.raises(UsageError, match=r"adds to 'queue' in several stages without resetting it"):
        trials.check_memory(step, reference)
