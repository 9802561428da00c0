"""This module holds the image data sets of the experiments."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as transforms

from aimc_pl.arguments import check_flag, check_number, check_path
from aimc_pl.data.images import Images, InMemoryImages
from aimc_pl.errors import UsageError


class Digits(InMemoryImages):
    """1,797 real handwritten digits of 8x8 pixels. scikit-learn contains them, so nothing is downloaded.

    Every fifth image (360) is a test image.
    """

    def load(self) -> tuple[Images, Images]:
        """See :meth:`InMemoryImages.load`."""
        data: Any = load_digits()
        images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        test = torch.arange(len(images)) % 5 == 0
        return (images[~test], labels[~test]), (images[test], labels[test])


class _TorchvisionImages(InMemoryImages):
    """A data set of torchvision.

    Args:
        root: the folder in which torchvision keeps the data set.
        download: whether to download the data set if the folder lacks it.
        kwargs: arguments of :class:`InMemoryImages`.

    Raises:
        UsageError: from ``setup``, if the folder lacks the data set; from ``prepare_data``, if the download fails.
    """

    def __init__(self, root: str | Path = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_path("root", root)
        check_flag("download", download)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the data set if ``download`` is set."""
        if self.download:
            for train in (True, False):
                self._open(train, download=True)

    def load(self) -> tuple[Images, Images]:
        """See :meth:`InMemoryImages.load`."""
        return self._read(True), self._read(False)

    def _open(self, train: bool, download: bool = False) -> Any:
        try:
            return getattr(torchvision.datasets, type(self).__name__)(self.root, train=train, download=download)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            raise UsageError(
                f"{type(self).__name__} is not in {str(self.root)!r} ({str(error) or 'damaged files'}). "
                "Give its folder as data.root, or set data.download=true."
            ) from error

    def _read(self, train: bool) -> Images:
        dataset = self._open(train)
        images = torch.as_tensor(dataset.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(dataset.targets)


class CIFAR10(_TorchvisionImages):
    """60,000 colour images of 32x32 pixels in 10 classes."""


class CIFAR100(_TorchvisionImages):
    """60,000 colour images of 32x32 pixels in 100 classes."""


class MNIST(_TorchvisionImages):
    """70,000 handwritten digits of 28x28 pixels."""


class FashionMNIST(_TorchvisionImages):
    """70,000 pictures of clothes, 28x28 pixels, in 10 classes."""


class ImageFolder(InMemoryImages):
    """Any images in folders ``root/train/CLASS`` and ``root/test/CLASS``, scaled to squares.

    Args:
        root: the folder that contains ``train`` and ``test``.
        image_size: height and width in pixels, at most 4096.
        kwargs: arguments of :class:`InMemoryImages`.

    Raises:
        UsageError: from ``setup``, if a folder is missing, if the two have different classes, or if an image cannot be
            read.
    """

    def __init__(self, root: str | Path, image_size: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_path("root", root)
        check_number("image_size", image_size, at_least=1, at_most=4096, whole=True)
        self.root = Path(root)
        self.image_size = image_size

    def load(self) -> tuple[Images, Images]:
        """See :meth:`InMemoryImages.load`."""
        train, test = self._open("train"), self._open("test")
        if odd := sorted(set(train.classes) ^ set(test.classes)):
            part = "train" if odd[0] in train.classes else "test"
            raise UsageError(f"{self.root} has class {odd[0]!r} in {part} only: train and test need the same classes")
        return self._read(train), self._read(test)

    def _open(self, part: str) -> torchvision.datasets.ImageFolder:
        try:
            return torchvision.datasets.ImageFolder(str(self.root / part), self._to_square)
        except OSError as error:
            raise UsageError(f"ImageFolder needs {self.root / part}/CLASS/IMAGE: {error}") from error

    def _read(self, folder: torchvision.datasets.ImageFolder) -> Images:
        images = list[torch.Tensor]()
        for index, (path, _) in enumerate(folder.samples):
            try:
                images.append(folder[index][0])
            except (OSError, SyntaxError, ValueError) as error:
                # Pillow's message names an object in memory instead of the file.
                raise UsageError(f"{path} is no image that can be read: repair or remove it") from error
        return torch.stack(images), torch.tensor(folder.targets)

    def _to_square(self, image: Any) -> torch.Tensor:
        return transforms.resize(transforms.pil_to_tensor(image), [self.image_size, self.image_size])
