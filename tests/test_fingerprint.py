"""These tests check that different batches have different fingerprints, and equal ones the same in every process."""

import dataclasses
import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from aimc_pl.fingerprint import fingerprint


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: list


def batches(seed, size):
    """Return batches of all kinds, whose shapes do not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    y = torch.randint(1000, size[:1], generator=generator)
    words = [str(int(label)) for label in y]
    return {
        "tensors": (x, y),
        "labels only": (torch.zeros(size), y),
        "images only": (x, torch.zeros(size[0])),
        "bfloat16": x.bfloat16(),
        "transposed": x.mT,
        "dictionary": {"x": x, "y": y},
        "user dictionary": UserDict(x=x, y=y),
        "dataclass": Pair(x, words),
        "texts": words,
        "numpy": x.numpy(),
        "numbers": [float(label) for label in y],
        "packed": pack_sequence([*x], enforce_sorted=False),
    }


@pytest.mark.parametrize("size", [(8, 6), (64, 784), (16, 3, 32, 32), (300, 1000)], ids=str)
def test_other_data_have_another_fingerprint(size):
    ours, theirs, again = batches(0, size), batches(1, size), batches(0, size)
    for kind in ours:
        assert fingerprint(ours[kind]) == fingerprint(again[kind]), kind
        assert fingerprint(ours[kind]) != fingerprint(theirs[kind]), kind


@pytest.mark.parametrize("size", [(64, 784), (32, 1, 28, 28), (16, 3, 224, 224), (200, 1024)], ids=str)
def test_no_row_is_left_out(size):
    x = torch.randn(size)
    before = fingerprint(x)
    for row in range(size[0]):
        other = x.clone()
        other[row] += 1
        assert fingerprint(other) != before, row


def test_it_is_not_blind_to_the_middle_of_images():
    """Check images with a frame of zeros, into which samples at a distance of a row's length would fall."""
    x = torch.zeros(64, 1, 28, 28)
    ours, theirs = x.clone(), x.clone()
    ours[:, :, 10:18, 10:18], theirs[:, :, 10:18, 10:18] = torch.randn(2, 64, 1, 8, 8)
    assert fingerprint(ours) != fingerprint(theirs)


def test_one_label_and_the_order_count():
    y = torch.arange(512)
    other = y.clone()
    other[100] += 1
    assert len({fingerprint(y), fingerprint(other), fingerprint(y.flip(0)), fingerprint(y.float())}) == 4


def test_graphs():
    data = pytest.importorskip("torch_geometric.data")
    graphs = [data.Batch.from_data_list([data.Data(x=torch.full((3, 2), float(k)))]) for k in (0, 1, 0)]
    assert fingerprint(graphs[0]) == fingerprint(graphs[2]) != fingerprint(graphs[1])


@pytest.mark.slow
def test_processes_agree():
    code = (
        "import torch\nfrom aimc_pl.fingerprint import fingerprint\nprint(fingerprint(({'a': torch.ones(3000)}, 'x')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(({"a": torch.ones(3000)}, "x"))


def test_what_is_no_data_does_not_count():
    class Anything:
        pass

    assert fingerprint((Anything(), 1)) == fingerprint((Anything(), 1))


def awkward():
    x = torch.arange(4000.0)
    numbers = np.arange(4000.0)
    read_only = numbers.copy()
    read_only.flags.writeable = False
    return {
        "backwards": numbers[::-1],
        "long double": numbers.astype(np.longdouble),
        "other byte order": numbers.astype(">f8"),
        "read-only": read_only,
        "conjugate": torch.complex(x, x).conj(),
        "negative": torch.complex(x, x).conj().imag,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "meta": torch.zeros(3, device="meta"),
        "sparse": x.to_sparse(),
    }


def test_arrays_and_tensors_of_all_kinds():
    found = {kind: fingerprint(batch) for kind, batch in awkward().items()}
    assert found == {kind: fingerprint(batch) for kind, batch in awkward().items()}
    assert len(set(found.values())) == len(found)
    assert found["read-only"] == fingerprint(np.arange(4000.0))
