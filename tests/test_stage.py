"""These tests check what a stage counts and holds."""

import pytest
from torch import nn

from aimc_pl.stage import Stage, StageInfo


def test_versions_seen_by_micro_batches_in_flight():
    """Check a stage whose backwards follow two micro-batches behind its forwards."""
    stage = Stage(1)
    seen = []
    for k in range(6):
        stage.take(k)
        assert stage.num_in_flight == min(k + 1, 3)
        if k >= 2:
            seen.append((stage.version, stage.release(k - 2)))
            stage.version += 1
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert stage.num_in_flight == 2


def test_clear_forgets_what_is_in_flight_and_keeps_the_version():
    stage = Stage(0)
    stage.take(0)
    stage.version = 3
    stage.clear()
    assert (stage.num_in_flight, stage.version) == (0, 3)
    with pytest.raises(KeyError):
        stage.release(0)


def test_stages_do_not_share_what_they_hold():
    first, second = Stage(0), Stage(1)
    layer = nn.Linear(2, 2)
    first.parameters.append(layer.weight)
    first.modules.append(layer)
    assert second.parameters == []
    assert second.modules == []
    given = [layer.weight]
    third = Stage(2, given, layer.modules())
    third.parameters.append(layer.bias)
    assert len(given) == 1
    assert third.modules == [layer]


def test_what_observers_are_told_does_not_change():
    layer = nn.Linear(2, 2)
    stage = Stage(1, [layer.weight], [layer])
    info = stage.info()
    stage.parameters.append(layer.bias)
    assert info == StageInfo(1, (layer.weight,), (layer,))
