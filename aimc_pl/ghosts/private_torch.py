"""What ghosts need of torch that has no public name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

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


def version(tensor: Tensor) -> int:
    """Grows when a tensor is changed in place; tensors of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors that share their memory, on meta too."""
    return tensor.untyped_storage()._cdata


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether it has hooks that it joins to the graph of its inputs and outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@contextmanager
def without_backward_hooks(module: nn.Module) -> Iterator[None]:
    """While it is open, a module can be called with inputs without a graph."""
    hooked = [inner for inner in module.modules() if has_backward_hooks(inner)]
    before = [(inner._backward_hooks, inner._backward_pre_hooks) for inner in hooked]
    for inner in hooked:
        inner._backward_hooks, inner._backward_pre_hooks = {}, {}
    try:
        yield
    finally:
        for inner, hooks in zip(hooked, before, strict=True):
            inner._backward_hooks, inner._backward_pre_hooks = hooks
