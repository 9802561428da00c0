"""These tests check that messages arrive as they were sent, and that bytes from a stranger only raise an error."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimc_pl.devices import DEVICES, convert_to_analog
from aimc_pl.messages import Message, aligned, decode, encode, read
from aimc_pl.strategies.ownership import without_common


def sent(values):
    message = Message(values)
    header = encode(message.description)
    body = torch.empty(message.size, dtype=torch.uint8)
    message.write(body)
    return read(decode(header), body)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.integers() | st.text() | st.tuples(st.integers(), st.integers())


def containers(inner):
    return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner)


nested = st.recursive(plain, containers, max_leaves=20)


@pytest.mark.slow
@given(nested)
def test_plain_values_stay_what_they_are(values):
    there = sent(values)
    assert there == values
    assert repr(there) == repr(values)  # so that True does not pass for 1, nor 1 for 1.0


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (5, 7, 2)])
def test_tensors_arrive_bit_for_bit_with_memory_of_their_own(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    others = [torch.ones(1, dtype=torch.bool), tensor, tensor.mT if len(shape) > 1 else tensor, tensor]
    there = sent({"all": others})["all"]
    for a, b in zip(there, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert a.storage_offset() == 0  # torch.set_rng_state reads the storage from its beginning
        assert a.untyped_storage().nbytes() == a.numel() * a.element_size()


def test_gradients_are_asked_for_where_they_were():
    assert [t.requires_grad for t in sent([torch.ones(1, requires_grad=True), torch.ones(1)])] == [True, False]


def test_what_arrives_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        there = sent(torch.ones(2))
    assert not there.is_inference()


def test_random_states_and_numbers_of_numpy():
    name, words, *rest = sent(np.random.get_state())
    ours = np.random.get_state()
    assert (name, *rest) == (ours[0], *ours[2:])
    assert words.dtype == ours[1].dtype
    assert (words == ours[1]).all()
    assert sent(np.float32(0.5)) == 0.5
    assert math.isnan(sent(math.nan))


@pytest.mark.parametrize("device", DEVICES)
def test_states_of_tiles_of_all_devices(device):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2))
    convert_to_analog(network, device)
    state = network.state_dict()
    there = sent(without_common(state))
    assert state.keys() - there.keys() == {"0.analog_module.analog_ctx"}
    ours, theirs = (entries["0.analog_module.analog_tile_state"] for entries in (state, there))
    assert ours.keys() - theirs.keys() == {"rpu_config"}
    for key, value in theirs.items():
        assert torch.equal(value, ours[key]) if isinstance(value, torch.Tensor) else repr(value) == repr(ours[key])


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code of a message has run",)


@pytest.mark.parametrize("value", [Trap(), {1}, b"", torch.ones(2).to_sparse(), [lambda: 0], torch.float32])
def test_other_values_are_not_sent(value):
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        Message({"key": [value]})


FORGED = [
    ["tensor", 0, "torch.float32", False, 1000],
    ["tensor", -64, "torch.float32", False, 2],
    ["tensor", 0, "os.system", False, 2],
    ["tensor", 0, "torch.float32", False, -1],
    ["tensor", 0, "torch.float32", False, "x"],
    ["tensor", 0, "torch.float32", [], 2],
    ["tensor"],
    ["dict", [["list"], 1]],
    ["class", "os", "system"],
    ["array", 3],
    [[]],
    [],
]


@pytest.mark.parametrize("description", FORGED, ids=str)
def test_forged_descriptions_raise(description):
    with pytest.raises(ValueError, match="not a valid message"):
        read(description, torch.zeros(64, dtype=torch.uint8))


def test_a_pickle_is_no_message():
    with pytest.raises((UnicodeDecodeError, json.JSONDecodeError)):
        decode(pickle.dumps(Trap()))


def test_alignment():
    assert [aligned(size) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]
