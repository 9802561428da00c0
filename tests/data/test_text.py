"""These tests check the data module of text."""

from pydoc_data.topics import topics

import lightning.pytorch as pl
import pytest
import torch

from aimc_pl.data import PydocText
from aimc_pl.data.text import decode, encode
from aimc_pl.errors import UsageError

TEXT = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace").decode()


def loaders(**arguments):
    data = PydocText(**arguments)
    data.setup("fit")
    return {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}


def sequences(loader):
    return [row for inputs, _ in loader for row in inputs.unbind()]


def test_characters_become_tokens_and_characters_again():
    assert encode("Az\n").tolist() == [65, 122, 10]
    assert decode(encode("3 ≤ π")) == "3 ? ?"
    assert decode(encode(TEXT)) == TEXT


def test_batches_are_the_text_and_what_follows():
    for name, loader in loaders(batch_size=16, context=50).items():
        inputs, targets = next(iter(loader))
        assert inputs.shape == targets.shape == (16, 50), name
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.max() < PydocText.vocab_size
        for row, following in zip(inputs, targets, strict=True):
            text = decode(row)
            assert text in TEXT
            assert text + decode(following)[-1] in TEXT
            assert decode(following)[:-1] == text[1:]


def test_the_parts_are_pieces_of_the_text_without_overlap():
    parts = loaders(context=50, val_fraction=0.2, test_fraction=0.1)
    train, val, test = (list(map(decode, sequences(parts[name]))) for name in ("train", "val", "test"))
    num_val, num_test = round(0.2 * len(TEXT)), round(0.1 * len(TEXT))
    first_val, first_test = len(TEXT) - num_val - num_test, len(TEXT) - num_test
    assert sorted(train) == sorted(TEXT[start : start + 50] for start in range(0, first_val - 50, 50))
    assert val == [TEXT[start : start + 50] for start in range(first_val, first_test - 50, 50)]
    assert test == [TEXT[start : start + 50] for start in range(first_test, len(TEXT) - 50, 50)]


def test_predictions_are_of_the_test_sequences_in_order():
    class Echo(pl.LightningModule):
        def predict_step(self, batch):
            return batch[0]

    data = PydocText(batch_size=16)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    predicted = trainer.predict(Echo(), data)
    torch.testing.assert_close(torch.cat(predicted), torch.cat([inputs for inputs, _ in data.test_dataloader()]))


def test_an_epoch_has_an_order_of_its_own_and_a_seed_the_same_again():
    orders = []
    for seed in (3, 3, 4):
        loader = loaders(seed=seed)["train"]
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            orders.append(tuple(loader.sampler))
            assert sorted(orders[-1]) == list(range(len(loader.dataset)))
    assert orders[:2] == orders[2:4]
    assert len(set(orders)) == 4


class Recorder(pl.LightningModule):
    """A module that records the epoch and the first sequence of every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch):
        self.seen.append((self.current_epoch, decode(batch[0][0])))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(epochs, **arguments):
    module = Recorder()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=epochs, limit_train_batches=5, limit_val_batches=0, **options)
    trainer.fit(module, PydocText(), **arguments)
    return module.seen, trainer


def test_a_resumed_fit_sees_what_the_uninterrupted_one_would_have(tmp_path):
    whole, _ = fit(3)
    assert len(set(whole)) == 15
    start, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = fit(3, ckpt_path=tmp_path / "one.ckpt")
    assert start + rest == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"context": 0}, "context must be a whole number of at least 1"),
        ({"val_fraction": 0.0}, "val_fraction must be a finite number above 0 and below 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave no text to train on"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        PydocText(**arguments)


@pytest.mark.parametrize("fraction", [1e-4, 1e-9])
def test_a_part_shorter_than_a_sequence(fraction):
    """Check the error. Python versions have texts of different lengths, so the number of characters is computed."""
    characters = round(fraction * len(TEXT))
    with pytest.raises(UsageError, match=rf"the test part has {characters} characters.* context=64 .*lower the"):
        PydocText(test_fraction=fraction).setup("fit")
