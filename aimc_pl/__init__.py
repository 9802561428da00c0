"""This package trains PyTorch Lightning modules in pipelines of analog in-memory computing accelerators.

``aimc_pl.strategies`` has the Lightning strategy, ``aimc_pl.callbacks`` the callbacks, and ``aimc_pl.devices`` the
analog devices. The core is in ``aimc_pl.schedule``, ``aimc_pl.flight``, ``aimc_pl.graph`` and ``aimc_pl.pipeline``.
"""
