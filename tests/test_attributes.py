"""These tests check that attributes of modules, and what containers there hold, are read, compared and written back."""

from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from aimc_pl.attributes import Attributes, is_alike
from aimc_pl.devices import convert_to_analog, soft_bounds


class Backwards(list):
    """A list that always shows what it held first."""

    def __init__(self, *items):
        super().__init__(items)
        self.shown = items

    def __iter__(self):
        return iter(self.shown)

    def __len__(self):
        return len(self.shown)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.outputs = {"a": [1, 2], "b": {"c": {3}}}
        self.number, self.name, self.nothing, self.pair = 1, "x", None, (1, [2], torch.ones(1))
        self.items = [torch.ones(2), [1, 2]]
        self.recent = deque([1, 2, 3], maxlen=3)
        self.seen = {1, 2}
        self.counts = defaultdict(int, {"a": 1})
        self.votes = Counter(a=2, b=1)
        self.full, self.empty = [self.nothing], []
        self.odd = nn.Module()
        self.odd.large, self.odd.index = [*range(257)], {k: k for k in range(257)}
        self.odd.backwards = Backwards(1, 2)
        self.grid = np.zeros(2)
        self.ordered = OrderedDict(b=1, a=2)
        self.tensor = torch.zeros(2)
        self.kept = nn.Buffer(torch.zeros(2))


def state(module):
    """Return everything that the tests below compare, as text."""
    return repr(
        [
            (
                name,
                sorted((key, value) for key, value in vars(module).items() if key != "_modules"),
                [(key, id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)],
            )
            for name, module in module.named_modules()
        ]
    )


CHANGES = {
    "a number": (lambda m: setattr(m, "number", 2), {"number"}),
    "an equal number of another type": (lambda m: setattr(m, "number", True), {"number"}),
    "None": (lambda m: setattr(m, "nothing", 0), {"nothing"}),
    "a string": (lambda m: setattr(m, "name", "y"), {"name"}),
    "a tuple": (lambda m: setattr(m, "pair", (1, 3)), {"pair"}),
    "list in a tuple": (lambda m: m.pair[1].append(3), {"pair"}),
    "a tensor": (lambda m: setattr(m, "tensor", torch.zeros(2)), {"tensor"}),
    "a buffer": (lambda m: setattr(m, "kept", torch.ones(2)), {"buffers"}),
    "a new attribute": (lambda m: setattr(m, "hidden", torch.ones(2)), {"hidden"}),
    "a new buffer": (lambda m: m.register_buffer("other", torch.ones(2)), {"buffers"}),
    "a deleted attribute": (lambda m: delattr(m, "number"), {"number"}),
    "a deleted buffer": (lambda m: delattr(m, "kept"), {"buffers"}),
    "a training flag": (lambda m: m.inner.eval(), {"inner.training"}),
    "list appended": (lambda m: m.items.append(3), {"items"}),
    "list cleared": (lambda m: m.items.clear(), {"items"}),
    "list item replaced": (lambda m: m.items.__setitem__(0, torch.ones(2)), {"items"}),
    "inner list appended": (lambda m: m.items[1].append(3), {"items"}),
    "dict filled": (lambda m: m.inner.outputs.update(d=1), {"inner.outputs"}),
    "dict key deleted": (lambda m: m.inner.outputs.pop("a"), {"inner.outputs"}),
    "list in a dict": (lambda m: m.inner.outputs["a"].append(3), {"inner.outputs"}),
    "set in dicts": (lambda m: m.inner.outputs["b"]["c"].add(4), {"inner.outputs"}),
    "deque pushed": (lambda m: m.recent.append(4), {"recent"}),
    "set filled": (lambda m: m.seen.add(3), {"seen"}),
    "default dict": (lambda m: m.counts["b"], {"counts"}),
    "order of a dict": (lambda m: m.ordered.move_to_end("b"), {"ordered"}),
    "another list": (lambda m: setattr(m, "items", []), {"items"}),
    "a container in the place of a number": (lambda m: setattr(m, "number", [1]), {"number"}),
    "a number in the place of a container": (lambda m: setattr(m, "items", 1), {"items"}),
    "nothing": (lambda m: None, set()),
    "the same again": (lambda m: setattr(m, "items", m.items), set()),
    "a tensor in place": (lambda m: m.tensor.add_(1), set()),
    "a parameter in place": (lambda m: m.inner.weight.data.add_(1), set()),
    "an array in place": (lambda m: m.grid.__iadd__(1), set()),
    "another array": (lambda m: setattr(m, "grid", np.zeros(2)), {"grid"}),
    "a parameter": (lambda m: setattr(m.inner, "weight", nn.Parameter(torch.ones(2, 2))), {"inner.parameters"}),
    "a new parameter": (
        lambda m: setattr(m.inner, "gain", nn.Parameter(torch.ones(2))),
        {"inner.parameters", "inner.requires_grad of parameters"},
    ),
    "a deleted parameter": (
        lambda m: delattr(m.inner, "bias"),
        {"inner.parameters", "inner.requires_grad of parameters"},
    ),
    "a frozen parameter": (
        lambda m: m.inner.bias.requires_grad_(False),
        {"inner.requires_grad of parameters"},
    ),
    "a frozen module": (lambda m: m.requires_grad_(False), {"inner.requires_grad of parameters"}),
    "a counter": (lambda m: m.votes.update("ac"), {"votes"}),
    "a key of the same value": (lambda m: m.inner.outputs.update(e=m.inner.outputs.pop("b")), {"inner.outputs"}),
    "a name of the same value": (lambda m: setattr(m, "nobody", vars(m).pop("nothing")), {"nothing", "nobody"}),
    "what a class of its own iterates differently": (lambda m: list.append(m.odd.backwards, 5), {"odd.backwards"}),
    "what the next list gets": (lambda m: m.empty.append(m.full.pop()), {"full", "empty"}),
    "all at once": (lambda m: m.__setattr__("__dict__", vars(m) | {"number": 2}), {"number"}),
    "another large list": (lambda m: setattr(m.odd, "large", [*m.odd.large]), {"odd.large"}),
    "a hook": (lambda m: m.register_forward_hook(print), set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found_and_undone(change):
    holder = Holder()
    containers = {name: value for name, value in vars(holder).items() if isinstance(value, list | dict | set | deque)}
    attributes = Attributes(holder)
    before = attributes.read()
    known = state(holder)
    act, names = CHANGES[change]
    act(holder)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == names
    after = state(holder)
    attributes.write(attributes.select(before, changed))
    if names:
        assert state(holder) == known
        assert attributes.changes(before) == {}
        # The containers must be the same objects, because others may hold them too.
        assert all(vars(holder)[name] is value for name, value in containers.items())
    attributes.write(changed)
    assert state(holder) == after


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found_again_and_again(change):
    """Check changes after earlier ones, since modules that have changed before are compared in another way."""
    act, names = CHANGES[change]
    holder = Holder()
    attributes = Attributes(holder)
    holder.number, holder.inner.outputs["c"] = 7, 7
    attributes.read()
    before = attributes.read()
    assert attributes.changes(before) == {}
    act(holder)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == names
    attributes.write(attributes.select(before, changed))
    assert attributes.changes(before) == {}
    attributes.write(changed)
    assert {attributes.name(place) for place in attributes.changes(before)} == names


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found_after_a_long_rest(change):
    """Check changes of modules that have changed before, and then not for so long that they are watched again."""
    act, names = CHANGES[change]
    holder = Holder()
    attributes = Attributes(holder)
    holder.number, holder.inner.outputs["c"], holder.odd.other = 7, 7, 7
    before = attributes.read()
    for _ in range(1005):
        before = attributes.read()
    act(holder)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == names
    attributes.write(attributes.select(before, changed))
    assert attributes.changes(before) == {}


def test_what_belongs_to_a_crossbar_does_not_count():
    """Check that of a tile only its flags and what follows from the size of the images count, and nothing inside it."""
    network = nn.Sequential(nn.Conv1d(1, 2, 3))
    convert_to_analog(network, soft_bounds())
    layer = network[0]
    layer.analog_module.convolution = None  # The tile then looks up the elements of patches in a table.
    layer(torch.ones(1, 1, 8))
    attributes = Attributes(layer)
    before = attributes.read()
    layer.analog_module.anything = layer.analog_module.tile.anything = 1
    assert attributes.changes(before) == {}
    layer(torch.ones(1, 1, 6))
    layer.analog_module.eval()
    layer.analog_module.analog_ctx.requires_grad_(False)
    assert {attributes.name(place) for place in attributes.changes(before)} == {
        "fold_indices",
        "input_size",
        "analog_module.patches",
        "analog_module.training",
        "analog_module.requires_grad of parameters",
    }


def test_a_snapshot_of_long_ago_still_tells():
    holder = Holder()
    attributes = Attributes(holder)
    first = attributes.read()
    holder.inner.hidden = 1
    second = attributes.read()
    holder.items.append(3)
    holder.inner.training = False
    assert {attributes.name(place) for place in attributes.changes(second)} == {"items", "inner.training"}
    assert {attributes.name(place) for place in attributes.changes(first)} == {
        "items",
        "inner.training",
        "inner.hidden",
    }
    del holder.inner.hidden
    assert attributes.changes(first).keys() - attributes.changes(second).keys() == set()
    assert (1, "hidden") not in attributes.changes(first)


def test_names_left_out_do_not_count():
    holder = Holder()
    attributes = Attributes(holder, besides=["number", "unknown"])
    before = attributes.read()
    holder.number, holder.unknown, holder.name = 5, 5, "y"
    assert {attributes.name(place) for place in attributes.changes(before)} == {"name"}
    # Modules inside may have attributes of the same names, which do count.
    holder.inner.number = 5
    assert {attributes.name(place) for place in attributes.changes(before)} == {"name", "inner.number"}


def test_current_values_do_not_follow_what_happens_later():
    holder = Holder()
    attributes = Attributes(holder)
    places = [(0, "items"), (0, "missing"), (1, "outputs")]
    values = attributes.current(places)
    known = state(holder)
    holder.items[1].append(7)
    holder.missing = 1
    holder.inner.outputs["b"]["c"].clear()
    attributes.write(values)
    assert state(holder) == known
    assert not hasattr(holder, "missing")


def test_values_written_twice_do_not_grow():
    """Check that values can be written back, changed and written back again."""
    holder = Holder()
    attributes = Attributes(holder)
    values = attributes.current([(0, "items"), (0, "recent")])
    for _ in range(3):
        holder.items[1].append(1)
        holder.items[1] = 5
        holder.recent.append(9)
        attributes.write(values)
        assert holder.items[1] == [1, 2]
        assert holder.recent == deque([1, 2, 3], maxlen=3)


@pytest.mark.parametrize("order", [1, -1])
def test_parameters_bound_anew_and_frozen_go_back_in_any_order(order):
    holder = Holder()
    weight, bias = holder.inner.weight, holder.inner.bias
    attributes = Attributes(holder)
    before = attributes.read()
    bias.requires_grad_(False)
    holder.inner.gain = nn.Parameter(torch.ones(2))
    changed = attributes.changes(before)
    assert len(changed) == 2
    old = attributes.select(before, changed)
    attributes.write(dict([*old.items()][::order]))
    assert [*holder.inner.parameters()] == [weight, bias]
    assert weight.requires_grad
    assert bias.requires_grad
    attributes.write(dict([*changed.items()][::order]))
    assert [name for name, _ in holder.inner.named_parameters()] == ["weight", "bias", "gain"]
    assert [p.requires_grad for p in holder.inner.parameters()] == [True, False, True]


def test_a_parameter_that_two_modules_share_is_frozen_for_both():
    holder = Holder()
    holder.other = nn.Linear(2, 2)
    holder.other.weight = holder.inner.weight
    attributes = Attributes(holder)
    before = attributes.read()
    holder.other.weight.requires_grad_(False)
    changed = attributes.changes(before)
    flags = "requires_grad of parameters"
    assert {attributes.name(place) for place in changed} == {f"inner.{flags}", f"other.{flags}"}
    attributes.write(attributes.select(before, changed))
    assert holder.inner.weight.requires_grad
    attributes.write(changed)
    assert not holder.inner.weight.requires_grad
    assert holder.inner.bias.requires_grad


def test_large_containers_are_not_looked_into():
    """Check that only their length counts. It would take too long to compare a vocabulary in every step."""
    holder = Holder()
    attributes = Attributes(holder)
    before = attributes.read()
    holder.odd.large[0] = holder.odd.index[0] = -1
    assert attributes.changes(before) == {}
    # A new length is noticed, but the added elements stay.
    holder.odd.large.append(1)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == {"odd.large"}
    attributes.write(attributes.select(before, changed))
    assert len(holder.odd.large) == 258
    # A container of 256 elements is still compared element by element.
    del holder.odd.large[256:]
    before = attributes.read()
    holder.odd.large[1] = -2
    attributes.write(attributes.select(before, attributes.changes(before)))
    assert holder.odd.large[1] == 1


def test_a_counter_is_refilled_and_not_added_to():
    holder = Holder()
    attributes = Attributes(holder)
    values = attributes.current([(0, "votes")])
    for _ in range(2):
        holder.votes.update("aabc")
        attributes.write(values)
        assert holder.votes == Counter(a=2, b=1)
        assert type(holder.votes) is Counter


def test_containers_that_hold_each_other():
    """Check that a list that holds itself is read once, and that its other contents are written back."""
    holder = Holder()
    holder.items.append(holder.items)
    holder.inner.outputs["holder"] = holder.items
    holder.cycle = {"next": [None]}
    holder.cycle["next"][0] = holder.cycle
    attributes = Attributes(holder)
    before = attributes.read()
    assert attributes.changes(before) == {}
    holder.items.append(1)
    holder.cycle["next"].append(2)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == {"items", "inner.outputs", "cycle"}
    attributes.write(attributes.select(before, changed))
    assert len(holder.items) == 3
    assert holder.items[2] is holder.items
    assert holder.inner.outputs["holder"] is holder.items
    assert len(holder.cycle["next"]) == 1
    assert holder.cycle["next"][0] is holder.cycle


def test_a_container_in_two_places_is_put_back_in_both():
    """Check that a container that is met twice side by side is not taken for a cycle."""
    holder = Holder()
    shared = [1]
    holder.pair = [shared, shared]
    attributes = Attributes(holder)
    before = attributes.read()
    shared.append(2)
    attributes.write(attributes.select(before, attributes.changes(before)))
    assert holder.pair == [[1], [1]]
    assert holder.pair[0] is holder.pair[1] is shared


class Refusing(dict):
    """A dict whose own methods refuse to fill it again."""

    def clear(self):
        raise TypeError("cannot be cleared")

    def __setitem__(self, key, value):
        raise TypeError("is read-only")


class Counting(list):
    def __iter__(self):
        return iter(range(3))

    def clear(self):
        raise TypeError("cannot be cleared")

    def extend(self, values):
        raise TypeError("cannot be extended")


def test_containers_with_methods_of_their_own():
    """Check that contents are written back without the container's own methods."""
    holder = Holder()
    holder.refusing, holder.counting = Refusing(a=1), Counting([5, 6])
    attributes = Attributes(holder)
    before = attributes.read()
    dict.__setitem__(holder.refusing, "b", 2)
    holder.counting.append(7)
    changed = attributes.changes(before)
    assert {attributes.name(place) for place in changed} == {"refusing", "counting"}
    attributes.write(attributes.select(before, changed))
    assert (repr(holder.refusing), holder.counting[:]) == ("{'a': 1}", [5, 6])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 1, True),
        (1, 2, False),
        (1, 1.0, False),
        (None, None, True),
        (torch.ones(2), torch.zeros(2), True),
        (torch.ones(2), torch.ones(3), False),
        ([torch.ones(2)], [torch.zeros(2)], True),
        ([1], [1, 1], False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": [1]}, {"a": [2]}, False),
        (np.ones(2), np.zeros(2), True),
        ("a", "b", False),
        ([1], 1, False),
    ],
)
def test_is_alike(a, b, expected):
    holder = nn.Module()
    frozen = []
    for value in (a, b):
        holder.value = value
        frozen += Attributes(holder).current([(0, "value")]).values()
    assert is_alike(*frozen) is expected
