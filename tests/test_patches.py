"""These tests check that patches are undone, also after errors, and that a patch by others is not lost silently."""

import types

import pytest
from torch import nn

from aimc_pl.errors import UsageError
from aimc_pl.patches import patched


class Thing:
    shared = "class"

    def method(self):
        return "method"


def test_instances_classes_and_python_modules():
    thing, module = Thing(), types.ModuleType("some_module")
    module.function = function = object()
    thing.own = "own"
    with patched((thing, "own", 1), (thing, "shared", 2), (Thing, "method", lambda self: 3), (module, "function", 4)):
        assert (thing.own, thing.shared, thing.method(), module.function) == (1, 2, 3, 4)
        assert Thing.shared == "class"
    assert (thing.own, thing.shared, thing.method(), module.function) == ("own", "class", "method", function)
    assert "shared" not in vars(thing)


def test_none_is_a_value_to_put_back():
    thing = Thing()
    thing.own = None
    with patched((thing, "own", 1)):
        pass
    assert vars(thing) == {"own": None}


def test_patches_in_patches():
    layer = nn.Linear(1, 1)
    with patched((layer, "extra_repr", lambda: "outer")):
        with patched((layer, "extra_repr", lambda: "inner")):
            assert layer.extra_repr() == "inner"
        assert layer.extra_repr() == "outer"
    assert "in_features" in layer.extra_repr()


@pytest.mark.parametrize("value", ["theirs", None])
def test_what_was_patched_over_is_named_and_undone(value):
    thing = Thing()

    def run():
        with patched((thing, "own", 1), (thing, "other", 2), (Thing, "method", lambda self: 3)):
            if value is None:
                del thing.own
            else:
                thing.own = value
            Thing.method = lambda self: "theirs"

    with pytest.raises(UsageError, match=r"has replaced Thing\.own, Thing\.method, which"):
        run()
    assert vars(thing) == {}
    assert thing.method() == "method"


def test_errors_go_on_as_they_are():
    thing = Thing()

    def run():
        with patched((thing, "own", 1)):
            thing.own = 2
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        run()
    assert vars(thing) == {}
