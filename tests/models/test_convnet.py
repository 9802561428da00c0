"""These tests check the convolutional network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aimc_pl.errors import UsageError
from aimc_pl.models import ConvNet


def convolve(x, convolution, norm, pool):
    x = F.conv2d(x, convolution.weight, padding=1)
    x = F.max_pool2d(x, 2) if pool else x
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("widths", [(4,), (4, 6, 5)])
def test_stem_groups_maximum_and_head_follow_one_another(widths):
    torch.manual_seed(0)
    network = ConvNet(widths, num_classes=7).double().eval()
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    assert [layer.out_channels for layer in convolutions] == [
        widths[0],
        *(w for width in widths for w in (width, width)),
    ]
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    x = images
    for number, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        x = convolve(x, convolution, norm, pool=number % 2 == 1)
    expected = x.amax((2, 3)) @ network.fc.weight.T + network.fc.bias
    torch.testing.assert_close(network(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [{"widths": ()}, {"widths": (8, 0)}, {"num_classes": 0}])
def test_refusals(arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        ConvNet(**arguments)
