"""These tests check the data modules."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from aimc_pl.data import CIFAR10, MNIST, Digits, ImageFolder
from aimc_pl.data.images import shift_and_flip


def test_digits_are_split_once_and_for_all():
    parts = []
    for _ in range(2):
        data = Digits(batch_size=50)
        data.setup("fit")
        parts.append(dict(data._sets))
    sizes = {name: len(images) for name, images in parts[0].items()}
    assert sizes == {"train": 1293, "val": 144, "test": 360}
    for name in sizes:
        assert torch.equal(parts[0][name].images, parts[1][name].images)


def test_training_images_are_normalised():
    data = Digits(batch_size=2000)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (1293, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 1e-5
    assert abs(images.std() - 1) < 1e-5


def test_shift_and_flip_moves_whole_images():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (200, 3, 16, 16), dtype=torch.uint8)
    moved = shift_and_flip(images)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    found = Counter()
    for image, result in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        matches = []
        for top, left, flip in product(range(5), range(5), (False, True)):
            window = padded[:, top : top + 16, left : left + 16]
            if torch.equal(window.flip(2) if flip else window, result):
                matches.append((top, left, flip))
        assert len(matches) == 1
        found.update(matches)
    # There are 200 draws of 50 equally likely shifts. A given shift is missed with probability 0.98**200.
    assert len(found) > 40
    assert 60 < sum(n for (_, _, flip), n in found.items() if flip) < 140


def test_shifts_are_up_to_an_eighth_of_height_and_width():
    torch.manual_seed(0)
    images = torch.full((200, 1, 8, 32), 255, dtype=torch.uint8)
    gaps = (shift_and_flip(images) == 0)[:, 0]
    # The number of rows and columns of zeros. A given one of 3 or 9 shifts is missed with probability (8/9)**200.
    assert set(gaps.all(2).sum(1).tolist()) == {0, 1}
    assert set(gaps.all(1).sum(1).tolist()) == {0, 1, 2, 3, 4}


def test_torchvision_data_sets_are_read_from_their_files(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            rng = np.random.default_rng(int(train))
            self.data = rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(10)) * 4

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = CIFAR10(root=tmp_path, batch_size=8, augment=True)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.shape == (8,)
    assert torch.equal(data._sets["test"].images[3], torch.from_numpy(Fake(0, False, 0).data[3]).permute(2, 0, 1))


def test_grey_images_get_a_channel(monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data = torch.arange(28 * 28 * 20).view(20, 28, 28).to(torch.uint8)
            self.targets = torch.arange(20) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    data = MNIST(batch_size=4)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].shape == (2, 1, 28, 28)


def test_image_folder(tmp_path):
    for part in ("train", "test"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (20 + k, 30), (100 * index, 10, 10)).save(tmp_path / part / name / f"{k}.png")
    data = ImageFolder(tmp_path, image_size=8, batch_size=6, val_fraction=0.4)
    data.setup("fit")
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(data._sets["train"]) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_processes_yield_the_same_batches(num_workers):
    data = Digits(batch_size=100, num_workers=num_workers)
    data.setup("fit")
    images = torch.cat([images for images, _ in data.test_dataloader()])
    assert images.shape == (360, 1, 8, 8)
