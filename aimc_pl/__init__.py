"""This package trains PyTorch Lightning modules in pipelines of analog in-memory computing accelerators.

``aimc_pl.strategies`` has the Lightning strategy, ``aimc_pl.callbacks`` the callbacks, and ``aimc_pl.devices`` the
analog devices. The core is in ``aimc_pl.schedule``, ``aimc_pl.flight``, ``aimc_pl.graph`` and ``aimc_pl.pipeline``.
``aimc_pl.history`` is :func:`aimc_pl.runs.history`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimc_pl.runs import history

__all__ = ["history"]


def __getattr__(name: str) -> Any:
    # An import with the package would slow down every command.
    if name == "history":
        from aimc_pl.runs import history

        return history
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
