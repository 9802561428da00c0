"""These tests check calls that can be suspended inside."""

import gc
import weakref
from contextlib import nullcontext
from contextvars import ContextVar

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from aimc_pl.private_torch import TorchDispatchMode, is_in_torch_dispatch_mode
from aimc_pl.suspension import SuspendableCall


def test_goes_to_and_fro():
    seen = []

    def function():
        for k in range(3):
            seen.append(SuspendableCall.current().suspend(10 * k))
        return "end"

    call = SuspendableCall(function)
    assert call.start() == 0
    assert [call.resume("a"), call.resume("b")] == [10, 20]
    assert call.is_suspended
    assert call.resume("c") == "end"
    assert not call.is_suspended
    assert seen == ["a", "b", "c"]
    assert SuspendableCall.current() is None


def test_several_calls_take_turns():
    calls = [SuspendableCall(lambda k=k: k + SuspendableCall.current().suspend(k)) for k in range(4)]
    assert [call.start() for call in calls] == [0, 1, 2, 3]
    assert [call.resume(10) for call in reversed(calls)] == [13, 12, 11, 10]


def test_errors_are_raised_at_the_caller():
    def function():
        SuspendableCall.current().suspend(None)
        raise KeyError("inside")

    call = SuspendableCall(function)
    call.start()
    with pytest.raises(KeyError, match="inside"):
        call.resume(None)
    assert not call.is_suspended


def test_abort_runs_the_functions_cleanup():
    cleaned = []

    def function():
        try:
            SuspendableCall.current().suspend(None)
        finally:
            cleaned.append(True)

    call = SuspendableCall(function)
    call.start()
    call.abort()
    assert cleaned == [True]
    call.abort()


def test_what_a_call_has_entered_is_set_aside():
    """Check that interleaved calls that wait inside contexts leave none of them on for the caller or other calls."""

    def function():
        assert torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.set_default_dtype(torch.float64)
            SuspendableCall.current().suspend(None)
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_default_dtype() == torch.float64
            torch.set_default_dtype(torch.float32)

    def state():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()

    before = state()
    calls = [SuspendableCall(function) for _ in range(3)]
    for call in calls:
        call.start()
        assert state() == before
    for index in (1, 0, 2):
        calls[index].resume(None)
        assert state() == before


def test_saved_tensor_hooks_belong_to_their_call():
    """Check that the innermost hooks pack: a call's own hooks inside the call, and the caller's outside."""
    packed = []

    def named(name):
        return saved_tensors_hooks(lambda tensor: packed.append(name) or tensor, lambda tensor: tensor)

    def save():
        packed.clear()
        torch.ones(1, requires_grad=True).exp()
        return packed[:]

    def function(name):
        with named(name):
            assert save() == [name]
            SuspendableCall.current().suspend()
            assert save() == [name]
            with named(name + " within"):
                SuspendableCall.current().suspend()
                assert save() == [name + " within"]
            assert save() == [name]
        assert save() == outside

    for context, outside in ((nullcontext(), []), (named("outer"), ["outer"])):
        with context:
            calls = [SuspendableCall(lambda name=name: function(name)) for name in ("a", "b", "c")]
            for call in calls:
                call.start()
                assert save() == outside
            for order in ((1, 0, 2), (2, 1, 0)):
                for index in order:
                    calls[index].resume()
                    assert save() == outside
            assert not any(call.is_suspended for call in calls)


@pytest.mark.parametrize("mode", [TorchFunctionMode, TorchDispatchMode])
def test_modes_belong_to_their_call(mode):
    seen = []

    class Named(mode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(self.name)
            return func(*args, **(kwargs or {}))

        __torch_dispatch__ = __torch_function__

    def tell():
        seen.clear()
        torch.ones(1)
        return seen[:]

    def function(name):
        with Named(name):
            SuspendableCall.current().suspend()
            assert tell() == [name, "outer"]
            with torch.device("meta"), Named(name + " within"):
                SuspendableCall.current().suspend()
                assert torch.ones(1).is_meta
                assert tell() == [name + " within", name, "outer"]

    with Named("outer"):
        calls = [SuspendableCall(lambda name=name: function(name)) for name in "abc"]
        for call in calls:
            call.start()
            assert tell() == ["outer"]
        for order in ((1, 0, 2), (2, 1, 0)):
            for index in order:
                calls[index].resume()
                assert tell() == ["outer"]
                assert not torch.ones(1).is_meta
    assert tell() == []
    assert not is_in_torch_dispatch_mode()


def test_autocast_keeps_no_copies_for_another_call():
    """Check that a call does not reuse autocast's copy of a weight from another call or from before an update."""
    weight = torch.eye(2, requires_grad=True)

    def function():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                value = torch.ones(1, 2) @ weight
                found.append((value.detach(), value.grad_fn.next_functions[1][0]))
                SuspendableCall.current().suspend()

    found = []
    calls = [SuspendableCall(function) for _ in range(2)]
    for factor in (2.0, 3.0):
        for call in calls:
            call.resume() if call.is_suspended else call.start()
        with torch.no_grad():
            weight.mul_(factor)
    assert [value[0, 0].item() for value, _ in found] == [1, 1, 2, 2]
    assert len({cast for _, cast in found}) == 4
    for call in calls:
        call.resume()


def test_autocast_of_the_caller_keeps_no_copies_for_a_call():
    weight = torch.eye(2, requires_grad=True)

    def cast():
        return (torch.ones(1, 2) @ weight).grad_fn.next_functions[1][0]

    with torch.autocast("cpu", torch.bfloat16):
        first = cast()
        assert cast() is first
        call = SuspendableCall(cast)
        second = call.start()
        assert second is not first
        assert cast() not in (first, second)


def test_context_variables_belong_to_their_call():
    variable = ContextVar("variable", default="none")

    def function(name):
        variable.set(name)
        SuspendableCall.current().suspend()
        return variable.get()

    calls = [SuspendableCall(lambda name=name: function(name)) for name in "ab"]
    for call in calls:
        call.start()
        assert variable.get() == "none"
    assert [call.resume() for call in calls] == ["a", "b"]


@pytest.mark.parametrize("end", ["finish", "abort", "fail"])
def test_a_call_that_has_ended_is_freed_at_once(end):
    class Batch:
        pass

    def function(batch):
        SuspendableCall.current().suspend(batch)
        if end == "fail":
            raise ValueError

    gc.disable()
    try:
        batch = Batch()
        call = SuspendableCall(lambda batch=batch: function(batch))
        alive = weakref.ref(batch)
        del batch
        call.start()
        if end == "abort":
            call.abort()
        elif end == "fail":
            with pytest.raises(ValueError):  # noqa: PT011
                call.resume(None)
        else:
            call.resume(None)
        del call
        assert alive() is None
    finally:
        gc.enable()
