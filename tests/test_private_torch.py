"""What we use of torch without a public name still does what we rely on."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from aimc_pl.private_torch import (
    CALL,
    LEAF,
    call_of,
    count_function_modes,
    count_saved_tensor_hooks,
    current_function_mode,
    has_backward_hooks,
    has_global_backward_hooks,
    is_checkpointing,
    is_in_functorch,
    next_sequence_number,
    pop_function_modes,
    pop_saved_tensor_hooks,
    push_function_modes,
    push_saved_tensor_hooks,
    sequence_number,
    set_versions,
    storage_of,
    version,
    without_backward_hooks,
    without_functions,
    without_subclass_functions,
    zeros_at,
)


def test_nodes_are_numbered_as_they_are_made():
    x = torch.ones(2, requires_grad=True)
    first = next_sequence_number()
    a = x * 2
    between = next_sequence_number()
    assert next_sequence_number() == between  # to look makes no node
    b = a + x
    assert first <= sequence_number(a.grad_fn) < between <= sequence_number(b.grad_fn) < next_sequence_number()


def test_nodes_of_leaves_have_a_number_of_their_own():
    x = torch.ones(2, requires_grad=True)
    assert sequence_number(get_gradient_edge(x).node) == LEAF
    assert next_sequence_number() < LEAF


def test_ready_nodes_run_from_the_newest():
    order = []

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            order.append(ctx.name)
            return gradient, None

    x = torch.ones(2, requires_grad=True)
    first, second, third = (Told.apply(x, k) for k in range(3))
    torch.autograd.backward([second, first, third], [torch.ones(2)] * 3)
    assert order == [2, 1, 0]


def test_a_node_hook_sees_the_gradients_of_its_inputs():
    x, y = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    product = x * y
    seen = []
    product.grad_fn.register_hook(lambda inputs, outputs: seen.append((inputs, outputs)))
    product.backward(torch.tensor([1.0, 2.0]))
    ((inputs, outputs),) = seen
    assert [gradient.tolist() for gradient in inputs] == [[3, 6], [1, 2]]
    assert [gradient.tolist() for gradient in outputs] == [[1, 2]]


def test_zeros_at_an_edge():
    x = torch.ones(2, 3, requires_grad=True, dtype=torch.float64)
    values, indices = torch.sort(x)
    zeros = zeros_at(get_gradient_edge(values))
    assert zeros.dtype == torch.float64
    assert zeros.tolist() == [[0.0] * 3] * 2
    torch.autograd.backward([get_gradient_edge(values)], [zeros])
    assert x.grad.tolist() == [[0.0] * 3] * 2
    assert indices.shape == (2, 3)


def test_set_versions():
    x, y = torch.ones(2), torch.ones(2)
    x.add_(1)
    assert (x._version, y._version) == (1, 0)
    set_versions([x, y], [5, 6])
    assert (x._version, y._version) == (5, 6)
    w = torch.ones(2, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        w.mul_(3)
    set_versions([w], [0])
    loss.backward()
    assert w.grad.tolist() == [6, 6]


def save_something():
    torch.ones(1, requires_grad=True).exp()


def test_saved_tensor_hooks():
    packed = []

    def named(name):
        return saved_tensors_hooks(lambda tensor: packed.append(name) or tensor, lambda tensor: tensor)

    with named("outer"), named("inner"):
        assert count_saved_tensor_hooks() == 2
        save_something()
        (inner,) = pop_saved_tensor_hooks(keep=1)
        assert count_saved_tensor_hooks() == 1
        save_something()
        (outer,) = pop_saved_tensor_hooks()
        assert count_saved_tensor_hooks() == 0
        save_something()
        push_saved_tensor_hooks([inner, outer])
        save_something()
    assert packed == ["inner", "outer", "inner"]
    assert count_saved_tensor_hooks() == 0


class Named(TorchFunctionMode):
    def __init__(self, name, seen):
        super().__init__()
        self.name, self.seen = name, seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(self.name)
        return func(*args, **(kwargs or {}))


def test_function_modes():
    seen = []
    with Named("outer", seen), Named("inner", seen):
        assert count_function_modes() == 2
        torch.ones(1)
        assert seen == ["inner", "outer"]
        (inner,) = pop_function_modes(1)
        seen.clear()
        torch.ones(1)
        assert seen == ["outer"]
        push_function_modes([inner])
        modes = pop_function_modes(0)
        assert [mode.name for mode in modes] == ["inner", "outer"]
        seen.clear()
        torch.ones(1)
        assert seen == []
        push_function_modes(modes)
        torch.ones(1)
        assert seen == ["inner", "outer"]
    assert count_function_modes() == 0


def test_is_checkpointing():
    """In the forward of a checkpointed region, and in no other context that saves tensors in its own way.

    (The reentrant kind runs its region in no_grad, where no stage begins either.)
    """

    def region(x):
        seen.append(is_checkpointing())
        return x.exp()

    seen = []
    x = torch.ones(1, requires_grad=True)
    y = checkpoint(region, x, use_reentrant=False)
    z = region(y)
    assert seen == [True, False]
    z.backward()
    with torch.autograd.graph.save_on_cpu(), torch.no_grad():
        assert not is_checkpointing()

    def region_with_hooks_of_its_own(x):
        # A partial has no name.
        with saved_tensors_hooks(partial(torch.clone), lambda tensor: tensor):
            return region(x)

    seen.clear()
    checkpoint(region_with_hooks_of_its_own, x, use_reentrant=False)
    region_with_hooks_of_its_own(x)
    checkpoint(region, x, use_reentrant=True)
    assert seen == [True, False, False]
    assert count_saved_tensor_hooks() == 0


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        lambda function: torch.func.grad(lambda x: function(x).sum()),
        torch.func.jacrev,
        lambda function: lambda x: torch.func.jvp(function, (x,), (x,)),
        lambda function: torch.func.vmap(torch.func.grad(lambda x: function(x).sum())),
    ],
)
def test_is_in_functorch(transform):
    """In functions that transforms run, and in no other that autograd looks at."""
    seen = []

    def function(x):
        seen.append(is_in_functorch())
        return x.exp()

    x = torch.ones(2)
    transform(function)(x)
    assert seen
    assert all(seen)
    assert not is_in_functorch()
    seen.clear()
    function(x)
    torch.autograd.functional.jacobian(function, x)
    torch.func.functional_call(nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, x).register_hook(lambda g: function(g))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, x))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("is_disabled", [False, True])
def test_saved_tensor_hooks_while_they_are_disabled(is_disabled):
    """Within a context that forbids them there are none, and to count them is allowed."""
    if is_disabled:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            assert count_saved_tensor_hooks() == 0
    else:
        assert count_saved_tensor_hooks() == 0


class Telling(torch.Tensor):
    """Tells the functions that it is given to."""

    seen: list[str] = []  # noqa: RUF012, of the class

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_functions_are_not_intercepted():
    x = torch.ones(2).as_subclass(Telling)
    with Mode() as mode:
        assert current_function_mode() is mode
        Telling.seen.clear()
        mode.seen.clear()
        with without_functions():
            torch.add(x, 1)
        assert (Telling.seen, mode.seen) == ([], [])
        with without_subclass_functions():
            torch.add(x, 1)
        assert (Telling.seen, mode.seen) == ([], ["add"])
    assert current_function_mode() is None
    torch.add(x, 1)
    assert "add" in Telling.seen


def test_a_module_calls_what_stands_in_its_place():
    """And a call with hooks is what it has called before."""
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *args: calls.append("hook"))
    plain = call_of(module)
    setattr(module, CALL, lambda x: calls.append("instead") or plain(x))
    assert torch.equal(module(torch.ones(1, 2)), nn.functional.linear(torch.ones(1, 2), module.weight, module.bias))
    assert calls == ["instead", "hook"]


def test_versions_grow_with_changes_in_place():
    x = torch.zeros(2)
    before = version(x)
    x.add_(1)
    assert version(x) == before + 1
    with torch.inference_mode():
        assert version(torch.zeros(2)) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_share_their_storage(device):
    x, other = torch.zeros(4, device=device), torch.zeros(4, device=device)
    assert storage_of(x) == storage_of(x[1:]) != storage_of(other)


def test_backward_hooks_on_all_modules_are_seen():
    for register in (register_module_full_backward_hook, register_module_full_backward_pre_hook):
        assert not has_global_backward_hooks()
        with register(lambda *_: None):
            assert has_global_backward_hooks()


def test_backward_hooks_can_be_left_out():
    module, calls = nn.Sequential(nn.Linear(2, 2)), []
    assert not has_backward_hooks(module[0])
    module[0].register_full_backward_hook(lambda *args: calls.append("after"))
    module[0].register_full_backward_pre_hook(lambda *args: calls.append("before"))
    assert has_backward_hooks(module[0])
    with without_backward_hooks(module):
        module(torch.ones(1, 2)).sum().backward()
    assert calls == []
    module(torch.ones(1, 2)).sum().backward()
    assert calls == ["before", "after"]
