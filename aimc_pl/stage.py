"""One accelerator of the pipeline: its forward, its backward with the weights of that moment, its weight version."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from aimc_pl.devices.conversion import own_pending_errors


@dataclass
class _InFlight:
    inputs: Any
    outputs: Any
    version: int


class Stage:
    """A consecutive part of the network, run one micro-batch at a time.

    Args:
        index: m, from 0.
        module: takes the values that enter the stage and returns those that leave it.
        other_parameters: parameters outside ``module`` that the stage updates too.
        delayed: whether the weights may change between a micro-batch's forward and its backward. The backward then
            uses the weights of its own time, as a crossbar does, for digital parameters (also those that autocast
            casts) and analog tiles alike. Tensors derived from parameters in other ways, by a parametrization say,
            stay as the forward computed them.
        weight_stashing: keep the forward's weights for the backward instead (PipeDream's digital baseline).
        context: entered around every forward (a precision plugin's autocast).
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        *,
        other_parameters: Iterable[nn.Parameter] = (),
        delayed: bool = False,
        weight_stashing: bool = False,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.index = index
        self.module = module
        self.parameters = [*module.parameters(), *other_parameters]
        self.version = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._context = context
        stash_version = (lambda: self.version) if weight_stashing else None
        self._saved = SavedParameters(self.parameters, stash_version).hooks if delayed else nullcontext

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose activations the stage holds."""
        return len(self._in_flight)

    def seen_version(self, microbatch: int) -> int:
        """The weight version that the forward of a micro-batch in flight saw."""
        return self._in_flight[microbatch].version

    def forward(self, microbatch: int, inputs: Any) -> Any:
        """Run the module on what the stage before sent; returns values that require grad where theirs do."""
        inputs = _map(_receive, inputs)
        with torch.enable_grad(), self._saved(), self._context():
            outputs = self.module(*inputs)
        self._in_flight[microbatch] = _InFlight(inputs, outputs, self.version)
        return outputs

    def backward(self, microbatch: int, gradients: Any, loss: Tensor | None = None) -> Any:
        """Backpropagate, adding to the parameters' gradients (and to the tiles' pending pairs).

        Args:
            microbatch: one whose forward has run.
            gradients: with respect to the outputs, in their structure, ``None`` where there is none.
            loss: what the outputs became (last stage only); ``gradients`` is then with respect to it.

        Returns:
            The gradients with respect to the inputs, in their structure.
        """
        flight = self._in_flight.pop(microbatch)
        roots = _leaves(flight.outputs if loss is None else loss)
        pairs = zip(roots, _leaves(gradients), strict=True)
        pairs = [(root, gradient) for root, gradient in pairs if gradient is not None and root.requires_grad]
        if pairs:
            with own_pending_errors(self.parameters):
                torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        return _map(lambda value: value.grad if isinstance(value, Tensor) else None, flight.inputs)

    def clear(self) -> None:
        """Forget the micro-batches in flight."""
        self._in_flight.clear()


# Nearly always the values are tensors, and pytree takes as long as a small layer.
def _map(function: Callable[[Any], Any], values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(function(value) if isinstance(value, Tensor) else tree_map(function, value) for value in values)


def _leaves(values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple) and all(isinstance(value, Tensor) for value in values):
        return list(values)
    return tree_leaves(values)


def _receive(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


@dataclass
class _Reference:
    """A saved view of a parameter (or of its autocast copy), to be taken anew from ``source`` in the backward."""

    source: Tensor
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class SavedParameters:
    """What autograd saves of some parameters: a reference to their current value, or a copy of the forward's.

    Args:
        parameters: they may be updated in place between a forward and its backward.
        stash_version: ``None`` to save references; for copies, tells the version of the weights to copy.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], stash_version: Callable[[], int] | None = None) -> None:
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._stash_version = stash_version
        self._copies: dict[int, tuple[int, Tensor]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """A context for the forward."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Reference | tuple[Tensor, int]:
        parameter = self._parameter_behind(tensor)
        if parameter is None:
            # Detached: a saved output that kept its own graph alive would never be freed.
            return tensor.detach(), tensor._version
        source = parameter.detach() if self._stash_version is None else self._copy(parameter, self._stash_version())
        return _Reference(source, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: _Reference | tuple[Tensor, int]) -> Tensor:
        if isinstance(saved, _Reference):
            return saved.source.to(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)
        tensor, version = saved
        if tensor._version != version:
            # autograd's own check, which tensors saved through hooks do not get
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} that the backward needs was changed in place by the forward. "
                "Use the out-of-place operation."
            )
        return tensor

    def _parameter_behind(self, tensor: Tensor) -> nn.Parameter | None:
        base = tensor if tensor._base is None else tensor._base
        if id(base) in self._parameters:
            return self._parameters[id(base)]
        cast = base.grad_fn
        if cast is not None and cast.name() == "ToCopyBackward0":
            leaf = getattr(cast.next_functions[0][0], "variable", None)
            return self._parameters.get(id(leaf))
        return None

    def _copy(self, parameter: nn.Parameter, version: int) -> Tensor:
        copied, copy = self._copies.get(id(parameter), (None, parameter))
        if copied != version:
            copy = parameter.detach().clone()
            self._copies[id(parameter)] = version, copy
        return copy
