"""This module counts what the stages of a training step do for one micro-batch, without a look at the clock.

The step runs forward once. Hooks on modules see the layers on crossbars, and a dispatch mode sees all other operations
of torch. The backward follows from the forward.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.backends import cudnn, mha, mkldnn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from aimc_pl.analog import analog_layers, inside_analog_layers, is_analog, learns_by_pulses
from aimc_pl.arguments import listed
from aimc_pl.cost.distinct import Distinct
from aimc_pl.cost.learning import Learning, learning_of
from aimc_pl.cost.operations import computes_nothing, flops_of, is_copy, is_unknown, name_of
from aimc_pl.errors import UsageError
from aimc_pl.patches import patched
from aimc_pl.private_torch import TorchDispatchMode, is_checkpointing, storage_of, tree_leaves


@dataclass
class Matrix:
    """The weights of one layer on crossbars, and what a micro-batch does with them in all calls of the layer.

    A *vector* is an input of the crossbars, or an error of their outputs: one for every sample, times the positions of
    a convolution or a sequence.

    Attributes:
        name: the name of the layer.
        rows: the number of outputs.
        columns: the number of inputs.
        vectors: the number of products in a forward.
        numbers_in: the numbers in the inputs that the weights learn from. The windows of a convolution share them.
        vectors_back: the number of products in a backward that compute errors of the inputs.
        vectors_learning: the number of pairs of an input and an error that the weights learn from; 0 if the layer is
            frozen.
        vectors_again: the number of products of the forward that the backward repeats (activation checkpointing).
        learning: how the weights learn.
    """

    name: str
    rows: int
    columns: int
    vectors: int = 0
    numbers_in: int = 0
    vectors_back: int = 0
    vectors_learning: int = 0
    vectors_again: int = 0
    learning: Learning = field(default_factory=Learning)


@dataclass
class Work:
    """What one stage, or another part of a step, does for one micro-batch.

    Attributes:
        name: the name of the module with which the part begins; empty for the first part.
        matrices: the layers on crossbars.
        forward_flops: the FLOP of everything else in the forward.
        backward_flops: the same in the backward. It computes the gradients of the factors of a product that need one;
            other operations take as much as in the forward. What it repeats of the forward counts, too.
        gradient_flops: the part of it in the products that compute gradients of digital weights.
        gradient_numbers: the numbers that these products read: the inputs and errors of layers with digital weights.
        moved: the numbers that these operations of the forward read and write.
        moved_back: the same in the backward.
        kept: the numbers that are kept from the forward to the backward.
        parameters: the number of digital parameters that the forward reads.
        parameters_back: the number of them that the backward reads.
        trained: the number of them that learn.
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
    moved_back: int = 0
    kept: int = 0
    parameters: int = 0
    parameters_back: int = 0
    trained: int = 0
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
        UsageError: if a name is no module that the step calls, if the names are out of order, if a parameter is
            lazy, or if the step computes with sparse tensors.

    Warns:
        UserWarning: if the step calls operations whose FLOP are not known.
    """
    lazy = [name for name, parameter in network.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UsageError(f"the cost model cannot count lazy layers ({listed(lazy, 40)}): give them their sizes")
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
    if counter.unknown:
        warnings.warn(
            "the cost model counts one FLOP for each element of these operations, which may be too little: "
            f"{listed(sorted(counter.unknown))}",
            stacklevel=2,
        )
    return counter.works


class _Uses:
    """The storages and numbers that one part has used."""

    def __init__(self) -> None:
        self.parameters: set[int] = set()
        self.parameters_back: set[int] = set()
        self.trained: set[int] = set()
        self.batch, self.kept, self.sent, self.returned = Distinct(), Distinct(), Distinct(), Distinct()
        self.matrices: dict[int, Matrix] = {}
        """The layers on crossbars, by the identity of their first tile."""


class _Counter(TorchDispatchMode):
    """Counts operations where they happen: in the part that the last call of a named module has opened."""

    def __init__(self, network: nn.Module, split_at: Sequence[str], tile_size: int) -> None:
        super().__init__()
        self.works = [Work(name) for name in ("", *split_at)]
        self.opened: list[str] = []
        self.unknown: set[str] = set()
        """The names of operations whose FLOP are not known."""
        self._uses = [_Uses() for _ in self.works]
        # No part begins within a layer on several tiles.
        inside = inside_analog_layers(network)
        self._names = {id(module): name for name, module in network.named_modules() if id(module) not in inside}
        self._split_at = split_at
        self._tile_size = tile_size
        self._with_gradients = torch.is_grad_enabled()
        self._analog = analog_layers(network)
        self._in_analog = 0
        self._digital = {storage_of(buffer): 0 for buffer in network.buffers()}
        """The sizes of the digital parameters, by their storage. Buffers are small and count as nothing."""
        for parameter in network.parameters():
            if not is_analog(parameter):
                storage = storage_of(parameter)
                self._digital[storage] = self._digital.get(storage, 0) + parameter.numel()
        self._originals = {storage: storage for storage in self._digital}
        """The storages of digital parameters, by these storages and by those of their copies."""
        self._made_in: dict[int, int] = {}
        """The part in which each tensor was computed, by its storage."""
        self._made_inside: set[int] | None = None
        """The storages that the custom autograd function that runs now has made from what learns, if one runs."""
        self._alive: list[Tensor] = []
        """The tensors seen, because a storage that is freed could be mistaken for the next one in its place."""

    @property
    def _part(self) -> int:
        return len(self.opened)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager in which the step runs."""
        with ExitStack() as stack:
            # A hook of all modules that takes keyword arguments would leave a trace in torch after it is removed.
            hooks = [register_module_forward_pre_hook(self._open)]
            for layer in self._analog:
                hooks.append(layer.register_forward_pre_hook(self._enter))
                hooks.append(layer.register_forward_hook(self._leave, prepend=True, with_kwargs=True))
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(_without_fused_operations())
            stack.enter_context(patched((Function, "apply", classmethod(self._watched_function))))
            stack.enter_context(self)
            stack.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
            yield
        for work, uses in zip(self.works, self._uses, strict=True):
            work.matrices = [*uses.matrices.values()]
            work.parameters, work.parameters_back, work.trained = (
                sum(self._digital[storage] for storage in storages)
                for storages in (uses.parameters, uses.parameters_back, uses.trained)
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._in_analog and not func.is_view:  # what reads a view reads its storage
            name = name_of(func)
            inputs, outputs = _tensors((args, kwargs)), _tensors(out)
            self._read(inputs)
            if not computes_nothing(name):
                self._count(name, args, kwargs, out, inputs, outputs)
                if is_unknown(func) and any(tensor.numel() for tensor in outputs):
                    self.unknown.add(name)
            self._made(outputs, inputs, learn=any(map(self._learns, inputs)), is_copy=is_copy(name))
        return out

    def _count(self, name: str, args: Any, kwargs: Any, out: Any, inputs: Any, outputs: Any) -> None:
        work, uses = self.works[self._part], self._uses[self._part]
        moved = [tensor for tensor in (*inputs, *outputs) if not self._is_weight(tensor)]
        numbers = sum(tensor.numel() for tensor in moved)
        # A gather reads few of its weights. An operation on weights alone reads all of them.
        sized = (*inputs, *outputs) if all(map(self._is_weight, inputs)) else moved
        elements = max((tensor.numel() for tensor in sized), default=0)
        flops = flops_of(name, args, kwargs, out, elements, self._learns)
        gradients = [(factor, cost) for factor, cost in flops.factors if self._learns(factor)]
        weights = [cost for factor, cost in gradients if self._is_weight(factor)]
        work.forward_flops += flops.forward
        work.moved += numbers
        if weights:
            work.gradient_flops += sum(weights)
            read = (*(factor for factor, _ in flops.factors), out)
            work.gradient_numbers += sum(tensor.numel() for tensor in read if not self._is_weight(tensor))
        learn = any(map(self._learns, inputs)) and any(
            each.is_floating_point() or each.is_complex() for each in outputs
        )
        if learn:
            work.backward_flops += flops.backward + sum(cost for _, cost in gradients)
        if again := is_checkpointing():
            work.backward_flops += flops.forward
        work.moved_back += numbers * (learn + again)
        if learn or again:
            uses.parameters_back.update(self._originals[storage_of(each)] for each in inputs if self._is_weight(each))

    def _learns(self, tensor: Tensor) -> bool:
        """Return whether the backward computes the gradient of an operation's input."""
        made_inside = self._made_inside is not None and storage_of(tensor) in self._made_inside
        return made_inside or (tensor.requires_grad and self._differentiates)

    @property
    def _differentiates(self) -> bool:
        """Whether there is a backward. Inside of a custom autograd function gradients are disabled nevertheless."""
        return torch.is_grad_enabled() or self._made_inside is not None

    def _is_weight(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self._originals

    def _read(self, tensors: Sequence[Tensor]) -> None:
        """Note where tensors come from that this part reads: from earlier parts, from the batch, or parameters."""
        uses = self._uses[self._part]
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage in self._originals:
                uses.parameters.add(self._originals[storage])
                if self._learns(tensor):
                    uses.trained.add(self._originals[storage])
                continue
            self._alive.append(tensor)
            if storage not in self._made_in:
                self.works[self._part].batch += uses.batch.add(tensor)
                continue
            for part in range(self._made_in[storage], self._part):
                self.works[part].sent += self._uses[part].sent.add(tensor)
                if tensor.requires_grad:
                    self.works[part].returned += self._uses[part].returned.add(tensor)

    def _made(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, learn: bool, is_copy: bool = False) -> None:
        """Note that this part has computed tensors, unless they are views of tensors that it has only read.

        A copy of a parameter, in the type of autocast for example, is the parameter, unless it is expanded.
        """
        given = {storage_of(tensor) for tensor in inputs}
        for tensor in outputs:
            storage = storage_of(tensor)
            if storage in given:
                continue
            self._alive.append(tensor)
            if is_copy and self._is_weight(inputs[0]) and 0 not in inputs[0].stride():
                self._originals[storage] = self._originals[storage_of(inputs[0])]
                continue
            self._made_in[storage] = self._part
            if learn and self._made_inside is not None:
                self._made_inside.add(storage)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves for the backward."""
        if not self._in_analog and not self._is_weight(tensor):
            self._alive.append(tensor)
            self.works[self._part].kept += self._uses[self._part].kept.add(tensor)
        return tensor

    def _watched_function(self, function: type[Function], *args: Any, **kwargs: Any) -> Any:
        """Call a custom autograd function, of which the dispatch mode sees the forward only, without gradients."""
        learn = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors((args, kwargs)))
        if issubclass(function, CheckpointFunction):
            region, preserve, *inputs = args
            if not learn:
                with torch.no_grad():
                    return region(*inputs)
            return checkpoint(region, *inputs, use_reentrant=False, preserve_rng_state=preserve)
        outermost = learn and self._made_inside is None
        if outermost:
            self._made_inside = set()
        try:
            return _apply.__get__(None, function)(*args, **kwargs)
        finally:
            if outermost:
                self._made_inside = None

    def _open(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names.get(id(module), "")
        hidden = self._with_gradients and (is_checkpointing() or not torch.is_grad_enabled())
        if name in self._split_at and name not in self.opened and not hidden:
            self.opened.append(name)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._in_analog += 1

    def _leave(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self._in_analog -= 1
        if self._in_analog:
            return
        work, uses, (x, *_) = self.works[self._part], self._uses[self._part], _tensors((args, kwargs))
        self._read([x])
        tiles, again = [*layer.analog_tiles()], is_checkpointing()
        matrix = uses.matrices.setdefault(id(tiles[0]), self._matrix(layer, tiles))
        learn = self._differentiates and any(tile.analog_ctx.requires_grad for tile in tiles)
        vectors = out.numel() // matrix.rows
        matrix.vectors += vectors
        matrix.vectors_again += vectors * again
        matrix.vectors_back += vectors * self._learns(x)
        if learn:
            matrix.vectors_learning += vectors
            matrix.numbers_in += x.numel()
            if not again:
                work.kept += uses.kept.add(x)
        columns = min(matrix.columns, self._tile_size)
        matrix.learning = learning_of(tiles[0].rpu_config, columns, matrix.vectors_learning)
        if matrix.vectors_learning and not matrix.learning.is_digital and not learns_by_pulses(tiles[0].analog_ctx):
            raise UsageError(
                f"the cost model does not know how layer {matrix.name!r} learns, which has tiles for inference: "
                "freeze it, or choose a device of the catalogue"
            )
        for name, parameter in layer.named_parameters():
            # A digital bias, or a scale, of every output. In mixed precision there are the weights of tiles, too.
            if not is_analog(parameter) and not name.endswith("shared_weights"):
                self._read([parameter])
                if again:
                    uses.parameters_back.add(storage_of(parameter))
                work.forward_flops += out.numel()
                work.backward_flops += out.numel() * (self._learns(parameter) + again)
        self._made([out], [x], learn=learn or self._learns(x))

    def _matrix(self, module: Any, tiles: Sequence[Any]) -> Matrix:
        # An analog bias is one more column.
        columns = module.in_features + any(tile.analog_bias for tile in tiles)
        return Matrix(self._names.get(id(module), ""), module.out_features, columns)


_apply: Any = vars(Function)["apply"]


@contextmanager
def _without_fused_operations() -> Iterator[None]:
    """Context manager in which torch computes recurrent layers and encoders step by step.

    Whether it fuses them otherwise depends on the machine. It runs no compiled code in a dispatch mode.
    """
    before: Any = mkldnn.enabled, cudnn.enabled, mha.get_fastpath_enabled()
    try:
        _set_fused(False, False, False)
        yield
    finally:
        _set_fused(*before)


def _set_fused(on_cpu: bool, on_gpu: bool, encoders: bool) -> None:
    mkldnn.enabled, cudnn.enabled = on_cpu, on_gpu
    mha.set_fastpath_enabled(encoders)


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree of arguments or results."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if any(tensor.layout != torch.strided for tensor in found):
        raise UsageError("the cost model does not know what operations on sparse tensors take: make them dense")
    return found
