"""These tests compare the backward in stages with an undivided one: gradients, hooks, and how often functions run."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aimc_pl.errors import UsageError
from aimc_pl.graph import CutGraph
from aimc_pl.suspension import SuspendableCall


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Program:
    """A computation in stages, each of which gets what the stage before has returned.

    Args:
        events: a list to which hooks and functions append what they see.
    """

    def __init__(self, events):
        self.events = events
        self.x = torch.randn(5, 4)
        self.w = [nn.Parameter(0.5 * torch.randn(4, 4)) for _ in range(4)]
        self.build()

    def build(self):
        """Create what the stages need."""

    def note(self, name):
        return lambda *values: self.events.append((name, *values))


class Chain(Program):
    def stages(self):
        return [
            lambda _: torch.tanh(self.x @ self.w[0]),
            lambda h: torch.tanh(h @ self.w[1]),
            lambda h: torch.tanh(h @ self.w[2]),
            lambda h: (h @ self.w[3]).square().mean(),
        ]


class Skips(Program):
    """Values that the next stage uses, that later stages use, and that all stages use."""

    def first(self, _):
        a = torch.tanh(self.x @ self.w[0])
        return a, a.sum(0, keepdim=True)

    def stages(self):
        return [
            self.first,
            lambda v: (torch.tanh(v[0] @ self.w[1]), v[0], v[1]),
            lambda v: (torch.tanh(v[0] @ self.w[2]) * v[1], v[1] + v[2]),
            lambda v: ((v[0] + v[1]) @ self.w[3]).square().mean(),
        ]


class Tied(Chain):
    """One parameter in every stage. Its hooks see the whole gradient once."""

    def build(self):
        self.w = [self.w[0]] * 4
        self.w[0].register_hook(self.note("tensor"))
        self.w[0].register_hook(lambda gradient: 3 * gradient)
        self.w[0].register_post_accumulate_grad_hook(lambda w: self.events.append(("accumulated", w.grad.clone())))


class TiedAcrossSkip(Program):
    """A tied parameter where the gradients of the second stage do not lead to the parameter's first use."""

    def build(self):
        self.w[0].register_hook(self.note("tensor"))

    def stages(self):
        return [
            lambda _: self.x @ self.w[0],
            lambda a: (a, torch.tanh(self.x.flip(0) @ self.w[0]) @ self.w[1]),
            lambda v: (v[0], torch.tanh(v[1] @ self.w[0])),
            lambda v: (v[0] * v[1]).square().mean(),
        ]


class TiedSparse(Program):
    """An embedding with both sparse and dense gradients."""

    def stages(self):
        rows = torch.tensor([0, 2, 0])
        return [
            lambda _: F.embedding(rows, self.w[0], sparse=True),
            lambda h: torch.tanh(h @ self.w[0].T),
            lambda h: h @ self.w[1] + F.embedding(rows, self.w[0], sparse=True),
            lambda h: (h * F.embedding(rows, self.w[0], sparse=True)).square().mean(),
        ]


class HookOnCrossing(Program):
    """A value that two later stages use, with a hook that changes its whole gradient once."""

    def first(self, _):
        h = torch.tanh(self.x @ self.w[0])
        h.register_hook(self.note("whole"))
        h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        h.register_hook(self.note("clamped"))
        return h

    def stages(self):
        return [
            self.first,
            lambda h: (torch.tanh(h @ self.w[1]), h),
            lambda v: (v[0] @ self.w[2], v[1]),
            lambda v: (v[0] * v[1]).square().mean(),
        ]


class RetainedGradients(Program):
    """Retained gradients of a value inside a stage and of one that crosses a boundary."""

    def first(self, _):
        self.inner = self.x @ self.w[0]
        self.outer = torch.tanh(self.inner)
        self.inner.retain_grad()
        self.outer.retain_grad()
        return self.outer

    def last(self, v):
        loss = (v[0] + v[1]).square().mean()
        loss.register_hook(lambda _: self.events.append(("loss", _)))
        return loss

    def after(self):
        return [self.inner.grad, self.outer.grad]

    def stages(self):
        return [self.first, lambda h: (h @ self.w[1], h), self.last]


class ModuleHooks(Program):
    """Full backward hooks of modules inside a stage, and of a module around several stages."""

    def build(self):
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.w = [*self.net.parameters()]
        for name, module in self.net.named_modules():
            module.register_full_backward_pre_hook(
                lambda module, gradients, name=name: self.note(f"pre {name}")(*gradients)
            )
            module.register_full_backward_hook(
                lambda module, inputs, outputs, name=name: self.note(f"post {name}")(*inputs, *outputs)
            )
        self.net.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
        self.before = nn.Parameter(torch.randn(4))
        self.w.append(self.before)

    def stages(self):
        # The whole network is called, so its own hooks run. Calls inside begin the stages.
        return in_stages(lambda: self.net(self.x * self.before).square().mean(), [self.net[1], self.net[2]])


class NoGradients(Program):
    """A custom function without a gradient for one of its inputs, and an output that nothing uses."""

    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * 2, y * 3

        @staticmethod
        def backward(ctx, gradient, other):
            return gradient * 2, None

    def second(self, v):
        used, unused = self.Split.apply(*v)
        del unused
        return used, v[1]

    def stages(self):
        return [
            lambda _: (self.x @ self.w[0], self.x @ self.w[1]),
            self.second,
            lambda v: (v[0] @ self.w[2]).square().mean() + 0 * v[1].sum(),
        ]


class EarlyLoss(Program):
    """A loss that does not depend on the last stages. Their parameters get no gradient."""

    def stages(self):
        return [
            lambda _: torch.tanh(self.x @ self.w[0]),
            lambda h: ((h @ self.w[1]).square().mean(), h),
            lambda v: (v[0], v[1] @ self.w[2]),
            lambda v: v[0],
        ]


class DoubleBackward(Program):
    """A gradient penalty, and a gradient with respect to a parameter in the last stage."""

    def build(self):
        self.x.requires_grad_()

    def last(self, h):
        out = h @ self.w[2]
        (slope,) = torch.autograd.grad(out.sum(), self.x, create_graph=True)
        (steep,) = torch.autograd.grad(out.square().sum(), self.w[1], create_graph=True)
        return out.square().mean() + slope.square().sum() + steep.norm()

    def after(self):
        return [self.x.grad]

    def stages(self):
        return [
            lambda _: torch.tanh(self.x @ self.w[0]),
            lambda h: torch.tanh(h @ self.w[1]),
            self.last,
        ]


class Checkpointed(Program):
    reentrant = False

    def block(self, h, w):
        self.events.append(("forward",))
        return torch.tanh(torch.tanh(h @ w) @ w)

    def stages(self):
        kwargs = {"use_reentrant": self.reentrant}
        return [
            lambda _: self.x @ self.w[0],
            lambda h: checkpoint(self.block, h, self.w[1], **kwargs) + h,
            lambda h: checkpoint(self.block, checkpoint(self.block, h, self.w[2], **kwargs), self.w[3], **kwargs),
            lambda h: (h @ self.w[0]).square().mean(),
        ]


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class ChangedInPlace(Program):
    """Stages that write into a value of an earlier stage, also through a view."""

    def second(self, h):
        h[:, 1] *= 3.0
        h.add_(torch.tanh(self.x @ self.w[1]))
        return h

    def stages(self):
        return [
            lambda _: self.x @ self.w[0],
            self.second,
            lambda h: h.view(-1).mul_(2).view(5, 4) @ self.w[2],
            lambda h: h.square().mean(),
        ]


class Counted(Program):
    """A function that reports each run of its backward, in every stage, in branches that join again."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tell, name):
            ctx.tell, ctx.name = tell, name
            return torch.sin(x)

        @staticmethod
        def backward(ctx, gradient):
            ctx.tell(ctx.name)()
            return gradient * 2, None, None

    def stages(self):
        def run(x, name):
            return self.Function.apply(x, self.note, name)

        return [
            lambda _: (run(self.x @ self.w[0], "a"), run(self.x @ self.w[1], "b")),
            lambda v: (run(v[0] + v[1], "c"), run(v[0], "d"), v[1]),
            lambda v: run(v[0] * v[1], "e") + v[2],
            lambda h: run(h @ self.w[2], "f").square().mean(),
        ]


class Constant(Chain):
    """A loss that is a leaf itself and the only tensor with a gradient."""

    def build(self):
        self.w.append(nn.Parameter(torch.tensor(2.0)))

    def stages(self):
        return [*super().stages()[:3], lambda h: self.w[4]]


def in_stages(function, openers):
    """Return the stages of one call, which waits where it calls one of the ``openers``."""
    call = SuspendableCall(function)

    def wait(module, args):
        current = SuspendableCall.current()
        if current is not None:
            current.suspend()

    for module in openers:
        module.register_forward_pre_hook(wait)
    return [lambda _: call.start(), *[lambda _: call.resume() for _ in openers]]


PROGRAMS = {
    program.__name__: program
    for program in (
        Chain,
        Skips,
        Tied,
        TiedAcrossSkip,
        TiedSparse,
        HookOnCrossing,
        RetainedGradients,
        ModuleHooks,
        NoGradients,
        EarlyLoss,
        DoubleBackward,
        Checkpointed,
        CheckpointedReentrant,
        ChangedInPlace,
        Counted,
        Constant,
    )
}


def undivided(program, weight=1.0):
    value = None
    for stage in program.stages():
        value = stage(value)
    value.backward(torch.full_like(value, weight))
    return value


def divided(program, weight=1.0):
    graph = CutGraph(torch.zeros((), requires_grad=True))
    value, stages = None, program.stages()
    for stage in stages:
        graph.begin_stage()
        value = stage(value)
        graph.end_stage()
    graph.close(value, torch.full_like(value, weight))
    for index in reversed(range(len(stages))):
        graph.backward(index)
    return value


def gradients(program):
    found = [w.grad for w in program.w] + getattr(program, "after", list)()
    return [None if gradient is None else gradient.to_dense() for gradient in found]


def assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_an_undivided_backward(name):
    """Compare gradients and all events: as many, and with the same values."""
    told = []
    for run in (undivided, divided):
        torch.manual_seed(1)
        events = []
        program = PROGRAMS[name](events)
        value = run(program, weight=0.25)
        told.append((value.detach(), gradients(program), events))
    (value, ours, events), (expected, theirs, expected_events) = told
    assert torch.equal(value, expected)
    assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in theirs)
    assert_alike(ours, theirs)
    assert sorted(name for name, *_ in events) == sorted(name for name, *_ in expected_events)
    for (_, *ours), (_, *theirs) in zip(in_order(events), in_order(expected_events), strict=True):
        assert_alike(ours, theirs)


def in_order(events):
    """Sort events by name. A tied parameter's hooks run with its first stage, so the order of all events may differ."""
    return sorted(events, key=lambda event: event[0])


@pytest.mark.parametrize("name", PROGRAMS)
def test_frees_the_graph(name):
    """Check that nothing holds the nodes after the backward, without a garbage collection."""
    program = PROGRAMS[name]([])

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = Marker()
            alive.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Marker:
        pass

    def mark(value):
        if isinstance(value, tuple):
            return tuple(map(mark, value))
        return Marked.apply(value) if isinstance(value, torch.Tensor) else value

    alive = []
    stages = [lambda value, stage=stage: mark(stage(value)) for stage in program.stages()]
    program.stages = lambda: stages
    gc.disable()
    try:
        value = divided(program).detach()
        assert value.numel() == 1
        assert alive
        assert all(marker() is None for marker in alive)
    finally:
        gc.enable()


def test_frees_each_stage_with_its_backward():
    """Check that after the backward of a stage only the nodes of earlier stages are alive."""

    class Marker:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, stage):
            ctx.marker = Marker()
            alive[stage] = weakref.ref(ctx.marker)
            return x.sin()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    alive = {}
    w = nn.Parameter(torch.randn(3))
    graph, value = CutGraph(torch.zeros((), requires_grad=True)), None
    for stage in range(4):
        graph.begin_stage()
        value = Marked.apply(w if value is None else value * w, stage)
        if stage == 3:
            value = value.sum()
        graph.end_stage()
    graph.close(value, torch.ones_like(value))
    del value
    gc.disable()
    try:
        for stage in (3, 2, 1, 0):
            graph.backward(stage)
            assert [alive[other]() is not None for other in range(4)] == [other < stage for other in range(4)]
    finally:
        gc.enable()


def test_micro_batches_that_take_turns():
    """Check that two micro-batches of one thread keep their graphs apart when their stages take turns."""
    torch.manual_seed(1)
    programs = [Skips([]), Skips([])]
    for program in programs:
        undivided(program)
    expected = [gradients(program) for program in programs]
    for program in programs:
        for w in program.w:
            w.grad = None
    graphs = [CutGraph(torch.zeros((), requires_grad=True)) for _ in programs]
    stages = [program.stages() for program in programs]
    values = [None, None]
    for index in range(4):
        for k, graph in enumerate(graphs):
            graph.begin_stage()
            values[k] = stages[k][index](values[k])
            graph.end_stage()
    for graph, value in zip(graphs, values, strict=True):
        graph.close(value, torch.ones_like(value))
    for index in reversed(range(4)):
        for graph in graphs:
            graph.backward(index)
    for program, theirs in zip(programs, expected, strict=True):
        assert_alike(gradients(program), theirs)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_value_of_another_micro_batch_is_refused(when):
    w = nn.Parameter(torch.randn(3))
    foreign = torch.exp(w)
    graph = CutGraph(torch.zeros((), requires_grad=True))
    graph.begin_stage()
    h = torch.tanh(w)
    graph.end_stage()
    if when == "between":
        foreign = torch.exp(w)
    graph.begin_stage()
    loss = (h * foreign).sum()
    graph.end_stage()
    with pytest.raises(UsageError, match=r"\(ExpBackward0\) that was computed outside of this micro-batch"):
        graph.close(loss, torch.ones_like(loss))


def test_leaves_are_those_of_each_stage():
    w = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    frozen = torch.randn(3)
    graph = CutGraph(torch.zeros((), requires_grad=True))
    graph.begin_stage()
    h = w[0] * frozen
    graph.end_stage()
    graph.begin_stage()
    h = h * w[1].detach() + w[0]
    graph.end_stage()
    graph.begin_stage()
    loss = (h * w[2]).sum()
    graph.end_stage()
    leaves = graph.close(loss, torch.ones_like(loss))
    assert [[id(leaf) for leaf in stage] for stage in leaves] == [[id(w[0])], [id(w[0])], [id(w[2])]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_anomaly_detection_has_nothing_to_report(name):
    program = PROGRAMS[name]([])
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("error")
        divided(program)


def test_anomaly_detection_reports_what_fails():
    w = nn.Parameter(torch.zeros(3))
    program = Chain([])
    program.stages = lambda: [lambda _: torch.sqrt(w * 0), lambda h: (h * 0).sum(), lambda h: h * 1]
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="Error detected in SqrtBackward0"),
        pytest.raises(RuntimeError, match="SqrtBackward0' returned nan"),
    ):
        divided(program)


def test_errors_of_a_backward_are_raised():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError("of the user")

    program = Chain([])
    first, *others = program.stages()
    program.stages = lambda: [first, lambda h: Fails.apply(h), *others]
    with pytest.raises(KeyError, match="of the user"):
        divided(program)
