"""This module lists the settings of the process that a step may have switched when it is suspended.

A context manager that the step has entered, for example, may have switched one.
"""

import asyncio
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends import cudnn, mkldnn

from aimc_pl.private_torch import (
    dual_level,
    sdpa_backends,
    set_sdpa_backends,
    set_why_no_saved_tensor_hooks,
    why_no_saved_tensor_hooks,
)


@dataclass(frozen=True, eq=False)
class Switch:
    """A setting of the whole process.

    Attributes:
        name: the name that the user knows.
        read: returns the value.
        write: sets the value; ``None`` if the setting cannot be set aside while a step waits.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any] | None = None

    def set(self, value: Any) -> None:
        """Set the value. The setting must have a ``write``."""
        assert self.write is not None
        self.write(value)


def switches_for(network: nn.Module) -> list[Switch]:
    """Return settings of torch and Python, functions that a step could patch, and locks that it could hold.

    The functions (and classes) are those of ``torch``, of ``torch.nn.functional``, and of the Python modules in which
    the network's classes are written. The locks are those that these Python modules, the network's modules and their
    attributes hold.

    Args:
        network: contains all modules that the step calls.
    """
    types = {kind for module in network.modules() for kind in type(module).__mro__}
    written_in = {id(there): there for kind in types if (there := sys.modules.get(kind.__module__))}
    namespaces = [*({id(torch): torch, id(F): F} | written_in).values()]
    return [*_SETTINGS, *_functions(namespaces), *_locks(network, namespaces)]


def _functions(namespaces: list[ModuleType]) -> Iterator[Switch]:
    for namespace in namespaces:
        for name, value in vars(namespace).items():
            if isinstance(value, FunctionType | BuiltinFunctionType | type):
                read, write = partial(vars(namespace).get, name), partial(setattr, namespace, name)
                yield Switch(f"{namespace.__name__}.{name}", read, write)


def _locks(network: nn.Module, namespaces: list[ModuleType]) -> Iterator[Switch]:
    held = [(f"{path}.{name}".lstrip("."), value) for path, m in network.named_modules() for name, value in _held_by(m)]
    held += [(f"{path}.{name}", inner) for path, value in held for name, inner in _held_by(value)]
    held += [(f"{there.__name__}.{name}", value) for there in namespaces for name, value in _held_by(there)]
    for name, value in held:
        if isinstance(value, _Lock):
            yield Switch(f"the lock {name!r}", value.locked)


def _held_by(value: Any) -> list[tuple[str, Any]]:
    return [*vars(value).items()] if hasattr(value, "__dict__") and not isinstance(value, type) else []


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_Lock = type(threading.Lock())

_SETTINGS = [
    Switch("sys.stdout", lambda: sys.stdout, partial(setattr, sys, "stdout")),
    Switch("sys.stderr", lambda: sys.stderr, partial(setattr, sys, "stderr")),
    Switch("warnings.filters", lambda: warnings.filters, partial(setattr, warnings, "filters")),
    Switch("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads),
    Switch(
        "torch.autograd.set_detect_anomaly",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda modes: torch.autograd.set_detect_anomaly(*modes),
    ),
    Switch(
        "torch.use_deterministic_algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    Switch("torch.backends.mkldnn", lambda: mkldnn.enabled, partial(setattr, mkldnn, "enabled")),
    Switch("torch.backends.cudnn", lambda: cudnn.enabled, partial(setattr, cudnn, "enabled")),
    Switch("torch.backends.cudnn.benchmark", lambda: cudnn.benchmark, partial(setattr, cudnn, "benchmark")),
    Switch("torch.backends.cudnn.deterministic", lambda: cudnn.deterministic, partial(setattr, cudnn, "deterministic")),
    Switch("torch.nn.attention.sdpa_kernel", sdpa_backends, set_sdpa_backends),
    Switch(
        "torch.autograd.graph.disable_saved_tensors_hooks", why_no_saved_tensor_hooks, set_why_no_saved_tensor_hooks
    ),
    Switch("torch.autograd.forward_ad.dual_level", dual_level),
    Switch("the event loop of asyncio.run", _running_loop),
]
