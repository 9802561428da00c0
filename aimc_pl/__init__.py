"""This package trains PyTorch Lightning modules in pipelines of analog in-memory computing accelerators.

``aimc_pl.strategies`` has the Lightning strategy, ``aimc_pl.callbacks`` the callbacks, and ``aimc_pl.devices`` the
analog devices. The core is in ``aimc_pl.schedule``, ``aimc_pl.flight``, ``aimc_pl.graph`` and ``aimc_pl.pipeline``.
``aimc_pl.history`` and ``aimc_pl.compare`` are those of :mod:`aimc_pl.runs`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aimc_pl.quiet import quiet_lightning

if TYPE_CHECKING:
    from aimc_pl.runs import compare, history

__all__ = ["compare", "history"]

quiet_lightning()


def __getattr__(name: str) -> Any:
    # An import with the package would slow down every command.
    if name in __all__:
        return getattr(import_module("aimc_pl.runs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
