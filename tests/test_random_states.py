"""These tests check that random states are restored, and that code that sets them is noticed."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from aimc_pl.random_states import RandomStates, seeding_noticed


class Network(nn.Module):
    """A module that holds generators of all kinds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.generator = torch.Generator().manual_seed(1)
        self.rng, self.old_rng, self.pythons = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)
        self.generators = [self.inner.generator, self.rng, self.old_rng, self.pythons]


DRAWS = {
    "torch": lambda net: torch.rand(1).item(),
    "numpy": lambda net: np.random.rand(),
    "Python": lambda net: random.random(),
    "a torch generator": lambda net: torch.rand(1, generator=net.inner.generator).item(),
    "a numpy generator": lambda net: net.rng.random(),
    "an old numpy generator": lambda net: net.old_rng.rand(),
    "a Python generator": lambda net: net.pythons.random(),
    # These generators keep surplus numbers for the next draw.
    "normal numbers of torch": lambda net: torch.randn(1).item(),
    "normal numbers of numpy": lambda net: np.random.randn(),
    "normal numbers of Python": lambda net: random.gauss(0, 1),
    "normal numbers of a numpy generator": lambda net: net.old_rng.randn(),
}


@pytest.fixture(autouse=True)
def _states_of_their_own():
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.parametrize("source", DRAWS)
def test_what_is_drawn_is_noticed_and_drawn_again(source):
    net, draw = Network(), DRAWS[source]
    draw(net)
    random_states = RandomStates(net.generators)
    states = random_states.read()
    assert not random_states.have_moved(states)
    drawn = []
    for _ in range(3):
        drawn.append([draw(net) for _ in range(3)])
        assert random_states.have_moved(states)
        random_states.write(states)
        assert not random_states.have_moved(states)
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1] == drawn[2]


def test_sources_do_not_depend_on_each_other():
    """Check states that are written in another order than they were read, as micro-batches take turns."""
    net = Network()
    random_states = RandomStates(net.generators)
    first = random_states.read()
    expected = [[draw(net) for draw in DRAWS.values()] for _ in range(2)]
    random_states.write(first)
    assert [draw(net) for draw in DRAWS.values()] == expected[0]
    second = random_states.read()
    random_states.write(first)
    random_states.write(second)
    assert [draw(net) for draw in DRAWS.values()] == expected[1]
    assert random_states.have_moved(second)


def test_the_generators_stay_the_same_objects():
    net = Network()
    before = [net.inner.generator, net.rng, net.old_rng, net.pythons]
    random_states = RandomStates(net.generators)
    random_states.write(random_states.read())
    after = [net.inner.generator, net.rng, net.old_rng, net.pythons]
    assert all(a is b for a, b in zip(before, after, strict=True))


def fork():
    with torch.random.fork_rng([]):
        torch.rand(1)


SETTERS = {
    "torch": lambda: torch.manual_seed(3),
    "torch.random": lambda: torch.random.manual_seed(3),
    "a state of torch": lambda: torch.set_rng_state(torch.get_rng_state()),
    "a state of torch.random": lambda: torch.random.set_rng_state(torch.get_rng_state()),
    "a fork": fork,
    "CUDA": lambda: torch.cuda.manual_seed(3),
    "all of CUDA": lambda: torch.cuda.manual_seed_all(3),
    "numpy": lambda: np.random.seed(3),
    "a state of numpy": lambda: np.random.set_state(np.random.get_state()),
    "Python": lambda: random.seed(3),
    "a state of Python": lambda: random.setstate(random.getstate()),
    "Lightning": lambda: pl.seed_everything(3, verbose=False),
}


@pytest.mark.parametrize("setter", SETTERS)
def test_seeding_is_noticed_and_does_what_it_does(setter):
    """Check that seeding leaves the same states whether it is observed or not."""
    random_states = RandomStates()
    states = random_states.read()
    SETTERS[setter]()
    expected = random_states.read()
    random_states.write(states)
    noticed = []
    with seeding_noticed(lambda: noticed.append(1)):
        assert not noticed
        SETTERS[setter]()
        assert noticed
    assert not random_states.have_moved(expected)


def test_drawing_is_not_seeding():
    net = Network()
    noticed = []
    with seeding_noticed(lambda: noticed.append(1)):
        for draw in DRAWS.values():
            draw(net)
        nn.functional.dropout(torch.ones(3))
        net.inner.generator.manual_seed(3)
        torch.get_rng_state()
    assert not noticed


def test_nothing_is_left_patched():
    functions = [torch.manual_seed, torch.set_rng_state, torch.random.manual_seed, torch.random.set_rng_state]
    functions += [random.seed, random.setstate, np.random.seed, np.random.set_state]
    with pytest.raises(KeyError), seeding_noticed(lambda: None):
        raise KeyError
    now = [torch.manual_seed, torch.set_rng_state, torch.random.manual_seed, torch.random.set_rng_state]
    now += [random.seed, random.setstate, np.random.seed, np.random.set_state]
    assert now == functions
