"""This module runs a function up to a point inside it, and resumes it there later."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.overrides import TorchFunctionMode

from aimc_pl.private_torch import (
    SavedTensorHooks,
    TorchDispatchMode,
    count_dispatch_modes,
    count_function_modes,
    count_saved_tensor_hooks,
    pop_dispatch_modes,
    pop_function_modes,
    pop_saved_tensor_hooks,
    push_dispatch_modes,
    push_function_modes,
    push_saved_tensor_hooks,
)


class SuspendableCall:
    """A call that can wait, deep inside, for a value from its caller.

    The function runs in a greenlet: on the caller's thread, and only while the caller waits. (In separate threads, the
    functions would take OpenMP's threads from the stages.) What the function has entered when it waits (autocast,
    no_grad, a default dtype, saved-tensor hooks, torch function and dispatch modes) is set aside until the function is
    resumed.

    Args:
        function: the function to run.
        owner: the object that :meth:`current` returns inside the function; by default this call.
    """

    def __init__(self, function: Callable[[], Any], owner: Any = None) -> None:
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = contextvars.copy_context()
        self._greenlet.call = self if owner is None else owner  # pyright: ignore[reportAttributeAccessIssue]
        self._settings: list[Any] | None = None
        self._hooks: list[SavedTensorHooks] = []
        self._function_modes: list[TorchFunctionMode] = []
        self._dispatch_modes: list[TorchDispatchMode] = []

    @staticmethod
    def current() -> Any:
        """Return the owner of the call that the calling code runs in, or ``None`` if it runs in no such call."""
        return getattr(getcurrent(), "call", None)

    @property
    def is_suspended(self) -> bool:
        """Whether the function waits for a value."""
        return bool(self._greenlet)

    def start(self) -> Any:
        """Run the function up to :meth:`suspend`, or to its end.

        Return the value that the function gives to :meth:`suspend`, or its result. :attr:`is_suspended` says which of
        the two it is. Exceptions of the function are raised here.
        """
        with self._its_state():
            return self._greenlet.switch()

    def resume(self, value: Any = None) -> Any:
        """Resume the function, where :meth:`suspend` returns ``value``. Return what :meth:`start` would return."""
        with self._its_state():
            return self._greenlet.switch(value)

    def suspend(self, value: Any = None) -> Any:
        """Hand ``value`` to the caller, and return the value with which the caller resumes. The function calls this."""
        assert self._greenlet.parent is not None
        return self._greenlet.parent.switch(value)

    def abort(self) -> None:
        """End the call if it is suspended, by an exception (``GreenletExit``) where it waits."""
        if self.is_suspended:
            with self._its_state():
                self._greenlet.throw()

    @contextmanager
    def _its_state(self) -> Iterator[None]:
        callers = _read_settings()
        num_hooks, num_function_modes = count_saved_tensor_hooks(), count_function_modes()
        num_dispatch_modes = count_dispatch_modes()
        # autocast caches copies of weights. A copy is valid for one call, and until the weights change.
        torch.clear_autocast_cache()
        push_saved_tensor_hooks(self._hooks)
        push_function_modes(self._function_modes)
        push_dispatch_modes(self._dispatch_modes)
        if self._settings is not None:
            _switch(callers, self._settings)
        try:
            yield
        finally:
            self._settings = _read_settings()
            self._hooks = pop_saved_tensor_hooks(num_hooks)
            self._function_modes = pop_function_modes(num_function_modes)
            self._dispatch_modes = pop_dispatch_modes(num_dispatch_modes)
            torch.clear_autocast_cache()
            _switch(self._settings, callers)
            if self._greenlet.dead:
                # Break the reference cycle, to free the micro-batch that the call holds without the cyclic collector.
                self._greenlet.call = None  # pyright: ignore[reportAttributeAccessIssue]


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    (partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")),
    (partial(torch.get_autocast_dtype, "cpu"), partial(torch.set_autocast_dtype, "cpu")),
    (partial(torch.get_autocast_dtype, "cuda"), partial(torch.set_autocast_dtype, "cuda")),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
]
"""The settings that context managers of torch make for a thread or the process: how to read and how to set each."""


def _read_settings() -> list[Any]:
    return [read() for read, _ in _SETTINGS]


def _switch(now: list[Any], wanted: list[Any]) -> None:
    if now != wanted:
        for (_, write), value in zip(_SETTINGS, wanted, strict=True):
            write(value)
