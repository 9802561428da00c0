"""Run a function up to a point inside it, and go on from there later."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.overrides import TorchFunctionMode

from aimc_pl.private_torch import (
    SavedTensorHooks,
    count_function_modes,
    count_saved_tensor_hooks,
    pop_function_modes,
    pop_saved_tensor_hooks,
    push_function_modes,
    push_saved_tensor_hooks,
)


class SuspendableCall:
    """A call that can wait, deep inside, for a value from its caller.

    The function runs in a greenlet: on the caller's thread, and only while the caller waits. (In threads of their own
    the functions would take OpenMP's threads from the stages.) What the function has entered when it waits (autocast,
    no_grad, a default dtype, hooks for saved tensors, modes of torch functions) is set aside until it goes on.

    Args:
        function: what to run.
        owner: what :meth:`current` gives inside the function.
    """

    def __init__(self, function: Callable[[], Any], owner: Any = None) -> None:
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = contextvars.copy_context()
        self._greenlet.call = self if owner is None else owner  # pyright: ignore[reportAttributeAccessIssue]
        self._state: _TorchState | None = None

    @staticmethod
    def current() -> Any:
        """The call (or its owner) inside which we are, if any."""
        return getattr(getcurrent(), "call", None)

    @property
    def is_suspended(self) -> bool:
        """Whether the function waits for a value."""
        return bool(self._greenlet)

    def start(self) -> Any:
        """Run up to :meth:`suspend` and return the value it was given, or to the end and return the result.

        :attr:`is_suspended` tells which. Exceptions of the function are raised here.
        """
        with self._its_state():
            return self._greenlet.switch()

    def resume(self, value: Any = None) -> Any:
        """Go on with ``value`` as what :meth:`suspend` returns; returns as :meth:`start`."""
        with self._its_state():
            return self._greenlet.switch(value)

    def suspend(self, value: Any = None) -> Any:
        """Called by the function: hand ``value`` to the caller and wait for its answer."""
        assert self._greenlet.parent is not None
        return self._greenlet.parent.switch(value)

    def abort(self) -> None:
        """End a suspended call."""
        if self.is_suspended:
            with self._its_state():
                self._greenlet.throw()

    @contextmanager
    def _its_state(self) -> Iterator[None]:
        callers = _TorchState()
        entered = count_saved_tensor_hooks(), count_function_modes()
        # Copies of weights that autocast keeps belong to one call, and to the weights of their time.
        torch.clear_autocast_cache()
        if self._state is not None:
            self._state.set()
        try:
            yield
        finally:
            self._state = _TorchState().with_entered_since(*entered)
            torch.clear_autocast_cache()
            callers.set()
            if self._greenlet.dead:
                # Each holds the other; what the call holds (a micro-batch) is to be freed without the cyclic collector.
                self._greenlet.call = None  # pyright: ignore[reportAttributeAccessIssue]


class _TorchState:
    """What context managers of torch set for a thread or the process."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._dtype = torch.get_default_dtype()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        ]
        self._caches = torch.is_autocast_cache_enabled()
        self._hooks: list[SavedTensorHooks] = []
        self._modes: list[TorchFunctionMode] = []

    def with_entered_since(self, num_hooks: int, num_modes: int) -> "_TorchState":
        """Leave, and keep, the hooks and modes that have been entered in addition to the caller's."""
        self._hooks = pop_saved_tensor_hooks(num_hooks)
        self._modes = pop_function_modes(num_modes)
        return self

    def set(self) -> None:
        torch.set_grad_enabled(self._grad)
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self._caches)
        push_saved_tensor_hooks(self._hooks)
        push_function_modes(self._modes)
