"""A record of everything that runs of a training step may change, with which the changes are found and undone."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aimc_pl.analog import is_analog, reset_pending_updates
from aimc_pl.attributes import CONTAINERS, contents_of, fill
from aimc_pl.private_torch import hooks_of, set_hooks
from aimc_pl.reachable import GENERATORS, GlobalVariable, Named, joined, reachable, variables_of

Change = tuple[int, str]
"""The number of an object in the record, and the name of its variable that has changed."""

_MISSING = object()


class Traces:
    """Everything that runs of a step may change: all objects that its modules refer to, gradients, and the batch.

    Iterators of Python that modules hold are replaced by copies that yield the same values and can be rewound.

    Args:
        network: the module that contains all modules that the step calls.
        inputs: the inputs of the step.
        beside: other objects that the step can reach, by name: optimizers and their schedulers, for example.
        outside: objects that the step can reach, and that are neither searched for changes nor put back.
    """

    def __init__(
        self, network: nn.Module, inputs: Any = None, beside: Sequence[Named] = (), outside: Sequence[Any] = ()
    ) -> None:
        self._network = network
        held = [(vars(module), name) for module in network.modules() for name in vars(module)]
        self._holders = [(values, name, id(values[name])) for values, name in held if _is_iterator(values[name])]
        # Modules that hold the same iterator share one copy.
        self._iterators = {key: tee(values[name], 1)[0] for values, name, key in self._holders}
        self._rewind()
        found = [*reachable([("", network), *beside], outside)]
        self.generators = [value for _, value in found if isinstance(value, GENERATORS)]
        """The random generators that the step can reach."""
        self._kept = _saved(found)
        self._inputs = _saved(reachable([("batch", inputs)], [*outside, *(value for _, value in found)]))
        self._watched = range(len(self._kept))
        self._gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
        contexts: list[Any] = [parameter for parameter in network.parameters() if is_analog(parameter)]
        self._pending = [(context, context.analog_input, context.analog_grad_output) for context in contexts]

    def clear_gradients(self) -> None:
        """Clear the gradients, and the pending updates of analog tiles, that backwards have left."""
        for parameter, _ in self._gradients:
            parameter.grad = None
        reset_pending_updates(self._network)

    def undo(self) -> None:
        """Put everything back as it was when this record was made."""
        changes = self.changed()
        for change in changes:
            self.undo_one(change)
        # Comparing all weights takes as long as a small step. Parameters that the first run leaves alone are trusted.
        changed = {number for number, _ in changes}
        self._watched = [k for k in self._watched if k in changed or not self._kept[k].is_parameter]
        self.undo_inputs()
        self._rewind()
        self.clear_gradients()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for context, inputs, errors in self._pending:
            context.analog_input, context.analog_grad_output = inputs, errors

    def undo_inputs(self) -> None:
        """Put the batch back as it was when this record was made."""
        for saved in self._inputs:
            for variable in saved.changes():
                saved.put_back(variable)

    def changed(self) -> list[Change]:
        """Return what has changed since this record was made, other than the batch and gradients."""
        return [(number, variable) for number in self._watched for variable in self._kept[number].changes()]

    def undo_one(self, change: Change) -> None:
        """Put back one of the changes that :meth:`changed` has returned."""
        number, variable = change
        self._kept[number].put_back(variable)

    def describe(self, change: Change) -> str:
        """Return the quoted name of a change that :meth:`changed` has returned, for messages."""
        number, variable = change
        return repr(joined(self._kept[number].name, variable))

    def _rewind(self) -> None:
        copies = {key: copy.copy(iterator) for key, iterator in self._iterators.items()}
        for values, name, key in self._holders:
            values[name] = copies[key]


class _Saved:
    """An object that can change, and a record of its state."""

    is_parameter = False

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self._value = value

    def changes(self) -> list[str]:
        """Return the names of the variables that have changed; the name ``""`` stands for the whole object."""
        return [] if self._is_as_before() else [""]

    def put_back(self, variable: str) -> None:
        """Put back one of the variables that :meth:`changes` has named."""
        raise NotImplementedError

    def _is_as_before(self) -> bool:
        raise NotImplementedError


class _Variables(_Saved):
    """The attributes of an object or a class, a global variable, or a variable of a closure."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name, value)
        self._before = self._read()

    def changes(self) -> list[str]:
        now, before = self._read(), self._before
        names = [name for name in before | now if before.get(name, _MISSING) is not now.get(name, _MISSING)]
        return [name for name in names if not _is_iterator(before.get(name)) or not _is_iterator(now.get(name))]

    def put_back(self, variable: str) -> None:
        value, before = self._value, self._before.get(variable, _MISSING)
        if variable == "__class__":
            value.__class__ = before
        elif isinstance(value, CellType):
            value.cell_contents = before
        elif isinstance(value, type):
            delattr(value, variable) if before is _MISSING else setattr(value, variable, before)
        else:
            is_global = isinstance(value, GlobalVariable)
            values, key = (value.all, value.name) if is_global else (vars(value), variable)
            values.pop(key, None)
            if before is not _MISSING:
                values[key] = before

    def _read(self) -> dict[str, Any]:
        kind = (
            {}
            if isinstance(self._value, CellType | GlobalVariable | type | Tensor)
            else {"__class__": type(self._value)}
        )
        return variables_of(self._value) | kind


class _Contents(_Saved):
    """The contents of a list, dict, set or deque."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name, value)
        self._before = contents_of(value)

    def put_back(self, variable: str) -> None:
        fill(self._value, self._before)

    def _is_as_before(self) -> bool:
        now = contents_of(self._value)
        return len(now) == len(self._before) and all(a is b for a, b in zip(now, self._before, strict=True))


class _Tensor(_Saved):
    """The values, shape, ``requires_grad`` and hooks of a tensor. A lazy tensor has no values yet."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__(name, value)
        self.is_parameter = isinstance(value, nn.Parameter)
        self._kind = type(value)
        self._before = None if is_lazy(value) else value.detach().clone()
        self._flag, self._hooks = value.requires_grad, hooks_of(value)

    def put_back(self, variable: str) -> None:
        tensor = self._value
        set_hooks(tensor, self._hooks)
        if self._before is None:
            tensor.data = tensor.data.new_empty(0)
            tensor.__class__ = self._kind
        elif self._is_another_shape():
            tensor.data = self._before.clone()
        elif not _are_equal(tensor, self._before):
            with torch.no_grad():
                tensor.copy_(self._before)
        if tensor.requires_grad != self._flag:
            tensor.requires_grad_(self._flag)

    def _is_as_before(self) -> bool:
        tensor = self._value
        if tensor.requires_grad != self._flag or hooks_of(tensor) != self._hooks:
            return False
        if self._before is None:
            return type(tensor) is self._kind
        return not self._is_another_shape() and _are_equal(tensor, self._before)

    def _is_another_shape(self) -> bool:
        assert self._before is not None
        return (self._value.shape, self._value.dtype) != (self._before.shape, self._before.dtype)


class _Array(_Saved):
    """The values of a NumPy array."""

    def __init__(self, name: str, value: np.ndarray[Any, Any]) -> None:
        super().__init__(name, value)
        self._before = value.copy()

    def put_back(self, variable: str) -> None:
        np.copyto(self._value, self._before)

    def _is_as_before(self) -> bool:
        return np.array_equal(self._value, self._before, equal_nan=self._before.dtype.kind in "fc")


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of the same shape hold the same values, where NaN equals NaN."""
    return torch.equal(a, b) or (not a.isfinite().all() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _saved(found: Iterable[Named]) -> list[_Saved]:
    saved: list[_Saved] = []
    for name, value in found:
        if isinstance(value, GENERATORS):
            continue
        if isinstance(value, Tensor):
            if value.is_leaf and value.layout == torch.strided:  # Others are left over from a run.
                saved.append(_Tensor(name, value))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not value.dtype.hasobject:
                saved.append(_Array(name, value))
        elif isinstance(value, CONTAINERS) and not isinstance(value, tuple):
            saved.append(_Contents(name, value))
        if hasattr(value, "__dict__") or isinstance(value, CellType | GlobalVariable):
            saved.append(_Variables(name, value))
    return saved


def _is_iterator(value: Any) -> bool:
    """Return whether a value is an iterator of Python itself, such as a generator, a zip or a count."""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
