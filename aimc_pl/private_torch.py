"""What we need of torch that has no public name, each with a test that notices when it goes."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage], documented
from torch.nn import attention
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

from aimc_pl.patches import patched

SavedTensorHooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue], not in the stubs

LEAF = 2**64 - 1
"""The sequence number of nodes that accumulate gradients in leaf tensors."""


def next_sequence_number() -> int:
    """The number that the next node of this thread's autograd graphs will have. Nodes are numbered as they are made."""
    return _autograd._get_sequence_nr()


def sequence_number(node: Node) -> int:
    """When a node was made; :data:`LEAF` for nodes of leaf tensors. The backward runs ready nodes from the newest."""
    return node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue], not in the stubs


def zeros_at(edge: GradientEdge) -> Tensor:
    """A gradient of zeros that fits an edge."""
    there = edge.node._input_metadata[edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue], not in the stubs
    return torch.zeros((), dtype=there.dtype, device=there.device).expand(tuple(there.shape))


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Set what autograd compares to notice that a saved tensor has been changed in place."""
    _autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def pop_saved_tensor_hooks(keep: int = 0) -> list[SavedTensorHooks]:
    """Leave the innermost saved-tensor hooks, all but ``keep`` of them; the innermost comes first."""
    taken = []
    while (hooks := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(hooks)
        _autograd._pop_saved_tensors_default_hooks()
    split = len(taken) - keep
    push_saved_tensor_hooks(taken[split:])
    return taken[:split]


def push_saved_tensor_hooks(hooks: Iterable[SavedTensorHooks]) -> None:
    """Enter what :func:`pop_saved_tensor_hooks` has left."""
    for pack, unpack in reversed([*hooks]):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)


def count_saved_tensor_hooks() -> int:
    """How many saved-tensor hooks are entered."""
    hooks = pop_saved_tensor_hooks()
    push_saved_tensor_hooks(hooks)
    return len(hooks)


def why_no_saved_tensor_hooks() -> str | None:
    """The message of the innermost :func:`torch.autograd.graph.disable_saved_tensors_hooks`, if any."""
    return _autograd._saved_tensors_hooks_get_disabled_error_message()


def set_why_no_saved_tensor_hooks(message: str | None) -> None:
    """Set what :func:`why_no_saved_tensor_hooks` gives."""
    if message is None:
        _autograd._saved_tensors_hooks_enable()
    else:
        _autograd._saved_tensors_hooks_disable(message)


def dual_level() -> int:
    """How many levels of forward-mode differentiation are entered, less one."""
    return forward_ad._current_level


def sdpa_backends() -> list[Any]:
    """What :func:`torch.nn.attention.sdpa_kernel` allows, by priority."""
    return attention._cur_sdpa_kernel_backends(with_priority=True)


def set_sdpa_backends(backends: list[Any]) -> None:
    """Allow these, by priority."""
    attention._sdpa_kernel(backends, set_priority=True)


def is_checkpointing() -> bool:
    """Whether we are in a forward that :func:`torch.utils.checkpoint.checkpoint` will repeat in the backward."""
    hooks = pop_saved_tensor_hooks()
    push_saved_tensor_hooks(hooks)
    return any(pack.__qualname__.startswith("_checkpoint_hook") for pack, _ in hooks if hasattr(pack, "__qualname__"))


def is_in_functorch() -> bool:
    """Whether we are in a function that a transform of ``torch.func`` (vmap, grad) runs."""
    return torch._C._are_functorch_transforms_active()


def count_function_modes() -> int:
    """How many torch function modes are entered."""
    return len(_get_current_function_mode_stack())


def pop_function_modes(keep: int) -> list[TorchFunctionMode]:
    """Leave the innermost torch function modes, all but ``keep`` of them; the innermost comes first."""
    return [_pop_mode() for _ in range(count_function_modes() - keep)]


def push_function_modes(modes: Iterable[TorchFunctionMode]) -> None:
    """Enter what :func:`pop_function_modes` has left."""
    for mode in reversed([*modes]):
        _push_mode(mode)


without_functions = torch._C.DisableTorchFunction
"""A context in which neither function modes nor subclasses intercept torch functions."""

without_subclass_functions = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses do not."""

current_function_mode: Callable[[], Any] = _get_current_function_mode

CALL = "_compiled_call_impl"
"""A module calls what this attribute holds in place of itself; ``compile`` sets it. To replace ``nn.Module.__call__``
takes longer than a small layer, as the class has so many subclasses."""


def call_of(module: nn.Module) -> Callable[..., Any]:
    """What the call of a module does, hooks included."""
    return module.__dict__.get(CALL) or module._call_impl


def default_store() -> Store:
    """What the processes of torch.distributed have met by."""
    return dist.distributed_c10d._get_default_store()


def registration_of(hook: Any) -> Any:
    """What the hooks of one :func:`torch.autograd.graph.register_multi_grad_hook` share; ``None`` for other hooks."""
    code = getattr(hook, "__code__", None)
    if code is None or not code.co_qualname.startswith("register_multi_grad_hook."):
        return None
    return inspect.getclosurevars(hook).nonlocals["lock"]


def version(tensor: Tensor) -> int:
    """Grows when a tensor is changed in place; those of inference mode do not tell, and lazy ones have no value yet."""
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


_version = attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """The :func:`version` of each, sooner."""
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # one of inference mode
        return [*map(version, tensors)]


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors that share their memory, on meta too."""
    return tensor.untyped_storage()._cdata


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that a view looks at; another tensor itself."""
    return tensor if tensor._base is None else tensor._base


Loss = _Loss
"""What torch's modules for losses derive from."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, also those that are ``None``."""
    return module._parameters


def count_as_stepped(optimizer: Optimizer) -> None:
    """Tell learning-rate schedulers, which warn of it, that the optimizer steps before they do."""
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue], schedulers add it


def show_steps_to_schedulers(optimizer: Optimizer) -> None:
    """Wrap an optimizer's ``step`` as learning-rate schedulers do, which look whether it is called before theirs."""

    def step(*args: Any, **kwargs: Any) -> Any:
        count_as_stepped(optimizer)
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess], schedulers look for it
    optimizer.step = step


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether it has hooks that it joins to the graph of its inputs and outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_global_backward_hooks() -> bool:
    """Whether such hooks are on all modules."""
    return bool(torch.nn.modules.module._global_backward_hooks or torch.nn.modules.module._global_backward_pre_hooks)


def without_backward_hooks(module: nn.Module) -> AbstractContextManager[None]:
    """While it is open, a module can be called with inputs without a graph."""
    hooked = [inner for inner in module.modules() if has_backward_hooks(inner)]
    return patched(*((inner, name, {}) for inner in hooked for name in ("_backward_hooks", "_backward_pre_hooks")))


def hooks_of(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks that are registered with a leaf tensor: those on its gradient, and those after its accumulation."""
    there: Any = tensor
    return dict(there._backward_hooks or {}), dict(there._post_accumulate_grad_hooks or {})


def set_hooks(tensor: Tensor, hooks: Sequence[dict[int, Any]]) -> None:
    """Let a tensor have the hooks that :func:`hooks_of` has returned, of those that have ever been registered."""
    there: Any = tensor
    for now, before in zip((there._backward_hooks, there._post_accumulate_grad_hooks), hooks, strict=True):
        if now is not None:
            # Autograd and the handles of hooks refer to it.
            now.clear()
            now.update(before)
