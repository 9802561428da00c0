"""Text held in memory, a character a token."""

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
    """Half a megabyte of English, the Python reference that CPython brings for its ``help()``: no download.

    A token is a character's ASCII code (the few characters beyond ASCII become "?"), so that ``vocab_size`` is 128
    whatever the release of CPython. Batches are pairs of int64 inputs ``(batch, context)`` and targets of the same
    shape, the characters that follow the inputs. Training, validation and test parts are one piece of the text each,
    in this order, cut into sequences without overlap.

    Args:
        batch_size: sequences of a mini-batch.
        context: characters of a sequence.
        val_fraction: of the text, kept for validation.
        test_fraction: of the text, kept for the test.
        seed: draws the order of the training sequences, another one in every epoch.

    Raises:
        UsageError: for a size or fraction out of range, or a part too short for one sequence.
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
        """Cut the text into its parts."""
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
        """Shuffled mini-batches."""
        return self._loader("train", _SeededOrder(len(self._sets["train"]), self.seed))

    def val_dataloader(self) -> DataLoader[Sequences]:
        """Mini-batches in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sequences]:
        """Mini-batches in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sequences]:
        """The test sequences."""
        return self._loader("test")

    def _loader(self, name: str, sampler: Sampler[int] | None = None) -> DataLoader[Sequences]:
        return DataLoader(self._sets[name], self.batch_size, sampler=sampler, collate_fn=_as_is)


class TextSet(Dataset[Sequences]):
    """Consecutive sequences of a text, fetched a mini-batch at a time.

    Args:
        tokens: the text ``(characters,)``.
        context: tokens of a sequence.
    """

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens = tokens
        self.context = context

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context  # the last target is one token beyond the last input

    def __getitems__(self, indices: Sequence[int]) -> Sequences:
        """A mini-batch."""
        places = torch.as_tensor(indices)[:, None] * self.context + torch.arange(self.context)
        return self.tokens[places], self.tokens[places + 1]


class _SeededOrder(Sampler[int]):
    """An order of its own in each epoch. Lightning tells the epoch, so that a resumed fit goes on as it would have."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        # not the sum: the next seed's epochs would be this one's; the hash of numbers is the same in every process
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        yield from torch.randperm(self.num_samples, generator=generator).tolist()


def encode(text: str) -> Tensor:
    """The characters' ASCII codes, int64 ``(characters,)``; that of "?" for a character beyond ASCII."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def decode(tokens: Tensor) -> str:
    """The text of tokens ``(characters,)``."""
    return bytes(tokens.tolist()).decode("ascii")


def _as_is(batch: Any) -> Any:
    return batch
