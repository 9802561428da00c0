"""Pipeline parallelism for PyTorch Lightning over analog in-memory computing accelerators.

``aimc_pl.strategies`` has the Lightning strategy, ``aimc_pl.callbacks`` the callbacks, ``aimc_pl.devices`` the analog
devices; ``aimc_pl.schedule``, ``aimc_pl.partition``, ``aimc_pl.stage`` and ``aimc_pl.pipeline`` are the core.
"""
