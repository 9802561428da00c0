"""Run a function up to a point inside it, and go on from there later."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch

_current = threading.local()


class Aborted(BaseException):
    """Ends a suspended call that is not to go on."""


class SuspendableCall:
    """A call that can wait, deep inside, for a value from its caller.

    The function runs in a helper thread, but never at the same time as its caller: control is handed over at
    :meth:`start`, :meth:`suspend` and :meth:`resume`. A thread keeps what the function has entered (autocast, no_grad)
    apart from what runs while it waits.
    """

    def __init__(self, function: Callable[[], Any], executor: ThreadPoolExecutor) -> None:
        self._function = function
        self._executor = executor
        self._to_caller: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._to_function: SimpleQueue[Any] = SimpleQueue()
        self._dtype: torch.dtype | None = None
        self.is_suspended = False

    @staticmethod
    def current() -> "SuspendableCall | None":
        """The call that the current thread runs, if any."""
        return getattr(_current, "call", None)

    def start(self) -> Any:
        """Run up to :meth:`suspend` and return the value it was given, or to the end and return the result.

        :attr:`is_suspended` tells which. Exceptions of the function are raised here.
        """
        return self._hand_over(lambda: self._executor.submit(self._run))

    def resume(self, value: Any) -> Any:
        """Go on with ``value`` as what :meth:`suspend` returns; returns as :meth:`start`."""
        self.is_suspended = False
        return self._hand_over(lambda: self._to_function.put(value))

    def abort(self) -> None:
        """End a suspended call."""
        if self.is_suspended:
            with suppress(Aborted):
                self.resume(Aborted())

    def suspend(self, value: Any) -> Any:
        """Called by the function: hand ``value`` to the caller and wait for its answer."""
        self.is_suspended = True
        self._to_caller.put((True, value))
        answer = self._to_function.get()
        if isinstance(answer, Aborted):
            raise answer
        return answer

    def _run(self) -> None:
        _current.call = self
        try:
            message = True, self._function()
        except BaseException as error:  # handed to the caller, whose thread raises it
            message = False, error
        finally:
            _current.call = None
        self._to_caller.put(message)

    def _hand_over(self, start: Callable[[], Any]) -> Any:
        # The default dtype is the process's, not the thread's; a precision plugin sets it inside the call.
        callers_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype or callers_dtype)
        start()
        succeeded, value = self._to_caller.get()
        self._dtype = torch.get_default_dtype()
        torch.set_default_dtype(callers_dtype)
        if not succeeded:
            raise value
        return value
