"""What code can reach from some objects: their attributes, what containers hold, the variables that functions use."""

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
"""An object, and how the user writes it."""

GENERATORS = (Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Kinds of random generators."""

_CLOSED = (ModuleType, Dataset, DataLoader, threading.Thread, BaseProcess, np.memmap)
_PACKAGES = {"site-packages", "dist-packages"}
_NOT_IN_THE_STEP = ("__init__", "setup", "prepare_data", "configure_model", "configure_optimizers")


@dataclass(frozen=True, eq=False)
class GlobalVariable:
    """A global variable of a module."""

    all: dict[str, Any]
    name: str


def reachable(roots: Iterable[Named], outside: Iterable[Any] = ()) -> Iterator[Named]:
    """All objects that can be reached, each once, the nearest first.

    Data sets are left out, as they are large, and so are objects with threads of their own. Classes and global
    variables are looked into where the user's own code refers to them, and not those of installed packages.

    Args:
        roots: where to begin.
        outside: what to leave out.
    """
    todo = deque(roots)
    seen: dict[Any, Any] = {id(value): value for value in outside}
    while todo:
        name, value = todo.popleft()
        key = (id(value.all), value.name) if isinstance(value, GlobalVariable) else id(value)
        if type(value) in PLAIN or key in seen or _is_closed(value):
            continue
        seen[key] = value  # as long as it is held, nothing else has its id
        yield name, value
        todo.extend(_inside(name, value))


def _inside(name: str, value: Any) -> Iterator[Named]:
    """What is reached directly from an object."""
    if isinstance(value, GENERATORS):
        return
    if isinstance(value, Optimizer):
        yield f"{name}.param_groups", value.param_groups  # and not its state, which the step leaves alone
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
    """The attributes of an object or a class; under ``""`` a global variable, or that in a cell of a closure."""
    if isinstance(value, CellType):
        try:
            return {"": value.cell_contents}
        except ValueError:  # it has not been bound yet
            return {}
    if isinstance(value, GlobalVariable):
        return {"": value.all[value.name]} if value.name in value.all else {}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def joined(name: str, key: str) -> str:
    """The name of an attribute."""
    return ".".join(part for part in (name, str(key).strip("_")) if part)


@cache
def is_own(module: str | None) -> bool:
    """Whether a module, by its name, is the user's: neither installed nor of Python itself."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return module == "__main__"
    installed = _PACKAGES.intersection(Path(file).parts) or file.startswith(sysconfig.get_path("stdlib"))
    return not installed and not _is_ours(module)


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == __name__.partition(".")[0]


def _is_closed(value: Any) -> bool:
    """Whether nothing is to be seen inside."""
    if type(value) in weakref.ProxyTypes or isinstance(value, _CLOSED):
        return True
    if isinstance(value, Tensor):
        return hasattr(value, "analog_tile")  # the context of an analog tile
    if isinstance(value, type):
        return not is_own(value.__module__)
    if isinstance(value, (nn.Module, GlobalVariable, *GENERATORS)):
        return False
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and (home.startswith("torch._") or _is_ours(home)):
        return True  # the compiler's caches, for example
    return any(isinstance(held, threading.Thread | BaseProcess) for held in variables_of(value).values())


def _names(code: CodeType) -> list[str]:
    """The names that code refers to, that of functions inside it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for part in inner for name in _names(part))]
