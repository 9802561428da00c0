"""A search for all objects that code can reach from some objects.

It follows attributes, the contents of containers, and the variables that functions use.
"""

import random
import sys
import sysconfig
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from aimc_pl.attributes import CONTAINERS, PLAIN, contents_of

Named = tuple[str, Any]
"""A name, as the user writes it, and the object with that name."""

GENERATORS = (Generator, np.random.Generator, np.random.RandomState, random.Random)
"""The classes of random generators."""

_CLOSED = (ModuleType, Dataset, DataLoader, threading.Thread, BaseProcess, np.memmap)
_PACKAGES = {"site-packages", "dist-packages"}
_NOT_IN_THE_STEP = ("__init__", "setup", "prepare_data", "configure_model", "configure_optimizers")


@dataclass(frozen=True, eq=False)
class GlobalVariable:
    """A global variable of a Python module.

    Attributes:
        all: the global variables of the module.
        name: the name of this variable.
    """

    all: dict[str, Any]
    name: str


def reachable(roots: Iterable[Named], outside: Iterable[Any] = ()) -> Iterator[Named]:
    """Yield all objects that can be reached from some objects, each once with its name, and the nearest first.

    Data sets are left out, as they are large, and so are objects with threads of their own. The search enters classes
    and global variables of the user's code, but not those of installed packages.

    Args:
        roots: the objects where the search begins.
        outside: objects to leave out, with all that only they lead to.
    """
    todo = deque(roots)
    seen: dict[Any, Any] = {id(value): value for value in outside}
    while todo:
        name, value = todo.popleft()
        key = (id(value.all), value.name) if isinstance(value, GlobalVariable) else id(value)
        if type(value) in PLAIN or key in seen or _is_closed(value):
            continue
        seen[key] = value  # While it is held, no other object can have its id.
        yield name, value
        todo.extend(_inside(name, value))


def _inside(name: str, value: Any) -> Iterator[Named]:
    """Yield the objects to which an object refers directly, with their names."""
    if isinstance(value, GENERATORS):
        return
    if isinstance(value, Optimizer):
        yield f"{name}.param_groups", value.param_groups  # The step does not change the state.
        return
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", held) for key, held in dict.items(value))
    elif isinstance(value, CONTAINERS):
        yield from ((f"{name}.{number}", held) for number, held in enumerate(contents_of(value)))
    elif isinstance(value, nn.Module):
        held = (value.named_parameters(recurse=False), value.named_buffers(recurse=False), value.named_children())
        yield from ((joined(name, key), inner) for key, inner in chain(*held))
    elif isinstance(value, FunctionType):
        yield from zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, default) for default in value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).items()
        if is_own(value.__module__):
            names = [key for key in _names(value.__code__) if key in value.__globals__]
            yield from ((key, GlobalVariable(value.__globals__, key)) for key in names)
    elif isinstance(value, MethodType | BuiltinMethodType):
        yield from ((name, value.__self__), (name, getattr(value, "__func__", None)))
    elif isinstance(value, partial):
        yield from ((name, value.func), (name, value.args), (name, value.keywords))
    elif isinstance(value, type):
        yield from ((base.__name__, base) for base in value.__bases__)
    if not isinstance(value, type | Tensor):
        kind: Any = type(value)
        yield kind.__name__, kind
    for key, held in variables_of(value).items():
        if not isinstance(value, type) or not (key in _NOT_IN_THE_STEP or key.endswith("_dataloader")):
            yield joined(name, key), held
            if isinstance(held, staticmethod | classmethod):
                yield key, held.__func__
            elif isinstance(held, property):
                yield key, held.fget


def variables_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object or a class by name.

    The value of a global variable, or of a variable in a closure, is returned under the name ``""``.
    """
    if isinstance(value, CellType):
        try:
            return {"": value.cell_contents}
        except ValueError:  # The variable has not been bound yet.
            return {}
    if isinstance(value, GlobalVariable):
        return {"": value.all[value.name]} if value.name in value.all else {}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def joined(name: str, key: str) -> str:
    """Return the dotted name of an attribute, given the name of its object."""
    return ".".join(part for part in (name, str(key).strip("_")) if part)


@cache
def is_own(module: str | None) -> bool:
    """Return whether a Python module is the user's: neither installed, nor part of Python, nor of this package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return module == "__main__"
    installed = _PACKAGES.intersection(Path(file).parts) or file.startswith(sysconfig.get_path("stdlib"))
    return not installed and not _is_ours(module)


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == __name__.partition(".")[0]


def _is_closed(value: Any) -> bool:
    """Return whether the search leaves an object out."""
    if type(value) in weakref.ProxyTypes or isinstance(value, _CLOSED):
        return True
    if isinstance(value, Tensor):
        return hasattr(value, "analog_tile")  # It is the context of an analog tile.
    if isinstance(value, type):
        return not is_own(value.__module__)
    if isinstance(value, (nn.Module, GlobalVariable, *GENERATORS)):
        return False
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and (home.startswith("torch._") or _is_ours(home)):
        return True  # It is one of the compiler's caches, for example.
    return any(isinstance(held, threading.Thread | BaseProcess) for held in variables_of(value).values())


def _names(code: CodeType) -> list[str]:
    """Return the names to which code refers, including the code of functions defined inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for part in inner for name in _names(part))]
