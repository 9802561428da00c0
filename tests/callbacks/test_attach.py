"""These tests check how callbacks find the strategy, and gather values from all processes."""

from types import SimpleNamespace

import pytest

from aimc_pl.callbacks.attach import gathered, get_strategy
from aimc_pl.errors import UsageError


def test_a_trainer_of_the_other_package_is_told_apart():
    other = type("Trainer", (), {"strategy": None, "__module__": "pytorch_lightning.trainer.trainer"})
    with pytest.raises(UsageError, match="in the place of 'import pytorch_lightning as pl'"):
        get_strategy(None, other())
    with pytest.raises(UsageError, match="NoneType needs a pipeline, but the strategy is NoneType"):
        get_strategy(None, SimpleNamespace(strategy=None))


def test_values_of_all_processes_are_gathered():
    callback = SimpleNamespace(_strategy=SimpleNamespace(gather=lambda own: [own, "of rank 1"]))
    assert gathered(callback, "of rank 0") == ["of rank 0", "of rank 1"]
    # A callback that has not been attached yet does not know the other processes.
    assert gathered(SimpleNamespace(), "of rank 0") == ["of rank 0"]
