"""These tests check that settings of the process that a step changes belong to the step's micro-batch."""

import sys
import threading
import types

import pytest
import torch
from staged import make_step
from torch import nn

from aimc_pl.errors import UsageError
from aimc_pl.flight import Flight
from aimc_pl.switches import switches_for


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))
        self.lock, self.kept = threading.Lock(), types.SimpleNamespace(lock=threading.Lock())


def settings():
    """Return the settings to test by name, each with another value to set."""
    others = {
        "sys.stdout": sys.stderr,
        "sys.stderr": sys.stdout,
        "warnings.filters": [],
        "torch.set_num_threads": torch.get_num_threads() + 1,
        "torch.autograd.set_detect_anomaly": (True, False),
        "torch.use_deterministic_algorithms": 1,
        "torch.nn.attention.sdpa_kernel": [torch.nn.attention.SDPBackend.MATH],
        "torch.autograd.graph.disable_saved_tensors_hooks": "not here",
        "torch.nn.functional.relu": torch.tanh,
        f"{__name__}.settings": min,
    }
    return {
        switch.name: (switch, others.get(switch.name, not switch.read()))
        for switch in switches_for(Network())
        if switch.name in others or "torch.backends" in switch.name
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", settings())
def test_a_switch_is_set_aside_while_its_step_waits(name):
    switch, other = settings()[name]
    network, before = Network(), switch.read()
    seen = []

    def function(k):
        around = switch.read()
        switch.set(other if k else before)
        try:
            h = network.b(network.a(torch.ones(1, 2)))
            seen.append(switch.read())
            return network.c(h).sum()
        finally:
            seen.append(switch.read())
            switch.set(around)

    step = make_step(network, ["b", "c"], lambda: function(1))
    assert [kept.name for kept in step.switches] == [name]
    seen.clear()
    flights = [Flight(step, lambda k=k: function(k)) for k in range(2)]
    with step.running():
        for stage in range(3):
            for flight in flights:
                assert switch.read() == before
                flight.forward(stage)
    assert switch.read() == before
    assert seen == [before, other] * 2
    # An aborted step restores its settings. A step that changes no setting costs nothing.
    flight = Flight(step, lambda: function(1))
    with step.running():
        flight.forward(0)
        flight.abort()
    assert switch.read() == before
    assert not make_step(network, ["b"], lambda: network.b(network.a(torch.ones(1, 2))).sum()).switches


def test_what_a_step_switches_for_good_stays():
    network, threads = Network(), torch.get_num_threads()

    def function():
        h = network.a(torch.ones(1, 2))
        torch.set_num_threads(threads + 1)
        return network.b(h).sum()

    step = make_step(network, ["b"], function)
    try:
        flight = Flight(step, function)
        with step.running():
            flight.forward(0)
            flight.forward(1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["lock", "kept.lock"])
def test_a_lock_that_a_waiting_step_would_hold_is_refused(name):
    network = Network()
    lock = network.lock if name == "lock" else network.kept.lock

    def function():
        h = network.b(network.a(torch.ones(1, 2)))
        with lock:
            return network.c(h).sum()

    with pytest.raises(UsageError, match=f"holds the lock '{name}' where 'c' begins stage 2"):
        make_step(network, ["b", "c"], function)
    assert not lock.locked()
    make_step(network, ["b"], function)
    make_step(network, ["b", "c"], function, overlaps=False)
