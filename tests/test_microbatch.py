"""These tests check how batches of all kinds are split."""

import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import FrozenInstanceError, dataclass, field
from itertools import chain
from pathlib import Path
from subprocess import run
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch_geometric.data import Batch, Data, HeteroData
from torchvision import tv_tensors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from aimc_pl.errors import UsageError
from aimc_pl.microbatch import batch_size, split_batch

Pair = namedtuple("Pair", ["x", "y"])


class Typed(NamedTuple):
    x: Tensor
    scale: float = 2.0


@dataclass
class Sample:
    x: Tensor
    inner: Any = None
    counted: int = field(init=False, default=0)
    derived: Tensor = field(init=False)

    def __post_init__(self):
        self.counted += 1
        self.derived = self.x + 100


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str = "batch"


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    unset: Tensor = field(init=False)


class Unknown:
    """An object that holds tensors in a way that nobody else knows."""

    def __init__(self, held):
        self.held = held


@given(st.integers(1, 40), st.integers(1, 50))
def test_splits_as_tensor_split_and_never_empty(samples, num_microbatches):
    x = torch.arange(samples)
    parts = split_batch(x, num_microbatches)
    expected = [part for part in x.tensor_split(num_microbatches) if len(part)]
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


def test_nested_batches_keep_their_structure():
    batch = OrderedDict(
        pair=Pair(torch.arange(5), torch.arange(10).view(5, 2)),
        names=["a", "b", "c", "d", "e"],
        several=[torch.arange(5), torch.arange(5) * 2],
        scale=torch.tensor(3.0),
        flag=True,
        shapes=(8, 8),
    )
    first, second = split_batch(batch, 2)
    assert type(first) is OrderedDict
    assert type(first["pair"]) is Pair
    assert second["pair"].y.tolist() == [[6, 7], [8, 9]]
    assert (first["names"], second["names"]) == (["a", "b", "c"], ["d", "e"])
    assert [part.tolist() for part in second["several"]] == [[3, 4], [6, 8]]
    assert first["scale"] == 3
    assert second["flag"] is True
    assert first["shapes"] == (8, 8)
    assert batch_size(second) == 2


@pytest.mark.parametrize("batch", [(torch.ones(4), torch.ones(5)), {"n": 3}, [], torch.tensor(1.0)])
def test_batches_that_cannot_be_split(batch):
    with pytest.raises(UsageError, match="split along the first dimension"):
        split_batch(batch, 2)


def test_mappings_of_all_kinds_keep_their_type():
    batch = {
        "default": defaultdict(list, x=torch.arange(4)),
        "nested": {"deep": {"deeper": (torch.arange(4), None)}},
        "view": MappingProxyType({"x": torch.arange(4)}),
        "typed": Typed(torch.arange(4)),
    }
    second = split_batch(batch, 2)[1]
    assert second["default"].default_factory is list
    assert second["nested"]["deep"]["deeper"][0].tolist() == [2, 3]
    assert type(second["view"]) is MappingProxyType
    assert second["view"]["x"].tolist() == [2, 3]
    assert (type(second["typed"]), second["typed"].x.tolist(), second["typed"].scale) == (Typed, [2, 3], 2.0)
    assert batch["default"]["x"].tolist() == [0, 1, 2, 3]


def test_arrays_and_constants():
    config = {"lr": 0.1, "shape": (3, 4)}
    batch = {
        "x": torch.arange(4),
        "ids": np.arange(4),
        "table": np.arange(3),
        "where": Path("a"),
        "config": config,
        "text": "four",
        "device": torch.device("cpu"),
        "scalars": Unknown(torch.tensor(1.0)),
    }
    second = split_batch(batch, 2)[1]
    assert second["ids"].tolist() == [2, 3]
    for name in ("table", "where", "config", "text", "device", "scalars"):
        assert second[name] is batch[name]


def test_dataclasses_are_copied_and_not_initialised_anew():
    batch = Sample(torch.arange(4), inner=Frozen(torch.arange(4) * 2))
    batch.later = torch.arange(4) * 3
    first, second = split_batch(batch, 2)
    assert (first.x.tolist(), second.x.tolist()) == ([0, 1], [2, 3])
    assert second.derived.tolist() == [102, 103]
    assert second.counted == 1
    assert second.later.tolist() == [6, 9]
    assert type(second.inner) is Frozen
    assert (second.inner.x.tolist(), second.inner.name) == ([4, 6], "batch")
    with pytest.raises(FrozenInstanceError):
        second.inner.name = "other"
    assert batch.x.tolist() == [0, 1, 2, 3]


def test_dataclasses_with_slots_and_unset_fields():
    second = split_batch(Slotted(torch.arange(4)), 2)[1]
    assert type(second) is Slotted
    assert second.x.tolist() == [2, 3]
    assert not hasattr(second, "unset")


def test_batch_encodings_keep_type_attributes_and_the_tokens_of_their_rows():
    vocabulary = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[PAD]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]")
    batch = tokenizer(["a b", "c", "b b c"], return_tensors="pt", padding=True)
    batch["labels"] = torch.tensor([7, 8, 9])
    first, second = split_batch(batch, 2)
    assert type(first) is type(second) is BatchEncoding
    assert first.input_ids.tolist() == [[1, 2, 0], [3, 0, 0]]
    assert second.attention_mask.tolist() == [[1, 1, 1]]
    assert second["labels"].tolist() == [9]
    assert first.tokens(1) == ["c", "[PAD]", "[PAD]"]
    assert second.tokens(0) == ["b", "b", "c"]
    assert batch.input_ids.shape == (3, 3)


def test_model_outputs_keep_items_and_attributes_alike():
    second = split_batch(BaseModelOutput(last_hidden_state=torch.arange(4)), 2)[1]
    assert type(second) is BaseModelOutput
    assert second["last_hidden_state"].tolist() == second.last_hidden_state.tolist() == [2, 3]


@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_split_by_sequences(in_order):
    lengths = [5, 4, 4, 2, 1] if in_order else [2, 5, 1, 4, 4]
    sequences = [torch.randn(length, 3) for length in lengths]
    labels = torch.arange(5)
    parts = split_batch((pack_sequence(sequences, enforce_sorted=in_order), labels), 2)
    for (packed, label), chosen in zip(parts, (sequences[:3], sequences[3:]), strict=True):
        expected = pack_sequence(chosen, enforce_sorted=in_order)
        for field_of_it, field_expected in zip(packed, expected, strict=True):
            assert (field_of_it is None) == (field_expected is None)
            assert field_of_it is None or torch.equal(field_of_it, field_expected)
        assert all(map(torch.equal, unpack_sequence(packed), chosen))
        assert len(label) == len(chosen)


def graph(nodes, cls=Data):
    generator = torch.Generator().manual_seed(nodes)
    edges = torch.randint(nodes, (2, 2 * nodes), generator=generator)
    return cls(x=torch.randn(nodes, 2, generator=generator), edge_index=edges, y=torch.tensor([nodes]), name=str(nodes))


class MyData(Data):
    pass


@pytest.mark.parametrize("cls", [Data, MyData])
def test_graphs_split_by_graphs(cls):
    graphs = [graph(nodes, cls) for nodes in (3, 5, 2, 4, 6)]
    batch = (Batch.from_data_list(graphs, follow_batch=["x"]), torch.arange(5))
    assert batch_size(batch) == 5
    parts = split_batch(batch, 2)
    for (part, index), chosen in zip(parts, (graphs[:3], graphs[3:]), strict=True):
        expected = Batch.from_data_list(chosen, follow_batch=["x"])
        assert isinstance(part, cls)
        assert set(part.keys()) == set(expected.keys())
        assert all(torch.equal(part[key], expected[key]) for key in part.keys() if key != "name")  # noqa: SIM118
        assert part.name == expected.name
        assert part.num_graphs == len(index) == len(chosen)


def test_heterogeneous_graphs():
    graphs = []
    for nodes in (2, 3, 4):
        data = HeteroData()
        data["user"].x = torch.full((nodes, 1), float(nodes))
        data["item"].x = torch.full((nodes + 1, 2), float(nodes))
        data["user", "buys", "item"].edge_index = torch.stack((torch.arange(nodes), torch.arange(nodes) + 1))
        graphs.append(data)
    second = split_batch(Batch.from_data_list(graphs), 2)[1]
    expected = Batch.from_data_list(graphs[2:])
    assert second.num_graphs == 1
    assert torch.equal(second["item"].x, expected["item"].x)
    assert torch.equal(second["user", "buys", "item"].edge_index, expected["user", "buys", "item"].edge_index)


def test_one_graph_is_one_sample():
    whole = graph(4)
    assert batch_size(whole) == 1
    assert split_batch(whole, 3) == [whole]


def test_graphs_that_cannot_be_taken_apart_are_refused():
    batch = Batch.from_data_list([graph(3), graph(4)])
    batch.later = torch.ones(7)
    with pytest.raises(UsageError, match=r"DataBatch with \['later'\], which no single graph has, .*split_batch="):
        split_batch(batch, 2)
    by_hand = Batch(x=torch.ones(4, 1), batch=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(UsageError, match=r"Batch \(Cannot reconstruct"):
        split_batch(by_hand, 2)


def test_targets_of_differing_sizes_are_split_by_samples():
    boxes = [{"boxes": torch.full((count, 4), float(count)), "label": count} for count in (3, 1, 0, 5)]
    masks = tuple(torch.ones(count, 2) for count in (3, 1, 2, 5))
    adjacency = [torch.eye(count).to_sparse() for count in (2, 3, 2, 3)]
    second = split_batch((torch.arange(4), boxes, {"masks": masks, "adjacency": adjacency}), 2)[1]
    assert second[1][0] is boxes[2]
    assert second[1][1] is boxes[3]
    assert second[2]["masks"] == masks[2:]
    assert second[2]["adjacency"] == adjacency[2:]


def test_the_lists_of_two_samples_are_not_taken_for_the_batch():
    targets = [torch.ones(7, 4), torch.ones(3, 4)]
    first, second = split_batch((torch.arange(2), targets), 2)
    assert (first[0].tolist(), second[0].tolist()) == ([0], [1])
    assert (first[1], second[1]) == (targets[:1], targets[1:])


def test_two_parts_of_two_samples_are_not_taken_for_the_samples():
    images, targets = {"image": torch.arange(2)}, {"boxes": [torch.ones(7, 4), torch.ones(3, 4)]}
    first, second = split_batch((images, targets), 2)
    assert (first[0]["image"].tolist(), second[0]["image"].tolist()) == ([0], [1])
    assert second[1]["boxes"] == targets["boxes"][1:]


def test_two_tensors_with_a_row_per_sample_are_split_by_rows():
    first, second = split_batch({"x": torch.arange(2), "pair": [torch.tensor([5, 6]), torch.tensor([7, 8])]}, 2)
    assert [part.tolist() for part in first["pair"]] == [[5], [7]]
    assert [part.tolist() for part in second["pair"]] == [[6], [8]]


def test_lists_of_equal_sizes_that_are_not_the_batchs_are_split_by_samples():
    images = [torch.ones(3, height, 8) for height in (5, 6, 7, 8)]
    assert split_batch({"image": images, "label": torch.arange(4)}, 2)[1]["image"] == images[2:]


def detections(count):
    images = [torch.rand(3, 8 + k, 8) for k in range(count)]
    return images, [{"boxes": torch.rand(k, 4), "labels": torch.ones(k)} for k in range(count)]


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_lists_of_images_and_targets_have_a_sample_per_element(kind, count):
    """Check lists of images and targets, also of three images, which is the number of channels too."""
    images, targets = map(kind, detections(count))
    parts = split_batch((images, targets), 2)
    assert all(type(value) is kind for part in parts for value in part)
    named = split_batch({"image": images, "target": targets, "epoch": 5}, 2)
    for values, which, name in ((images, 0, "image"), (targets, 1, "target")):
        for found in ([part[which] for part in parts], [part[name] for part in named]):
            assert [*map(len, found)] == [len(rows) for rows in torch.arange(count).tensor_split(min(count, 2))]
            assert [*map(id, chain(*found))] == [*map(id, values)]
    assert named[-1]["epoch"] == 5


def test_labels_in_a_list_tell_how_many_samples_there_are():
    images, labels = [torch.rand(3, 8, 8) for _ in range(4)], ["a", "b", "c", "d"]
    assert split_batch((images, labels), 2) == [(images[:2], labels[:2]), (images[2:], labels[2:])]


@pytest.mark.parametrize(
    "sample",
    [
        lambda k: (torch.rand(3), float(k)),
        lambda k: (torch.rand(3), torch.tensor(k)),
        lambda k: {"image": torch.rand(3, 8), "boxes": torch.rand(k, 4)},
        lambda k: Data(x=torch.rand(3, 2)),
    ],
    ids=["number", "scalar", "sizes", "graph"],
)
def test_samples_that_nobody_has_collated_are_split_as_they_are(sample):
    samples = [sample(k) for k in range(4)]
    assert split_batch(samples, 3) == [samples[:2], samples[2:3], samples[3:]]


def test_batches_of_several_loaders_are_no_samples():
    """Check a list of batches, as Lightning's ``CombinedLoader`` gives it."""
    loaders = [(torch.arange(4.0).view(4, 1), torch.arange(4)) for _ in range(2)]
    second = split_batch(loaders, 2)[1]
    assert [[value.flatten().tolist() for value in pair] for pair in second] == [[[2, 3], [2, 3]]] * 2


@pytest.mark.parametrize("shape", [(3, 8, 8), (3,)])
def test_lists_of_tensors_that_could_be_samples_or_rows_are_refused(shape):
    lists = [torch.rand(shape) for _ in range(4)], [torch.rand(3) for _ in range(4)]
    with pytest.raises(UsageError, match=r"lists of 4 tensors with 3 rows each.*pass split_batch="):
        split_batch(lists, 2)
    images = [torch.rand(3, height, 8) for height in (5, 6, 7)]
    with pytest.raises(UsageError, match=r"lists of 3 tensors with 3 rows each.*pass split_batch="):
        split_batch((images, torch.arange(3)), 2)


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_keep_their_type_and_attributes(requires_grad):
    boxes = tv_tensors.BoundingBoxes(torch.rand(4, 4), format="XYXY", canvas_size=(8, 8))
    marked = torch.rand(4, 3).as_subclass(Marked).requires_grad_(requires_grad)
    marked.unit, marked.weights = "mm", torch.arange(4)
    second = split_batch((boxes, marked), 2)[1]
    assert isinstance(second[0], tv_tensors.BoundingBoxes)
    assert (second[0].format, second[0].canvas_size) == (boxes.format, boxes.canvas_size)
    assert torch.equal(second[0].as_subclass(torch.Tensor), boxes[2:].as_subclass(torch.Tensor))
    assert type(second[1]) is Marked
    assert (second[1].unit, second[1].weights.tolist(), second[1].requires_grad) == ("mm", [2, 3], requires_grad)
    assert torch.equal(second[1], marked[2:])


@pytest.mark.parametrize(
    "batch",
    [
        ([torch.ones(3, 2), torch.ones(1, 2)], [torch.ones(2), torch.ones(2), torch.ones(3)]),
        (torch.ones(4), [torch.ones(3), torch.ones(1), torch.ones(2)]),
        (torch.ones(2), {"pair": (torch.ones(3), [torch.ones(2)])}),
    ],
    ids=["nothing says how many", "as many as no sample", "elements of different kinds"],
)
def test_lists_that_could_be_read_either_way_are_refused(batch):
    with pytest.raises(UsageError, match="along the first dimension"):
        split_batch(batch, 2)


class Extra(dict):
    pass


def extra():
    mapping = Extra(x=torch.ones(4))
    mapping.more = torch.ones(4)
    return mapping


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Unknown(torch.ones(4)), "Unknown with tensors"),
        (Unknown([{"deep": Unknown(torch.ones(4))}]), "Unknown with tensors"),
        (deque([torch.ones(4)]), "collections.deque with tensors"),
        ({"x": {torch.ones(4)}}, "builtins.set with tensors"),
        (map(abs, [torch.ones(4)]), "builtins.map with tensors"),
        (extra(), "Extra with tensors"),
        (torch.eye(4).to_sparse(), r"torch.Tensor \(torch.sparse_coo\)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name_with_the_remedy(value, name):
    for batch in (value, (torch.ones(4), value)):
        with pytest.raises(UsageError, match=f"holds a .*{name}.*: pass split_batch=.* or define split_batch on the"):
            split_batch(batch, 2)


# torch warns about both kinds of tensors.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_nested_and_quantized_tensors():
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(UsageError, match=r"\(nested\)"):
            split_batch(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout), 2)
    values = torch.arange(8.0).view(4, 2)
    with pytest.raises(UsageError, match=r"\(quantized\)"):
        split_batch(torch.quantize_per_channel(values, torch.ones(4), torch.zeros(4), 0, torch.qint8), 2)
    second = split_batch(torch.quantize_per_tensor(values, 1.0, 0, torch.qint8), 2)[1]
    assert torch.equal(second.dequantize(), values[2:])


@pytest.mark.slow
def test_neither_library_is_imported_for_other_batches():
    code = (
        "import sys, torch; from aimc_pl.microbatch import split_batch; split_batch({'x': torch.ones(4)}, 2); "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'torch_geometric')))"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_writes_into_one_micro_batch_do_not_disturb_another(num_microbatches):
    """Check that parts share memory but no version counter, for which autograd would refuse its saved tensors."""
    x = torch.arange(6.0, dtype=torch.float64).view(6, 1)
    batch = {"x": x, "inner": Sample(x.clone(), inner=[x.clone()]), "packed": pack_sequence([*x.clone()])}
    weight = torch.full((1, 1), 2.0, dtype=torch.float64, requires_grad=True)
    parts = split_batch(batch, num_microbatches)
    losses = []
    for part in parts:
        dense = [part["x"], part["inner"].x, part["inner"].inner[0], part["inner"].derived]
        for tensor in dense:
            tensor.add_(1)
        losses.append(sum((tensor * weight).sum() for tensor in (*dense, part["packed"].data)))
    for loss in losses:
        loss.backward()
    # Five tensors hold 0 + 1 + … + 5. 1 was added to each sample in four of them, and 100 in one.
    assert weight.grad.item() == 5 * 15 + 4 * 6 + 600
    assert parts[-1]["x"].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_write_into_the_micro_batch_itself_is_still_noticed():
    part, _ = split_batch(torch.ones(4, 1), 2)
    weight = torch.ones(1, 1, requires_grad=True)
    loss = (part * weight).sum()
    part.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_batch_that_requires_grad_gets_its_gradient():
    batch = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    for k, part in enumerate(split_batch(batch, 2)):
        (part * (k + 1)).sum().backward()
    assert batch.grad.flatten().tolist() == [1, 1, 2, 2]
