"""What runs of a step change, and how to put it back."""

import copy
from collections.abc import Iterator
from itertools import tee
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aimc_pl.analog import is_analog, reset_pending_updates
from aimc_pl.attributes import Attributes, Contents, Place, arrays_in


class Traces:
    """What runs of a step may change: tensors and arrays in place, attributes, gradients, the batch, iterators.

    Iterators that modules hold become copies that give the same.

    Args:
        network: all modules that the step calls.
        inputs: what it is given.
    """

    def __init__(self, network: nn.Module, inputs: Any = None) -> None:
        self._network = network
        held = [(vars(module), name) for module in network.modules() for name in vars(module)]
        self._holders = [(values, name, id(values[name])) for values, name in held if _is_iterator(values[name])]
        # One for all modules that hold the same.
        self._iterators = {key: tee(values[name], 1)[0] for values, name, key in self._holders}
        self._rewind()
        self._attributes = Attributes(network, deep=True)
        self._before = self._attributes.read()
        self._inputs = Contents(inputs)
        self._input_arrays = set(map(id, self._inputs.tensors()))
        arrays = [*network.parameters(), *network.buffers(), *arrays_in(self._before), *self._inputs.tensors()]
        arrays = {id(array): array for array in arrays}.values()  # a buffer is among the attributes too
        self._arrays = [array for array in arrays if isinstance(array, np.ndarray) or _has_value(array)]
        with torch.no_grad():
            self._values = [array.clone() if isinstance(array, Tensor) else array.copy() for array in self._arrays]
        self._watched = range(len(self._arrays))
        self._gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
        contexts: list[Any] = [parameter for parameter in network.parameters() if is_analog(parameter)]
        self._pending = [(context, context.analog_input, context.analog_grad_output) for context in contexts]

    def clear_gradients(self) -> None:
        """Forget what the runs' backwards have left."""
        for parameter, _ in self._gradients:
            parameter.grad = None
        reset_pending_updates(self._network)

    def undo(self) -> None:
        """Put everything back."""
        changes = self.changed()
        for change in changes:
            self.undo_one(change)
        # To compare all weights takes as long as a small step: those that the first run leaves alone are trusted.
        weights = set(map(id, self._network.parameters()))
        self._watched = [k for k in self._watched if k in changes or id(self._arrays[k]) not in weights]
        self.undo_inputs()
        self._rewind()
        self.clear_gradients()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for context, inputs, errors in self._pending:
            context.analog_input, context.analog_grad_output = inputs, errors

    def undo_inputs(self) -> None:
        """Put the batch back."""
        self._inputs.put_back()
        for number in self._watched:
            array = self._arrays[number]
            if id(array) in self._input_arrays and not _is_same(array, self._values[number]):
                self.undo_one(number)

    def changed(self) -> list[Place | int]:
        """The attributes that have changed, and the numbers of arrays."""
        arrays = [number for number in self._watched if not _is_same(self._arrays[number], self._values[number])]
        return [*self._attributes.changes(self._before), *arrays]

    def undo_one(self, change: Place | int) -> None:
        """Put one of :meth:`changed` back."""
        if not isinstance(change, int):
            self._attributes.write(self._attributes.select(self._before, [change]))
            return
        array, value = self._arrays[change], self._values[change]
        if isinstance(array, Tensor):
            with torch.no_grad():
                array.copy_(value)  # pyright: ignore[reportArgumentType], both are tensors
        else:
            np.copyto(array, value)  # pyright: ignore[reportArgumentType], both are arrays

    def describe(self, change: Place | int) -> str:
        """One of :meth:`changed` in words."""
        if not isinstance(change, int):
            return repr(self._attributes.name(change))
        named = [*self._network.named_parameters(), *self._network.named_buffers()]
        array = self._arrays[change]
        return next((repr(name) for name, value in named if value is array), "a tensor or array kept on a module")

    def _rewind(self) -> None:
        copies = {key: copy.copy(iterator) for key, iterator in self._iterators.items()}
        for values, name, key in self._holders:
            values[name] = copies[key]


def _is_iterator(value: Any) -> bool:
    """Of Python itself: a generator, a zip, a count."""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


def _has_value(tensor: Tensor) -> bool:
    # Not the contexts of analog tiles, nor what a run has left with its graph.
    return tensor.is_leaf and not is_analog(tensor)


def _is_same(array: Any, value: Any) -> bool:
    return torch.equal(array, value) if isinstance(array, Tensor) else np.array_equal(array, value)
