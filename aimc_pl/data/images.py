"""This module keeps image data sets in memory as uint8, and prepares each mini-batch as a whole."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aimc_pl.arguments import check_flag, check_number, check_seed
from aimc_pl.errors import UsageError

Images = tuple[Tensor, Tensor]


class InMemoryImages(pl.LightningDataModule, ABC):
    """A data module that keeps training, validation and test images in memory.

    A mini-batch is selected, augmented and normalised as a whole. It is a pair of normalised float images
    ``(batch, channels, height, width)`` and int64 labels ``(batch,)``. The mean and the standard deviation of each
    channel are those of the training images.

    Args:
        batch_size: number of samples in a mini-batch.
        val_fraction: the fraction of the training images that is kept for validation.
        augment: whether to shift training images by up to an eighth of their size and flip half of them left to right.
        drop_last: whether to leave out the last training mini-batch if it is smaller.
        split_seed: the seed that chooses the validation images.
        num_workers: number of loader processes, at most 256; 0 loads in the main process. Every epoch starts new
            processes, because a resumed run must draw the same numbers as an uninterrupted one.

    Raises:
        UsageError: if a number is out of range, or, from ``setup``, if no image is left to train on.
    """

    def __init__(
        self,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        augment: bool = False,
        drop_last: bool = False,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, at_least=1, whole=True)
        check_number("val_fraction", val_fraction, above=0, below=1)
        check_flag("augment", augment)
        check_flag("drop_last", drop_last)
        check_seed("split_seed", split_seed)
        check_number("num_workers", num_workers, at_least=0, at_most=256, whole=True)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.augment = augment
        self.drop_last = drop_last
        self.split_seed = split_seed
        self.num_workers = num_workers
        self._sets: dict[str, ImageSet] = {}

    @abstractmethod
    def load(self) -> tuple[Images, Images]:
        """Return the training and the test images, uint8 ``(samples, channels, height, width)``, with int64 labels."""

    def setup(self, stage: str) -> None:
        """Load the images and split off the validation set."""
        if self._sets:
            return
        (images, labels), test = self.load()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
        num_val = max(1, round(self.val_fraction * len(images)))
        val, train = order[:num_val], order[num_val:]
        if not len(train):
            raise UsageError(f"val_fraction={self.val_fraction} of {len(images)} images leaves none to train on")
        channels = images[train].transpose(0, 1).flatten(1).float() / 255
        mean, std = channels.mean(1), channels.std(1)
        self._sets = {
            "train": ImageSet(images[train], labels[train], mean, std, self.augment),
            "val": ImageSet(images[val], labels[val], mean, std),
            "test": ImageSet(*test, mean, std),
        }

    def train_dataloader(self) -> DataLoader[Images]:
        """Return a loader of shuffled training mini-batches."""
        return self._loader("train", shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Images]:
        """Return a loader of validation mini-batches in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Images]:
        """Return a loader of test mini-batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Images]:
        """Return the loader of the test images, which predictions use too."""
        return self._loader("test")

    def _loader(self, name: str, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Images]:
        return DataLoader(
            self._sets[name],
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=_as_is,
        )


class ImageSet(Dataset[Images]):
    """Images and labels in memory, fetched a mini-batch at a time.

    Args:
        images: uint8 ``(samples, channels, height, width)``.
        labels: int64 ``(samples,)``.
        mean: the mean of each channel, for values between 0 and 1.
        std: the standard deviation of each channel, for values between 0 and 1.
        augment: whether to shift and flip images at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, augment: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self._mean = mean.view(-1, 1, 1)
        self._std = std.view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Images:
        """Return the mini-batch of these samples, augmented and normalised."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment:
            images = shift_and_flip(images)
        return (images.float() / 255 - self._mean) / self._std, self.labels[chosen]


def shift_and_flip(images: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its size (zeros fill the gap) and flip half of them left to right.

    Args:
        images: ``(batch, channels, height, width)``.
    """
    batch, channels, height, width = images.shape
    across, down = width // 8, height // 8
    padded = F.pad(images, (across, across, down, down))
    top, left = torch.randint(2 * down + 1, (batch, 1)), torch.randint(2 * across + 1, (batch, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    index = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(images.shape)


def _as_is(batch: Any) -> Any:
    return batch
