"""These tests check that private names of torch, which this project uses, still behave as it needs."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.forward_ad import dual_level as enter_dual_level
from torch.autograd.graph import (
    disable_saved_tensors_hooks,
    get_gradient_edge,
    register_multi_grad_hook,
    saved_tensors_hooks,
)
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage], documented
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from aimc_pl.private_torch import (
    CALL,
    LEAF,
    Loss,
    TorchDispatchMode,
    attributes_of_optimizer,
    base_of,
    call_of,
    count_dispatch_modes,
    count_function_modes,
    count_saved_tensor_hooks,
    current_function_mode,
    default_store,
    dual_level,
    has_backward_hooks,
    has_global_backward_hooks,
    hooks_of,
    is_checkpointing,
    is_in_functorch,
    is_in_torch_dispatch_mode,
    next_sequence_number,
    parameters_of,
    pop_dispatch_modes,
    pop_function_modes,
    pop_saved_tensor_hooks,
    push_dispatch_modes,
    push_function_modes,
    push_saved_tensor_hooks,
    registration_of,
    sdpa_backends,
    sequence_number,
    set_hooks,
    set_sdpa_backends,
    set_versions,
    set_why_no_saved_tensor_hooks,
    show_steps_to_schedulers,
    storage_of,
    tree_leaves,
    tree_map,
    version,
    why_no_saved_tensor_hooks,
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
    assert next_sequence_number() == between  # the call itself makes no node
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


def test_dispatch_modes_are_left_and_entered_again():
    seen, calls = [], []

    class Mode(TorchDispatchMode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(self.name)
            return func(*args, **(kwargs or {}))

        def __exit__(self, *error):
            calls.append(self.name)
            super().__exit__(*error)

    def tell():
        seen.clear()
        torch.ones(1)
        return seen[:]

    with Mode("outer"), Mode("middle"), Mode("inner"):
        assert count_dispatch_modes() == 3
        assert tell() == ["inner", "middle", "outer"]
        popped = pop_dispatch_modes(1)
        assert [mode.name for mode in popped] == ["inner", "middle"]
        assert tell() == ["outer"]
        push_dispatch_modes(popped)
        popped = pop_dispatch_modes(0)
        assert tell() == []
        assert not is_in_torch_dispatch_mode()
        push_dispatch_modes(popped)
        assert tell() == ["inner", "middle", "outer"]
        assert calls == []
    assert calls == ["inner", "middle", "outer"]
    assert count_dispatch_modes() == 0
    assert not is_in_torch_dispatch_mode()


def test_attributes_of_an_optimizer_are_without_hooks():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    optimizer.register_step_pre_hook(print)
    optimizer.register_step_post_hook(print)
    optimizer.own = 3
    left_out = {*vars(optimizer)} - {*attributes_of_optimizer(optimizer)}
    assert {
        name for name, value in vars(optimizer).items() if isinstance(value, dict) and print in value.values()
    } <= left_out
    assert {"param_groups", "state"} < left_out
    assert attributes_of_optimizer(optimizer)["own"] == 3
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer)
    assert "step" not in attributes_of_optimizer(optimizer)


def test_is_checkpointing():
    """Check the forward of a checkpointed region against other contexts that save tensors in their own way.

    The reentrant kind runs its region in no_grad, where no stage begins either.
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
        # A partial has no name by which it could be recognised.
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
    """Check functions that transforms of torch.func run, against functions that only autograd calls."""
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
    """Check that saved-tensor hooks can be counted in a context that forbids them, and that there are none."""
    if is_disabled:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            assert count_saved_tensor_hooks() == 0
    else:
        assert count_saved_tensor_hooks() == 0


class Telling(torch.Tensor):
    """A tensor that records the functions it is passed to."""

    seen: list[str] = []  # noqa: RUF012, shared by all tensors of the class

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
    """Check that a module calls the replacement, between its hooks if it has any."""
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


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # some inputs have no gradient on purpose
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


def test_base_of_a_view():
    x = torch.zeros(4)
    assert base_of(x[1:][1:]) is x
    assert base_of(x) is x


def test_losses_have_one_base():
    assert isinstance(nn.CrossEntropyLoss(), Loss)
    assert isinstance(nn.MSELoss(reduction="sum"), Loss)
    assert not isinstance(nn.Linear(1, 1), Loss)


def test_own_parameters_of_a_module():
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    assert parameters_of(module) == {}
    assert parameters_of(module[0]) == {"weight": module[0].weight, "bias": None}


def test_schedulers_see_the_steps_of_a_changed_class(recwarn):
    class Counting(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            Counting.steps += 1
            return super().step(closure)

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.__class__ = Counting
    show_steps_to_schedulers(optimizer)
    optimizer.step()
    scheduler.step()
    assert Counting.steps == 1
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
    # A scheduler that is made later does not wrap the step again.
    step = optimizer.step
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert optimizer.step is step


def test_trees():
    tree = {"a": (1, [2]), "b": 3}
    assert tree_leaves(tree) == [1, 2, 3]
    assert tree_map(lambda leaf: leaf + 1, tree) == {"a": (2, [3]), "b": 4}


def test_the_store_of_the_processes():
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        default_store().set("key", "value")
    finally:
        dist.destroy_process_group()
    assert store.num_keys() > 0


def test_disabled_saved_tensor_hooks_are_told_and_set():
    with disable_saved_tensors_hooks("not here"):
        assert why_no_saved_tensor_hooks() == "not here"
        set_why_no_saved_tensor_hooks(None)
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
        set_why_no_saved_tensor_hooks("nor here")
        with pytest.raises(RuntimeError, match="nor here"), saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
    assert why_no_saved_tensor_hooks() is None


def test_levels_of_forward_mode_are_counted():
    assert dual_level() == -1
    with enter_dual_level():
        assert dual_level() == 0
    assert dual_level() == -1


def test_backends_of_attention_are_told_and_set():
    before = sdpa_backends()
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        assert sdpa_backends() == backends
        set_sdpa_backends(before)
        assert sdpa_backends() == before
        set_sdpa_backends([SDPBackend.MATH])
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert sdpa_backends() == before


@pytest.mark.parametrize("mode", ["all", "any"])
def test_hooks_over_several_tensors_are_told_from_others(mode):
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    register_multi_grad_hook((a, b), print, mode=mode)
    register_multi_grad_hook((c,), print, mode=mode)
    first, second, other = (registration_of(*hooks_of(tensor)[0].values()) for tensor in (a, b, c))
    assert first is second is not None
    assert other is not None
    assert other is not first
    c.register_hook(print)
    assert registration_of([*hooks_of(c)[0].values()][1]) is None
    assert hooks_of(torch.ones(1)) == ({}, {})


@pytest.mark.parametrize("had_hooks", [False, True])
def test_hooks_of_tensors_are_put_back(had_hooks):
    """Check that later hooks are no longer called, and that earlier hooks are called and can be removed."""
    parameter, calls = nn.Parameter(torch.ones(2)), []
    handles = []
    if had_hooks:
        handles.append(parameter.register_hook(lambda gradient: calls.append("before")))
        handles.append(parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("before, after")))
    hooks = hooks_of(parameter)
    for _ in range(2):
        parameter.register_hook(lambda gradient: calls.append("later"))
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("later, after"))
        assert hooks_of(parameter) != hooks
        set_hooks(parameter, hooks)
        assert hooks_of(parameter) == hooks
        parameter.sum().backward()
    assert calls == 2 * had_hooks * ["before", "before, after"]
    for handle in handles:
        handle.remove()
    parameter.sum().backward()
    assert len(calls) == 4 * had_hooks


def test_a_dispatch_mode_sees_operations_below_autograd():
    seen = []
    x, weight = torch.zeros(4, 3), torch.zeros(2, 3, requires_grad=True)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket.__name__, func.is_view, args[0].requires_grad))
            return func(*args, **(kwargs or {}))

    assert not is_in_torch_dispatch_mode()
    with Watch():
        assert is_in_torch_dispatch_mode()
        nn.functional.linear(x, weight)
        weight.view(6)
    assert seen == [("t", True, True), ("mm", False, False), ("view", True, True)]
