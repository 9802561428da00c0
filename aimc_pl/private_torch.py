"""The names of torch that this package uses and that are not public. Each has a test that fails if torch changes it."""

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
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import is_in_torch_dispatch_mode as is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

from aimc_pl.patches import patched

SavedTensorHooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue], not in the stubs

LEAF = 2**64 - 1
"""The sequence number of the nodes that accumulate the gradients of leaf tensors."""


def next_sequence_number() -> int:
    """Return the number of the next node in this thread's autograd graphs. Nodes are numbered in order of creation."""
    return _autograd._get_sequence_nr()


def sequence_number(node: Node) -> int:
    """Return the sequence number of a node: its place in the order of creation, or :data:`LEAF` for a leaf tensor's.

    Of the nodes that are ready, a backward runs the one with the highest number first.
    """
    return node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue], not in the stubs


def zeros_at(edge: GradientEdge) -> Tensor:
    """Return a gradient of zeros with the shape, type and device of an edge."""
    there = edge.node._input_metadata[edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue], not in the stubs
    return torch.zeros((), dtype=there.dtype, device=there.device).expand(tuple(there.shape))


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Set the version counters by which autograd notices that a saved tensor has been changed in place."""
    _autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def pop_saved_tensor_hooks(keep: int = 0) -> list[SavedTensorHooks]:
    """Leave the contexts of saved-tensor hooks, except the outermost ``keep``; return their hooks, innermost first."""
    taken = []
    while (hooks := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(hooks)
        _autograd._pop_saved_tensors_default_hooks()
    split = len(taken) - keep
    push_saved_tensor_hooks(taken[split:])
    return taken[:split]


def push_saved_tensor_hooks(hooks: Iterable[SavedTensorHooks]) -> None:
    """Enter again the contexts of hooks that :func:`pop_saved_tensor_hooks` has returned."""
    for pack, unpack in reversed([*hooks]):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)


def count_saved_tensor_hooks() -> int:
    """Return the number of contexts of saved-tensor hooks that are entered."""
    hooks = pop_saved_tensor_hooks()
    push_saved_tensor_hooks(hooks)
    return len(hooks)


def why_no_saved_tensor_hooks() -> str | None:
    """Return the message of the innermost :func:`torch.autograd.graph.disable_saved_tensors_hooks`, if any."""
    return _autograd._saved_tensors_hooks_get_disabled_error_message()


def set_why_no_saved_tensor_hooks(message: str | None) -> None:
    """Set the message that :func:`why_no_saved_tensor_hooks` returns; ``None`` allows the hooks."""
    if message is None:
        _autograd._saved_tensors_hooks_enable()
    else:
        _autograd._saved_tensors_hooks_disable(message)


def dual_level() -> int:
    """Return the current level of forward-mode differentiation; −1 outside of all levels."""
    return forward_ad._current_level


def sdpa_backends() -> list[Any]:
    """Return the backends that :func:`torch.nn.attention.sdpa_kernel` allows, by priority."""
    return attention._cur_sdpa_kernel_backends(with_priority=True)


def set_sdpa_backends(backends: list[Any]) -> None:
    """Set the backends that scaled dot product attention may use, by priority."""
    attention._sdpa_kernel(backends, set_priority=True)


def is_checkpointing() -> bool:
    """Return whether code runs in a forward that :func:`torch.utils.checkpoint.checkpoint` repeats in the backward."""
    hooks = pop_saved_tensor_hooks()
    push_saved_tensor_hooks(hooks)
    return any(pack.__qualname__.startswith("_checkpoint_hook") for pack, _ in hooks if hasattr(pack, "__qualname__"))


def is_in_functorch() -> bool:
    """Return whether code runs inside a transform of ``torch.func``, such as ``vmap`` or ``grad``."""
    return torch._C._are_functorch_transforms_active()


def count_function_modes() -> int:
    """Return the number of torch function modes that are entered."""
    return len(_get_current_function_mode_stack())


def pop_function_modes(keep: int) -> list[TorchFunctionMode]:
    """Leave the torch function modes, except the outermost ``keep``, and return them, innermost first."""
    return [_pop_mode() for _ in range(count_function_modes() - keep)]


def push_function_modes(modes: Iterable[TorchFunctionMode]) -> None:
    """Enter again the modes that :func:`pop_function_modes` has returned."""
    for mode in reversed([*modes]):
        _push_mode(mode)


def count_dispatch_modes() -> int:
    """Return the number of torch dispatch modes that are entered."""
    return len(_get_current_dispatch_mode_stack())


def pop_dispatch_modes(keep: int) -> list[TorchDispatchMode]:
    """Leave the torch dispatch modes, except the outermost ``keep``, and return them, innermost first.

    What a subclass does in its own ``__exit__`` is left out.
    """
    modes = [*reversed(_get_current_dispatch_mode_stack()[keep:])]
    for mode in modes:
        TorchDispatchMode.__exit__(mode, None, None, None)
    return modes


def push_dispatch_modes(modes: Sequence[TorchDispatchMode]) -> None:
    """Enter again the modes that :func:`pop_dispatch_modes` has returned."""
    for mode in reversed(modes):
        TorchDispatchMode.__enter__(mode)


without_functions = torch._C.DisableTorchFunction
"""Context manager in which neither function modes nor subclasses of tensors intercept torch functions."""

without_subclass_functions = torch._C.DisableTorchFunctionSubclass
"""Context manager in which subclasses of tensors do not intercept torch functions."""

current_function_mode: Callable[[], Any] = _get_current_function_mode

CALL = "_compiled_call_impl"
"""The attribute of a module that holds the function to call instead of the module; ``compile`` sets it.

Replacing ``nn.Module.__call__`` instead would take longer than a small layer, as the class has so many subclasses."""


def call_of(module: nn.Module) -> Callable[..., Any]:
    """Return the function that a call of the module runs, hooks included."""
    return module.__dict__.get(CALL) or module._call_impl


def default_store() -> Store:
    """Return the store through which the processes of torch.distributed have met."""
    return dist.distributed_c10d._get_default_store()


def registration_of(hook: Any) -> Any:
    """Return an object that identifies the call of :func:`torch.autograd.graph.register_multi_grad_hook`.

    All hooks that one such call registers give the same object; other hooks give ``None``.
    """
    code = getattr(hook, "__code__", None)
    if code is None or not code.co_qualname.startswith("register_multi_grad_hook."):
        return None
    return inspect.getclosurevars(hook).nonlocals["lock"]


def version(tensor: Tensor) -> int:
    """Return a count that grows when a tensor is changed in place.

    It is always 0 for tensors of inference mode, which have no such count, and for lazy ones, which have no value yet.
    """
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


_version = attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return the :func:`version` of each tensor, faster than by separate calls."""
    try:
        with torch._C.DisableTorchFunctionSubclass():  # aihwkit's parameters take long to answer
            return [*map(_version, tensors)]
    except RuntimeError:  # There is a tensor of inference mode.
        return [*map(version, tensors)]


def storage_of(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share their memory, also on the meta device."""
    return tensor.untyped_storage()._cdata


def base_of(tensor: Tensor) -> Tensor:
    """Return the tensor of which ``tensor`` is a view, or ``tensor`` itself if it is no view."""
    return tensor if tensor._base is None else tensor._base


Loss = _Loss
"""The base class of torch's loss modules."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, including those that are ``None``."""
    return module._parameters


def count_as_stepped(optimizer: Optimizer) -> None:
    """Mark an optimizer as stepped. Learning-rate schedulers warn if they step before their optimizer does."""
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue], schedulers add it


def show_steps_to_schedulers(optimizer: Optimizer) -> None:
    """Wrap an optimizer's ``step`` as learning-rate schedulers do, to see whether it is called before their own."""

    def step(*args: Any, **kwargs: Any) -> Any:
        count_as_stepped(optimizer)
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess], schedulers look for it
    optimizer.step = step


def attributes_of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the attributes of an optimizer without its hooks, its parameters and its state.

    A wrapper of ``step``, which learning-rate schedulers set as an attribute, is left out, too.
    """
    others = ("step", "param_groups", "state")
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in others and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
    }


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether a module has backward hooks, which it attaches to the graph of its inputs and outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_global_backward_hooks() -> bool:
    """Return whether backward hooks are registered for all modules."""
    return bool(torch.nn.modules.module._global_backward_hooks or torch.nn.modules.module._global_backward_pre_hooks)


def without_backward_hooks(module: nn.Module) -> AbstractContextManager[None]:
    """Context manager that removes the backward hooks in a module. Its inputs then need no graph."""
    hooked = [inner for inner in module.modules() if has_backward_hooks(inner)]
    return patched(*((inner, name, {}) for inner in hooked for name in ("_backward_hooks", "_backward_pre_hooks")))


def hooks_of(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the hooks of a leaf tensor: those on its gradient, and those that run after its accumulation."""
    there: Any = tensor
    return dict(there._backward_hooks or {}), dict(there._post_accumulate_grad_hooks or {})


def set_hooks(tensor: Tensor, hooks: Sequence[dict[int, Any]]) -> None:
    """Set the hooks of a tensor to those that :func:`hooks_of` has returned for it."""
    there: Any = tensor
    for now, before in zip((there._backward_hooks, there._post_accumulate_grad_hooks), hooks, strict=True):
        if now is not None:
            # autograd and the handles of hooks refer to this dictionary, so it must not be replaced.
            now.clear()
            now.update(before)
