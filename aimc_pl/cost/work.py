"""This module counts what the stages of a training step do for one micro-batch, without a look at the clock.

The step runs forward once. Hooks on modules see the layers on crossbars, and a dispatch mode sees all other operations
of torch. The backward follows from the forward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry

from aimc_pl.analog import is_analog
from aimc_pl.cost.learning import Learning, learning_of
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import TorchDispatchMode, is_checkpointing, tree_leaves

FLOPS_PER_ELEMENT = {
    "native_batch_norm": 8,
    "native_layer_norm": 8,
    "native_group_norm": 8,
    "_softmax": 5,
    "_log_softmax": 5,
    "gelu": 5,
    "silu": 4,
    "tanh": 1,
}
"""The FLOP for each element of an operation that takes several steps. Operations that are not named take one.

A norm takes 1 for the mean, 3 for the variance, 2 to normalize and 2 for the affine part. A softmax takes the maximum,
a difference, an exponential, a sum and a quotient.
"""

_COMPUTES_NOTHING = (
    *("empty", "new_", "zeros", "ones", "zero_", "fill_", "lift_fresh"),
    *("clone", "copy_", "_to_copy", "_unsafe_view", "_reshape_alias"),
)
"""The first letters of operations of torch that make room, or copy into another layout or type."""


@dataclass(frozen=True)
class Matrix:
    """The weights of one layer on crossbars, and what a micro-batch does with them.

    Attributes:
        name: the name of the layer.
        rows: the number of outputs.
        columns: the number of inputs.
        vectors: the number of products in a forward: samples times the positions of a convolution or a sequence.
        numbers_in: the numbers of the input of a micro-batch. The windows of a convolution share them.
        returns: whether the backward computes the error of the inputs, which takes as many products.
        learning: how the weights learn.
    """

    name: str
    rows: int
    columns: int
    vectors: int
    numbers_in: int
    returns: bool = True
    learning: Learning = field(default_factory=Learning)


@dataclass
class Work:
    """What one stage, or another part of a step, does for one micro-batch.

    Attributes:
        name: the name of the module with which the part begins; empty for the first part.
        matrices: the layers on crossbars.
        forward_flops: the FLOP of everything else in the forward.
        backward_flops: the same in the backward. Products of two tensors that both need gradients count twice, all
            other operations as in the forward.
        gradient_flops: the part of it in the products that compute gradients of digital weights.
        gradient_numbers: the numbers that these products read: the inputs and errors of layers with digital weights.
        moved: the numbers that these operations of the forward read and write.
        kept: the numbers that are kept from the forward to the backward.
        parameters: the number of digital parameters.
        batch: the numbers of the micro-batch itself that the part reads.
        sent: the numbers that the part sends to the next one in the forward, those that it passes on included.
        returned: the numbers that the part gets back from the next one in the backward.
    """

    name: str = ""
    matrices: list[Matrix] = field(default_factory=list)
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    gradient_flops: float = 0.0
    gradient_numbers: int = 0
    moved: int = 0
    kept: int = 0
    parameters: int = 0
    batch: int = 0
    sent: int = 0
    returned: int = 0


def count_work(
    network: nn.Module, function: Callable[[], Any], split_at: Sequence[str] = (), tile_size: int = 512
) -> list[Work]:
    """Count what each part of a step does for one micro-batch.

    The function runs once, forward only. Its traces in the network (the statistics of a norm, for example) remain; run
    it inside :meth:`aimc_pl.trial.Trials.fresh` to undo them.

    Args:
        network: the module that contains all modules that the step calls.
        function: runs the step on a micro-batch and returns the loss, with gradients enabled.
        split_at: the names of the modules whose first calls open parts 1, 2, … As for stages, calls without gradients
            and inside of checkpointed regions do not count.
        tile_size: the number of rows and columns of a tile, for algorithms that write column by column.

    Returns:
        One entry for every part.

    Raises:
        UsageError: if a name is no module that the step calls, or if the names are out of order.
    """
    counter = _Counter(network, split_at, tile_size)
    with counter.watching():
        function()
    if counter.opened != [*split_at]:
        missing = next((name for name in split_at if name not in counter.opened), None)
        raise UsageError(
            f"split_at names {missing!r}, which the step does not call"
            if missing
            else f"split_at is out of order: the step calls {', '.join(counter.opened)}"
        )
    return counter.works


class _Counter(TorchDispatchMode):
    """Counts operations where they happen: in the part that the last call of a named module has opened."""

    def __init__(self, network: nn.Module, split_at: Sequence[str], tile_size: int) -> None:
        super().__init__()
        self.works = [Work(name) for name in ("", *split_at)]
        self.opened: list[str] = []
        self._names = {id(module): name for name, module in network.named_modules()}
        self._split_at = split_at
        self._tile_size = tile_size
        self._with_gradients = torch.is_grad_enabled()
        self._in_analog = 0
        self._digital = {_storage(buffer): 0 for buffer in network.buffers()}
        self._digital |= {_storage(p): p.numel() for p in network.parameters() if not is_analog(p)}
        """The sizes of the digital parameters, by their storage. Buffers are small and count as nothing."""
        self._parameters: list[set[int]] = [set() for _ in self.works]
        self._kept: list[set[int]] = [set() for _ in self.works]
        self._made_in: dict[int, int] = {}
        """The part in which each tensor was computed, by its storage."""
        self._batch: list[set[int]] = [set() for _ in self.works]
        self._crossed: set[tuple[int, int]] = set()
        self._alive: list[Tensor] = []
        """The tensors seen, because a storage that is freed could be mistaken for the next one in its place."""

    @property
    def _part(self) -> int:
        return len(self.opened)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager in which the step runs."""
        handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            with self, saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
        for work, used in zip(self.works, self._parameters, strict=True):
            work.parameters = sum(self._digital[storage] for storage in used)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._in_analog and not func.is_view:  # what reads a view reads its storage
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self._read(inputs)
            if not func.overloadpacket.__name__.startswith(_COMPUTES_NOTHING):
                self._count(func.overloadpacket, args, kwargs or {}, out, inputs, outputs)
            self._made(outputs, inputs)
        return out

    def _count(self, operation: Any, args: Any, kwargs: Any, out: Any, inputs: Any, outputs: Any) -> None:
        work = self.works[self._part]
        learning = [tensor for tensor in inputs if tensor.requires_grad and torch.is_grad_enabled()]
        moved = [tensor for tensor in (*inputs, *outputs) if _storage(tensor) not in self._digital]
        work.moved += sum(tensor.numel() for tensor in moved)
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **kwargs, out_val=out)
            back = flops * min(2, sum(tensor.ndim > 1 for tensor in learning))
            if any(tensor.ndim > 1 and _storage(tensor) in self._digital for tensor in learning):
                work.gradient_flops += flops
                work.gradient_numbers += sum(tensor.numel() for tensor in moved if tensor.ndim > 1)
        else:
            elements = max((tensor.numel() for tensor in moved), default=0)
            flops = elements * FLOPS_PER_ELEMENT.get(operation.__name__, 1)
            back = flops if learning else 0
        work.forward_flops += flops
        work.backward_flops += back

    def _read(self, tensors: Sequence[Tensor]) -> None:
        """Note where tensors come from that this part reads: from earlier parts, from the batch, or parameters."""
        for tensor in tensors:
            storage = _storage(tensor)
            if storage in self._digital:
                self._parameters[self._part].add(storage)
                continue
            self._alive.append(tensor)
            if storage not in self._made_in:
                if storage not in self._batch[self._part]:
                    self._batch[self._part].add(storage)
                    self.works[self._part].batch += tensor.numel()
                continue
            for part in range(self._made_in[storage], self._part):
                if (storage, part) not in self._crossed:
                    self._crossed.add((storage, part))
                    self.works[part].sent += tensor.numel()
                    self.works[part].returned += tensor.numel() * tensor.requires_grad

    def _made(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Note that this part has computed tensors, unless they are views of tensors that it has only read."""
        given = {_storage(tensor) for tensor in inputs}
        for tensor in outputs:
            if _storage(tensor) not in given:
                self._made_in[_storage(tensor)] = self._part
                self._alive.append(tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves for the backward."""
        storage = _storage(tensor)
        if not self._in_analog and storage not in self._digital and storage not in self._kept[self._part]:
            self._kept[self._part].add(storage)
            self.works[self._part].kept += tensor.numel()
        return tensor

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names.get(id(module), "")
        hidden = self._with_gradients and (is_checkpointing() or not torch.is_grad_enabled())
        if name in self._split_at and name not in self.opened and not hidden:
            self.opened.append(name)
        if is_analog(module):
            if not self._in_analog:
                self._read([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
            self._in_analog += 1

    def _leave(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        if not is_analog(module):
            return
        self._in_analog -= 1
        if self._in_analog:
            return
        work, (x, *_) = self.works[self._part], args
        vectors = out.numel() // module.out_features
        config = next(module.analog_tiles()).rpu_config
        learning = learning_of(config, min(module.in_features, self._tile_size), vectors)
        name, returns = self._names.get(id(module), ""), x.requires_grad and torch.is_grad_enabled()
        work.matrices.append(
            Matrix(name, module.out_features, module.in_features, vectors, x.numel(), returns, learning)
        )
        for parameter in module.parameters():
            if not is_analog(parameter):  # a digital bias, which is added to every output
                self._parameters[self._part].add(_storage(parameter))
                work.forward_flops += out.numel()
                work.backward_flops += out.numel()
        if _storage(x) not in self._kept[self._part]:
            self._kept[self._part].add(_storage(x))
            work.kept += x.numel()
        self._made([out], [x])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
