"""This module describes how a layer's tensors hold the input and error vectors of its crossbar."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from aimc_pl.devices.mean_field import kernels

_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)

Layout = tuple[np.ndarray, tuple[np.ndarray, int], np.ndarray]
"""Where patches are in the memory of images: where each of them begins in its image ``(positions,)``; where their
segments begin, seen from there, and the length of a segment; and, for every column of the crossbar, the number of its
element in the segments."""


@dataclass(frozen=True)
class Vectors:
    """Vectors that lie along one dimension of a tensor.

    Args:
        dim: −1 for the inputs of a Linear layer ``(..., features)``, 1 for unfolded images
            ``(batch, features, positions)``.
    """

    dim: int

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return the product of ``weight`` ``(out, in)`` with every vector."""
        return x @ weight.T if self.dim == -1 else weight @ x

    def largest(self, magnitudes: Tensor) -> Tensor:
        """Return the largest element of every input vector, with ``dim`` kept."""
        return magnitudes.amax(self.dim, keepdim=True)

    def outer(self, error: Tensor, x: Tensor) -> Tensor:
        """Return the sum of all outer products of errors and inputs, ``(out, in)``."""
        if self.dim == 1:
            return torch.einsum("nop,nip->oi", error, x)
        if x.dim() == 2:
            return error.T @ x
        return error.reshape(-1, error.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class Patches(ABC):
    """Images whose patches are the input vectors of a convolution's crossbar, one patch per output position."""

    dim = 1

    @abstractmethod
    def columns(self, images: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return the patches ``(batch, features, positions)`` of images ``(batch, channels, *size)``, times a gain.

        Args:
            images: the images to unfold.
            gain: one number, or one per patch ``(batch, 1, *out_size)``.
        """

    @abstractmethod
    def out_size(self, images: Tensor) -> Sequence[int]:
        """Return the size of the output images."""

    @abstractmethod
    def part(self, start: int, stop: int) -> "Patches":
        """Return patches with elements ``start`` … ``stop`` − 1 only, for a crossbar that holds only these columns."""

    def fold(self, columns: Tensor, images: Tensor) -> Tensor:
        """Add up the elements that belong to the same pixel of ``images`` (the adjoint of :meth:`columns`)."""
        with torch.enable_grad():
            zeros = torch.zeros_like(images, requires_grad=True)
            return torch.autograd.grad(self.columns(zeros), zeros, columns)[0]

    def multiply(self, weight: Tensor, images: Tensor) -> Tensor:
        """Return the convolution of the images with ``weight`` ``(out, features)``."""
        return (weight @ self.columns(images)).unflatten(2, self.out_size(images))

    def multiply_transposed(self, weight: Tensor, error: Tensor, images: Tensor) -> Tensor:
        """Return the images' errors for output errors ``(batch, out, *out_size)``: the adjoint of :meth:`multiply`."""
        return self.fold(weight.T @ error.flatten(2), images)

    def largest(self, magnitudes: Tensor) -> Tensor:
        """Return the largest element of every patch, ``(batch, 1, *out_size)``. No element may be negative."""
        return self.columns(magnitudes).amax(1, keepdim=True).unflatten(2, self.out_size(magnitudes))

    def outer(self, error: Tensor, images: Tensor) -> Tensor:
        """Return the sum of all outer products of errors and patches, ``(out, features)``."""
        return Vectors(1).outer(error.flatten(2), self.columns(images))

    def weighted_squares(self, weights: Tensor, images: Tensor) -> Tensor:
        """Return the sum of all patches' squared elements, each patch times its weight ``(batch, 1, *out_size)``."""
        return self.outer(weights, images.square()).sum()


@dataclass(frozen=True)
class Gathered(Patches):
    """Patches that are gathered by aihwkit's table of indices.

    Index 0 is padding, 1 a constant one (analog bias), and the pixels begin at 2.

    Args:
        indices: the indices of the patches' elements, ``features`` rows of ``positions``, flattened.
        image_sizes: channels, size of the images, size of the output images.
    """

    indices: Tensor
    image_sizes: tuple[int, ...]

    def out_size(self, images: Tensor) -> Sequence[int]:
        """See :meth:`Patches.out_size`."""
        return self.image_sizes[images.dim() - 1 :]

    def part(self, start: int, stop: int) -> Patches:
        """See :meth:`Patches.part`."""
        return Gathered(
            self.indices.view(-1, prod(self.image_sizes[len(self.image_sizes) // 2 + 1 :]))[start:stop].flatten(),
            self.image_sizes,
        )

    def columns(self, images: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """See :meth:`Patches.columns`."""
        constants = images.new_tensor([0.0, 1.0]).expand(len(images), 2)
        elements = torch.cat([constants, images.flatten(1)], 1)
        columns = elements[:, self.indices.long()].unflatten(1, (-1, prod(self.out_size(images))))
        return columns * (gain.flatten(2) if isinstance(gain, Tensor) else gain)


@dataclass(frozen=True)
class Convolution(Patches):
    """Patches of a convolution without a bias on the crossbar. Products do not unfold the images.

    All arguments have one number per dimension of the images.

    Args:
        kernel_size: see :class:`torch.nn.Conv2d`.
        stride: see :class:`torch.nn.Conv2d`.
        padding: number of zeros on both sides.
        dilation: see :class:`torch.nn.Conv2d`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def out_size(self, images: Tensor) -> Sequence[int]:
        """See :meth:`Patches.out_size`."""
        return [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                images.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def part(self, start: int, stop: int) -> Patches:
        """See :meth:`Patches.part`."""
        return PartialConvolution(self.kernel_size, self.stride, self.padding, self.dilation, start, stop)

    def columns(self, images: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """See :meth:`Patches.columns`."""
        dims = len(self.kernel_size)
        windows = self._padded(images)
        for i in range(dims):
            windows = windows.unfold(2 + i, self.dilation[i] * (self.kernel_size[i] - 1) + 1, self.stride[i])
            windows = windows[..., :: self.dilation[i]]
        windows = windows.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        if isinstance(gain, Tensor):
            gain = gain.view(len(gain), *([1] * (1 + dims)), *gain.shape[2:])
            # Lay out the result's memory as the patches, not as the windows.
            windows = torch.mul(windows, gain, out=images.new_empty(windows.shape))
        elif gain != 1:
            windows = windows * gain
        return windows.flatten(1, 1 + dims).flatten(2)

    def multiply(self, weight: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.multiply`."""
        return self._convolution(images, self._kernel(weight), None, self.stride, self.padding, self.dilation)

    def multiply_transposed(self, weight: Tensor, error: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.multiply_transposed`."""
        return self._gradient(0, error, images, self._kernel(weight))

    def largest(self, magnitudes: Tensor) -> Tensor:
        """See :meth:`Patches.largest`."""
        return self._over_patches(torch.maximum, magnitudes.amax(1, keepdim=True))

    def spread(self, values: Tensor, images: Tensor) -> Tensor:
        """Return the :meth:`fold` of constant patches: values ``(batch, 1, *out_size)`` to ``(batch, 1, *size)``."""
        # The adjoint of a convolution with ones is a convolution with ones and stride 1, over values that are spaced by
        # the stride.
        apart = values.new_zeros(
            *values.shape[:2], *((n - 1) * s + 1 for n, s in zip(values.shape[2:], self.stride, strict=True))
        )
        apart[(..., *(slice(None, None, stride) for stride in self.stride))] = values
        widths: list[int] = []
        for size, n, k, p, d in reversed(
            list(zip(images.shape[2:], apart.shape[2:], self.kernel_size, self.padding, self.dilation, strict=True))
        ):
            widths += [d * (k - 1) - p, size + p - n]
        ones = values.new_ones(1, 1, *self.kernel_size)
        return self._convolution(F.pad(apart, widths), ones, dilation=self.dilation)

    def outer(self, error: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.outer`."""
        kernel = images.new_empty(error.shape[1], images.shape[1], *self.kernel_size)
        return self._gradient(1, error, images, kernel).flatten(1)

    def weighted_squares(self, weights: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.weighted_squares`."""
        # A patch holds either all channels of a pixel, or none.
        sums = self._over_patches(torch.add, images.square().sum(1, keepdim=True))
        return (sums * weights).sum()

    def in_memory(self, images: Tensor) -> tuple[np.ndarray, Layout]:
        """Return the padded images on the CPU as one row of numbers, with the channels last, and their layout."""
        layout = _layout(self, images.shape[1], tuple(images.shape[2:]))
        padded = F.pad(images.movedim(1, -1).contiguous(), [0, 0, *self._widths])
        return kernels.array(padded).reshape(-1), layout

    @property
    def _convolution(self) -> Any:
        return _CONVOLUTIONS[len(self.kernel_size) - 1]

    def _over_patches(self, combine: Callable[[Tensor, Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Combine the pixels ``(batch, 1, *size)`` of every patch, along one dimension after another."""
        pixels = self._padded(pixels)
        for i, (kernel, stride, dilation) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            windows = pixels.unfold(2 + i, dilation * (kernel - 1) + 1, stride)
            pixels = reduce(combine, windows[..., ::dilation].unbind(-1))
        return pixels

    def _gradient(self, wanted: int, error: Tensor, images: Tensor, kernel: Tensor) -> Tensor:
        """Return the gradient of the images (0) or of the kernel (1), for whose values any others may stand."""
        # The functions of torch.nn.grad return contiguous gradients for images in channels_last too, which is slow.
        zeros, only = [0] * len(self.kernel_size), [wanted == 0, wanted == 1, False]
        geometry = self.stride, self.padding, self.dilation, False, zeros, 1
        return torch.ops.aten.convolution_backward(error, images, kernel, None, *geometry, only)[wanted]

    def _kernel(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, *self.kernel_size))

    def _padded(self, images: Tensor) -> Tensor:
        return F.pad(images, self._widths)

    @property
    def _widths(self) -> list[int]:
        return [width for size in reversed(self.padding) for width in (size, size)]


@lru_cache(maxsize=64)
def _layout(convolution: Convolution, channels: int, size: tuple[int, ...]) -> Layout:
    padded = [n + 2 * padding for n, padding in zip(size, convolution.padding, strict=True)]
    steps = [channels * prod(padded[i + 1 :]) for i in range(len(padded))]
    geometry = list(zip(convolution.kernel_size, convolution.dilation, steps, strict=True))
    elements = [range(0, k * d * step, d * step) for k, d, step in geometry]
    patches = [
        range(0, (n - d * (k - 1)) * step, stride * step)
        for n, stride, (k, d, step) in zip(padded, convolution.stride, geometry, strict=True)
    ]
    length = channels
    if convolution.dilation[-1] == 1:
        *elements, along = elements
        length *= len(along)
    columns = np.arange(channels * prod(convolution.kernel_size)).reshape(-1, channels).T.ravel()
    return _all_sums(patches), (_all_sums(elements), length), columns


def _all_sums(numbers: Sequence[range]) -> np.ndarray:
    return reduce(np.add.outer, numbers, np.zeros(1, np.int64)).ravel()


@dataclass(frozen=True)
class PartialConvolution(Convolution):
    """The part of a convolution that lies on one of several crossbars: some elements of every patch.

    Args:
        kernel_size: see :class:`Convolution`.
        stride: see :class:`Convolution`.
        padding: see :class:`Convolution`.
        dilation: see :class:`Convolution`.
        start: the first element of this part.
        stop: the first element after this part.
    """

    start: int
    stop: int

    def columns(self, images: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """See :meth:`Patches.columns`."""
        return self._cut(super().columns(images[:, self._channels], gain))

    def multiply(self, weight: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.multiply`."""
        return super().multiply(self._extended(weight), images[:, self._channels])

    def multiply_transposed(self, weight: Tensor, error: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.multiply_transposed`."""
        result = torch.zeros_like(images)
        channels = images[:, self._channels]
        result[:, self._channels] = super().multiply_transposed(self._extended(weight), error, channels)
        return result

    def largest(self, magnitudes: Tensor) -> Tensor:
        """See :meth:`Patches.largest`."""
        if self._lead or self._tail:
            return Patches.largest(self, magnitudes)
        return super().largest(magnitudes[:, self._channels])

    def outer(self, error: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.outer`."""
        return self._cut(super().outer(error, images[:, self._channels]))

    def weighted_squares(self, weights: Tensor, images: Tensor) -> Tensor:
        """See :meth:`Patches.weighted_squares`."""
        if self._lead or self._tail:
            return Patches.weighted_squares(self, weights, images)
        return super().weighted_squares(weights, images[:, self._channels])

    def in_memory(self, images: Tensor) -> tuple[np.ndarray, Layout]:
        """See :meth:`Convolution.in_memory`."""
        memory, (patches, segments, columns) = super().in_memory(images[:, self._channels])
        return memory, (patches, segments, columns[self._lead : len(columns) - self._tail])

    @property
    def _channels(self) -> slice:
        elements = prod(self.kernel_size)
        return slice(self.start // elements, -(-self.stop // elements))

    @property
    def _lead(self) -> int:
        return self.start % prod(self.kernel_size)

    @property
    def _tail(self) -> int:
        return -self.stop % prod(self.kernel_size)

    def _cut(self, features: Tensor) -> Tensor:
        return features[:, self._lead : features.shape[1] - self._tail]

    def _extended(self, weight: Tensor) -> Tensor:
        return F.pad(weight, (self._lead, self._tail))
