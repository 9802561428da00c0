"""These tests count layers on crossbars that are called again, frozen, checkpointed or in mixed precision."""

import pytest
import torch
from aihwkit.nn import AnalogLinear, AnalogLinearMapped, AnalogLSTMCell, AnalogRNN
from aihwkit.simulator.configs import InferenceRPUConfig, SingleRPUConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from aimc_pl.cost import RASCH_2024, Learning, Matrix, Work, count_work, stage_cost
from aimc_pl.devices import convert_to_analog, get_device, soft_bounds
from aimc_pl.errors import UsageError


def analog(*layers, device="soft_bounds"):
    network = nn.Sequential(*layers)
    convert_to_analog(network, device)
    return network


def count(network, function):
    (work,) = count_work(network, function)
    return work


@pytest.mark.parametrize("device", ["soft_bounds", "residual_learning", "tiki_taka_v2", "mixed_precision"])
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_layer_that_is_called_again_has_one_crossbar_and_more_vectors(device, calls):
    network, batch, width = analog(nn.Linear(6, 6, bias=False), device=device), 4, 6
    x = torch.ones(batch, width)

    def step():
        h = x
        for _ in range(calls):
            h = network(h)
        return h.sum()

    work = count(network, step)
    (matrix,) = work.matrices
    # The first input needs no error.
    vectors, back = calls * batch, (calls - 1) * batch
    learning = matrix.learning
    assert matrix == Matrix("0", width, width, vectors, vectors * width, back, vectors, 0, learning)
    assert work.kept == calls * batch * width
    # It costs what one call with all vectors does.
    together = stage_cost(work, RASCH_2024, 2)
    once = count(network, lambda: network(torch.ones(calls * batch, width, requires_grad=True)).sum())
    (one,) = once.matrices
    assert one == Matrix("0", width, width, vectors, vectors * width, vectors, vectors, 0, learning)
    single = stage_cost(once, RASCH_2024, 2)
    assert together.num_tiles == single.num_tiles == learning.crossbars
    for part in ("update", "gradient", "pending", "deferred", "resident"):
        assert getattr(together, part) == getattr(single, part), part
    assert together.step == single.step


def test_layers_that_share_a_crossbar_are_one():
    network = analog(nn.Linear(6, 6, bias=False))
    network.append(network[0])
    work = count(network, lambda: network(torch.ones(3, 6)).sum())
    assert [(matrix.name, matrix.vectors) for matrix in work.matrices] == [("0", 6)]
    assert stage_cost(work, RASCH_2024).num_tiles == 1
    other = analog(nn.Linear(6, 6, bias=False))
    other[0].analog_module = network[0].analog_module
    both = nn.Sequential(network[0], other[0])
    assert count(both, lambda: both(torch.ones(3, 6)).sum()).matrices == work.matrices


def test_crossbars_in_several_stages_count_in_each():
    network = analog(nn.Linear(6, 6), nn.Tanh())
    network.append(network[0])
    first, second = count_work(network, lambda: network(torch.ones(3, 6)).sum(), ["1"])
    assert [matrix.vectors for work in (first, second) for matrix in work.matrices] == [3, 3]


@pytest.mark.parametrize("device", ["soft_bounds", "residual_learning", "mixed_precision"])
def test_frozen_layers_send_errors_and_no_pulses(device):
    network = analog(nn.Linear(5, 6), nn.Linear(6, 7), device=device)
    network[1].requires_grad_(False)
    work = count(network, lambda: network(torch.ones(4, 5)).sum())
    first, second = work.matrices
    assert (first.vectors_learning, first.vectors_back) == (4, 0)
    assert (second.vectors_learning, second.vectors_back, second.numbers_in) == (0, 4, 0)
    assert work.kept == 4 * 5  # the input of the layer that learns
    assert (work.parameters, work.trained) == (6 + 7, 6)  # the digital biases
    cost, other = (stage_cost(Work(matrices=[each]), RASCH_2024, 2) for each in (second, first))
    assert cost.update.energy == cost.step.energy == cost.gradient.energy == cost.pending == cost.deferred == 0
    assert cost.backward.joules["crossbars"] > 0
    assert other.update.energy + other.step.energy > 0


def test_layers_without_gradients_only_multiply():
    network = analog(nn.Linear(5, 6), nn.Linear(6, 7))

    def step():
        with torch.no_grad():
            x = network[0](torch.ones(4, 5))
        return network[1](x).sum()

    work = count(network, step)
    first, second = work.matrices
    assert (first.vectors, first.vectors_learning, first.vectors_back) == (4, 0, 0)
    assert (second.vectors, second.vectors_learning, second.vectors_back) == (4, 4, 0)
    assert work.kept == 4 * 6


class Region(torch.autograd.Function):
    """A region that a user's own function computes without gradients."""

    @staticmethod
    def forward(ctx, network, x, weight):
        return network(x)


def test_layers_in_a_custom_function_learn():
    network = analog(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7))
    learning = next(network.parameters())
    inside = count(network, lambda: Region.apply(network, torch.ones(4, 5), learning).sum())
    plain = count(network, lambda: network(torch.ones(4, 5)).sum())
    assert inside.matrices == plain.matrices
    assert inside.backward_flops == plain.backward_flops


@pytest.mark.parametrize("reentrant", [False, True])
def test_products_of_a_checkpointed_region_are_made_again(reentrant):
    network = analog(nn.Linear(5, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))

    def step():
        x = network[0](torch.ones(4, 5))
        return checkpoint(network[1:], x, use_reentrant=reentrant).sum()

    work = count(network, step)
    assert [matrix.vectors_again for matrix in work.matrices] == [0, 4, 4]
    assert [matrix.vectors for matrix in work.matrices] == [4, 4, 4]
    assert [matrix.vectors_learning for matrix in work.matrices] == [4, 4, 4]
    assert [matrix.vectors_back for matrix in work.matrices] == [0, 4, 4]
    assert work.kept == 4 * (5 + 6)  # the inputs of the first layer and of the region
    plain = count(network, lambda: network(torch.ones(4, 5)).sum())
    assert work.backward_flops == plain.backward_flops + 4 * (7 + 7 + 3)  # the biases and the activation again
    costs = [stage_cost(each, RASCH_2024) for each in (work, plain)]
    assert costs[0].backward.seconds - costs[1].backward.seconds == pytest.approx(2 * 4 * 40e-9 + 4 * 17 / 0.7e12)
    assert costs[0].forward == costs[1].forward


@pytest.mark.parametrize("bias", [False, True])
def test_mixed_precision_has_a_digital_bias_only_if_it_has_one(bias):
    network = analog(nn.Linear(5, 6, bias=bias), device="mixed_precision")
    work = count(network, lambda: network(torch.ones(4, 5)).sum())
    outputs = 4 * 6
    assert work.forward_flops == work.backward_flops == outputs * (1 + bias)  # the sum, and the bias
    assert work.parameters == work.trained == 6 * bias


@pytest.mark.parametrize("states", [0, 1, 2])
def test_an_optimizer_keeps_numbers_for_weights_in_mixed_precision(states):
    network = analog(nn.Linear(5, 6, bias=False), device="mixed_precision")
    work = count(network, lambda: network(torch.ones(4, 5)).sum())
    cost, plain = stage_cost(work, RASCH_2024, states), stage_cost(work, RASCH_2024)
    assert cost.resident == 32 * 30 * states
    assert cost.step.seconds - plain.step.seconds == pytest.approx(5 * 30 * states / 0.7e12)


def test_an_analog_bias_is_a_column():
    config = SingleRPUConfig()
    config.mapping.digital_bias = False
    network = nn.Sequential(AnalogLinear(5, 6, rpu_config=config))
    work = count(network, lambda: network(torch.ones(4, 5)).sum())
    assert [(matrix.columns, matrix.rows) for matrix in work.matrices] == [(6, 6)]
    assert work.parameters == 0


@pytest.mark.parametrize("columns", [500, 1100])
def test_arrays_of_tiles_are_one_matrix(columns):
    """Check aihwkit's arrays, whose tiles are of other sizes than those of the hardware."""
    config = SingleRPUConfig()
    config.mapping.max_input_size = config.mapping.max_output_size = 300
    network = nn.Sequential(AnalogLinearMapped(columns, 700, rpu_config=config))
    work = count(network, lambda: network(torch.ones(2, columns)).sum())
    assert work.matrices == [Matrix("0", 700, columns, 2, 2 * columns, 0, 2, 0, Learning())]
    assert work.forward_flops == 2 * 700 * 2  # the bias and the sum
    assert work.kept == 2 * columns
    assert stage_cost(work, RASCH_2024).num_tiles == 2 * (1 if columns == 500 else 3)


def test_an_analog_lstm_learns_from_every_step():
    length, batch, size, hidden = 5, 3, 4, 6
    network = nn.ModuleList([AnalogRNN(AnalogLSTMCell, size, hidden, rpu_config=get_device("soft_bounds"))])
    work = count(network, lambda: network[0](torch.ones(length, batch, size))[0].sum())
    inner = {matrix.columns: matrix for matrix in work.matrices}
    for columns, back in ((size, 0), (hidden, (length - 1) * batch)):
        assert (inner[columns].rows, inner[columns].vectors) == (4 * hidden, length * batch)
        assert (inner[columns].vectors_back, inner[columns].vectors_learning) == (back, length * batch)
    assert stage_cost(work, RASCH_2024).num_tiles == 2
    assert work.gradient_flops == 0


def test_tiles_for_inference_are_refused():
    network = nn.Sequential(AnalogLinear(5, 6, rpu_config=InferenceRPUConfig()))
    with pytest.raises(UsageError, match="tiles for inference") as refused:
        count(network, lambda: network(torch.ones(4, 5)).sum())
    assert len(str(refused.value)) <= 200
    network.requires_grad_(False)
    assert count(network, lambda: network[0](x_input=torch.ones(4, 5)).sum()).matrices[0].vectors == 4


def test_no_part_begins_within_a_layer_on_several_tiles():
    network = nn.Sequential(nn.Linear(1300, 8, bias=False), nn.Linear(8, 2, bias=False))
    convert_to_analog(network, {"0": soft_bounds()})
    with pytest.raises(UsageError, match=r"'0\.analog_module\.array\.1\.0'"):
        count_work(network, lambda: network(torch.randn(3, 1300)).sum(), ["0.analog_module.array.1.0"])
