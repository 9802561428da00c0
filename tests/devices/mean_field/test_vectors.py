"""These tests compare convolutions on crossbars with torch's own convolutions and unfolding."""

from itertools import pairwise

import pytest
import torch
from aihwkit.nn import AnalogConv1d, AnalogConv2d, AnalogConv3d
from torch import nn
from torch.nn import functional as F

from aimc_pl.devices.mean_field.vectors import Convolution, Gathered, Patches, Vectors

SHAPES = {
    "3x3": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 7)),
    "strided": (nn.Conv2d(4, 2, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "5x2": (nn.Conv2d(2, 3, (5, 2), stride=(1, 3), padding=(2, 0)), (2, 2, 6, 11)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 2, 7, 9)),
    "1x1": (nn.Conv2d(6, 4, 1, stride=2), (2, 6, 5, 5)),
    "more padding than image": (nn.Conv2d(2, 2, 3, padding=1), (2, 2, 1, 1)),
    "1d": (nn.Conv1d(3, 4, 5, stride=2, padding=2), (2, 3, 12)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 2), padding=(1, 1, 0)), (2, 2, 3, 4, 5)),
}


def made(name):
    torch.manual_seed(0)
    layer, shape = SHAPES[name]
    layer = layer.double()
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    convolution = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return layer, images, convolution


@pytest.mark.parametrize("name", SHAPES)
def test_products_are_the_convolution_and_its_gradients(name):
    layer, images, convolution = made(name)
    out = layer(images) - layer.bias.view(-1, *[1] * (images.dim() - 2))
    error = torch.randn_like(out)
    of_images, of_weight = torch.autograd.grad(out, (images, layer.weight), error)
    weight = layer.weight.flatten(1)
    with torch.no_grad():
        for patches in (convolution, convolution.part(0, weight.shape[1])):
            assert list(patches.out_size(images)) == list(out.shape[2:])
            for kind in (type(patches), Patches):
                torch.testing.assert_close(kind.multiply(patches, weight, images), out)
                torch.testing.assert_close(kind.multiply_transposed(patches, weight, error, images), of_images)
                torch.testing.assert_close(kind.outer(patches, error, images), of_weight.flatten(1))
                weights = error[:, :1]
                expected = (patches.columns(images) ** 2 * weights.flatten(2)).sum()
                torch.testing.assert_close(kind.weighted_squares(patches, weights, images), expected)
                expected = patches.columns(images).abs().amax(1, keepdim=True).unflatten(2, out.shape[2:])
                torch.testing.assert_close(kind.largest(patches, images.abs()), expected)


@pytest.mark.parametrize("name", ["3x3", "strided", "dilated"])
def test_errors_have_the_layout_of_the_images(name):
    """Check that a network in channels_last stays in it, since mixed layouts are slow."""
    layer, images, convolution = made(name)
    images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = layer(images)
    error = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, images, error)
    ours = convolution.multiply_transposed(layer.weight.detach().flatten(1), error, images.detach())
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert not expected.is_contiguous()


@pytest.mark.parametrize("name", [name for name, (layer, _) in SHAPES.items() if isinstance(layer, nn.Conv2d)])
def test_columns_are_torchs_unfolding_times_a_gain(name):
    layer, images, convolution = made(name)
    expected = F.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    gain = torch.rand(len(images), 1, *convolution.out_size(images), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(convolution.columns(images), expected)
        torch.testing.assert_close(convolution.columns(images, gain), expected * gain.flatten(2))


@pytest.mark.parametrize("name", SHAPES)
def test_spread_is_the_fold_of_equal_elements(name):
    _, images, convolution = made(name)
    values = torch.rand(len(images), 1, *convolution.out_size(images), dtype=torch.float64)
    one_channel = images[:, :1].detach()
    elements = convolution.columns(one_channel).shape[1]
    expected = convolution.fold(values.flatten(2).expand(-1, elements, -1), one_channel)
    torch.testing.assert_close(convolution.spread(values, images), expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [1, 2, 5])
def test_parts_make_up_the_whole(name, cuts):
    layer, images, convolution = made(name)
    images = images.detach()
    weight = layer.weight.detach().flatten(1)
    bounds = sorted({round(i * weight.shape[1] / (cuts + 1)) for i in range(cuts + 2)})
    parts = [(convolution.part(a, b), slice(a, b)) for a, b in pairwise(bounds)]
    out = convolution.multiply(weight, images)
    error = torch.randn_like(out)
    torch.testing.assert_close(sum(p.multiply(weight[:, cut], images) for p, cut in parts), out)
    back = sum(p.multiply_transposed(weight[:, cut], error, images) for p, cut in parts)
    torch.testing.assert_close(back, convolution.multiply_transposed(weight, error, images))
    torch.testing.assert_close(
        torch.cat([p.outer(error, images) for p, _ in parts], 1), convolution.outer(error, images)
    )
    whole = convolution.weighted_squares(error[:, :1], images)
    torch.testing.assert_close(sum(p.weighted_squares(error[:, :1], images) for p, _ in parts), whole)
    largest = torch.cat([p.largest(images.abs()) for p, _ in parts], 1).amax(1, keepdim=True)
    torch.testing.assert_close(largest, convolution.largest(images.abs()))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(AnalogConv1d, (2, 3, 9)), (AnalogConv2d, (2, 3, 6, 7)), (AnalogConv3d, (2, 3, 4, 5, 3))],
)
def test_aihwkits_tables_of_indices_give_the_same_patches(kind, shape):
    layer = kind(3, 4, 3, stride=2, padding=1)
    images = torch.randn(shape, dtype=torch.float64)
    indices, sizes, _ = layer._calculate_indexes(images, 3)
    gathered = Gathered(indices, tuple(sizes))
    convolution = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    assert list(gathered.out_size(images)) == list(convolution.out_size(images))
    torch.testing.assert_close(gathered.columns(images), convolution.columns(images))
    part = gathered.part(4, 20)
    torch.testing.assert_close(part.columns(images), convolution.columns(images)[:, 4:20])


def test_rows_and_columns_are_the_same_vectors():
    x, error, weight = torch.randn(4, 6, 5), torch.randn(4, 6, 3), torch.randn(3, 5)
    rows, columns = Vectors(-1), Vectors(1)
    torch.testing.assert_close(rows.multiply(weight, x).mT, columns.multiply(weight, x.mT))
    torch.testing.assert_close(rows.outer(error, x), columns.outer(error.mT, x.mT))
    torch.testing.assert_close(rows.outer(error, x), torch.einsum("bno,bni->oi", error, x))
    torch.testing.assert_close(rows.largest(x.abs()).mT, columns.largest(x.abs().mT))
