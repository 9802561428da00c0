"""Run a function up to a point inside it, and go on from there later."""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet


class SuspendableCall:
    """A call that can wait, deep inside, for a value from its caller.

    The function runs in a greenlet: on the caller's thread, and only while the caller waits. (In threads of their own
    the functions would take OpenMP's threads from the stages.) What the function has entered when it waits (autocast,
    no_grad, a default dtype) is set aside until it goes on.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = contextvars.copy_context()
        self._greenlet.call = self  # pyright: ignore[reportAttributeAccessIssue]
        self._state: _TorchState | None = None

    @staticmethod
    def current() -> "SuspendableCall | None":
        """The call inside which we are, if any."""
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

    def resume(self, value: Any) -> Any:
        """Go on with ``value`` as what :meth:`suspend` returns; returns as :meth:`start`."""
        with self._its_state():
            return self._greenlet.switch(value)

    def suspend(self, value: Any) -> Any:
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
        if self._state is not None:
            self._state.set()
        try:
            yield
        finally:
            self._state = _TorchState()
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

    def set(self) -> None:
        torch.set_grad_enabled(self._grad)
        torch.set_default_dtype(self._dtype)
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
