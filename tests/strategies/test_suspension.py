"""Calls that wait inside."""

import gc
import weakref

import pytest
import torch

from aimc_pl.strategies.suspension import SuspendableCall


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
    """Interleaved calls that wait inside contexts leave none of them on for the caller or for each other."""

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
