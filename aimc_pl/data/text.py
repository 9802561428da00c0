"""This module keeps text in memory, with one token per character."""

from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aimc_pl.arguments import check_number, check_seed
from aimc_pl.errors import UsageError

Sequences = tuple[Tensor, Tensor]


class PydocText(pl.LightningDataModule):
    """Half a megabyte of English: the Python reference that CPython contains for ``help()``. Nothing is downloaded.

    A token is a character's ASCII code (the few characters beyond ASCII become "?"). ``vocab_size`` is therefore 128
    for every release of CPython. A mini-batch is a pair of int64 inputs ``(batch, context)`` and targets of the same
    shape, the characters that follow the inputs. The training, validation and test parts are three consecutive pieces
    of the text, in this order. Each part is cut into sequences without overlap.

    Args:
        batch_size: number of sequences in a mini-batch.
        context: number of characters in a sequence.
        val_fraction: the fraction of the text that is kept for validation.
        test_fraction: the fraction of the text that is kept for the test.
        seed: the seed for the order of the training sequences, which differs between epochs.

    Raises:
        UsageError: if a size or a fraction is out of range, or, from ``setup``, if a part is shorter than a sequence.
    """

    vocab_size = 128

    def __init__(
        self,
        batch_size: int = 32,
        context: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("batch_size", batch_size, at_least=1, whole=True)
        check_number("context", context, at_least=1, whole=True)
        check_number("val_fraction", val_fraction, above=0, below=1)
        check_number("test_fraction", test_fraction, above=0, below=1)
        if val_fraction + test_fraction >= 1:
            raise UsageError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave no text to train on: lower one"
            )
        check_seed("seed", seed)
        self.batch_size = batch_size
        self.context = context
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self._sets: dict[str, TextSet] = {}

    def setup(self, stage: str) -> None:
        """Cut the text into its training, validation and test parts."""
        tokens = encode("\n\n".join(topics[name] for name in sorted(topics)))
        num_val, num_test = (round(fraction * len(tokens)) for fraction in (self.val_fraction, self.test_fraction))
        parts = tokens.split([len(tokens) - num_val - num_test, num_val, num_test])
        self._sets = {
            name: TextSet(part, self.context) for name, part in zip(("train", "val", "test"), parts, strict=True)
        }
        for name, sequences in self._sets.items():
            if not len(sequences):
                raise UsageError(
                    f"the {name} part has {len(sequences.tokens)} characters, and a sequence of context={self.context} "
                    "takes one more than that: lower the context, or change the fractions"
                )

    def train_dataloader(self) -> DataLoader[Sequences]:
        """Return a loader of shuffled training mini-batches."""
        return self._loader("train", _SeededOrder(len(self._sets["train"]), self.seed))

    def val_dataloader(self) -> DataLoader[Sequences]:
        """Return a loader of validation mini-batches in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sequences]:
        """Return a loader of test mini-batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sequences]:
        """Return the loader of the test sequences, which predictions use too."""
        return self._loader("test")

    def _loader(self, name: str, sampler: Sampler[int] | None = None) -> DataLoader[Sequences]:
        # To predict, Lightning makes the loader anew, which it can only if batch_size has its name.
        return DataLoader(self._sets[name], batch_size=self.batch_size, sampler=sampler, collate_fn=_as_is)


class TextSet(Dataset[Sequences]):
    """Consecutive sequences of a text, fetched a mini-batch at a time.

    Args:
        tokens: the text ``(characters,)``.
        context: number of tokens in a sequence.
    """

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context  # the last target is one token beyond the last input

    def __getitems__(self, indices: Sequence[int]) -> Sequences:
        """Return the mini-batch of these sequences: inputs and targets."""
        places = torch.as_tensor(indices)[:, None] * self.context + torch.arange(self.context)
        return self.tokens[places], self.tokens[places + 1]


class _SeededOrder(Sampler[int]):
    """A random order that differs between epochs. Lightning sets the epoch, so a resumed fit has the same orders."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        # With a sum, the next seed would repeat the orders of this one. A hash of numbers is the same in every process.
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        yield from torch.randperm(self.num_samples, generator=generator).tolist()


def encode(text: str) -> Tensor:
    """Return the characters' ASCII codes, int64 ``(characters,)``. Characters beyond ASCII get the code of "?"."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def decode(tokens: Tensor) -> str:
    """Return the text of tokens ``(characters,)``."""
    return bytes(tokens.tolist()).decode("ascii")


def _as_is(batch: Any) -> Any:
    return batch
