"""Pipeline parallelism for PyTorch Lightning over analog in-memory computing accelerators.

``aimc_pl.strategies`` has the Lightning strategy, ``aimc_pl.callbacks`` the callbacks, ``aimc_pl.devices`` the analog
devices; ``aimc_pl.schedule``, ``aimc_pl.flight``, ``aimc_pl.graph`` and ``aimc_pl.pipeline`` are the core.
"""
