"""This test checks how callbacks gather values from all processes."""

from types import SimpleNamespace

from aimc_pl.callbacks.attach import gathered


def test_values_of_all_processes_are_gathered():
    callback = SimpleNamespace(_strategy=SimpleNamespace(gather=lambda own: [own, "of rank 1"]))
    assert gathered(callback, "of rank 0") == ["of rank 0", "of rank 1"]
    # A callback that has not been attached yet does not know the other processes.
    assert gathered(SimpleNamespace(), "of rank 0") == ["of rank 0"]
