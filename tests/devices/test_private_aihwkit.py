"""These tests check that private names of aihwkit, which this project uses, still behave as it needs."""

import copy

import torch
from aihwkit.nn import AnalogLinear
from aihwkit.nn.conversion import convert_to_digital
from aihwkit.simulator.tiles.base import SimulatorTileWrapper
from torch import nn

from aimc_pl.devices import ideal, soft_bounds
from aimc_pl.devices.private_aihwkit import RecreatedQuietly, convert_to_digital_too


def test_convert_to_digital_too():
    class Own(AnalogLinear):
        pass

    def digital():
        layer = AnalogLinear(3, 2, rpu_config=ideal().rpu_config)
        layer.__class__ = Own
        return convert_to_digital(nn.Sequential(layer))[0]

    assert type(digital()) is Own
    convert_to_digital_too([Own])
    assert type(digital()) is nn.Linear


def test_tiles_are_recreated_by_the_method_that_we_override():
    calls = []

    class Tile:
        def _recreate_simulator_tile(self, x_size, d_size, rpu_config):
            torch.rand(1)
            calls.append((x_size, d_size, rpu_config))
            return "tile"

    class Quiet(RecreatedQuietly, Tile):
        pass

    state = torch.get_rng_state()
    assert Quiet()._recreate_simulator_tile(1, 2, None) == "tile"
    assert calls == [(1, 2, None)]
    assert torch.equal(torch.get_rng_state(), state)
    assert callable(SimulatorTileWrapper._recreate_simulator_tile)


def test_a_copy_of_a_mean_field_layer_draws_nothing():
    layer = AnalogLinear(3, 2, rpu_config=soft_bounds().rpu_config)
    state = torch.get_rng_state()
    copy.deepcopy(layer)
    assert torch.equal(torch.get_rng_state(), state)
