"""LightningModules for image classification and language modelling."""

import math
import re
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from aimc_pl.arguments import check_callable, check_instance, check_number
from aimc_pl.errors import UsageError

_WRONG_SHAPE = re.compile(r"shapes cannot be multiplied|expected input\[|Expected \dD \(unbatched\)")
"""What torch says of inputs that do not fit the weights of a linear or convolutional layer."""


class Classifier(pl.LightningModule):
    """Image classification with cross-entropy.

    Logs ``train/loss``, ``train/accuracy`` and the same for ``val`` and ``test``.

    Args:
        network: maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.
        num_classes: the number of classes, at least 2.
        optimizer: takes the parameters and returns an optimizer; SGD with learning rate 0.1 by default.
        lr_scheduler: takes the optimizer and returns a scheduler, which is stepped every epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        _check_parts(network, optimizer, lr_scheduler)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        check_number("num_classes", num_classes, at_least=2, whole=True)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of a batch of images and labels, and log loss and accuracy."""
        return self._evaluate(batch, "train", self.train_accuracy)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the most likely class of each image."""
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        """The optimizer, with the scheduler if there is one."""
        return _configured(self, self.optimizer, self.lr_scheduler)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        try:
            logits = self(images)
        except RuntimeError as error:
            if not _WRONG_SHAPE.search(str(error)):
                raise
            raise UsageError(
                f"network takes no images of shape {tuple(images.shape[1:])}, which the data has: "
                f"{shorten(str(error), 110, placeholder=' ...')}"
            ) from error
        if logits.shape[1:] != (accuracy.num_classes,):
            raise UsageError(
                f"network returns {tuple(logits.shape[1:])} numbers per image, and num_classes is "
                f"{accuracy.num_classes}: let both be the number of classes of the data"
            )
        try:
            loss = F.cross_entropy(logits, labels)
        except IndexError as error:  # on a GPU torch reports this otherwise
            raise UsageError(
                f"num_classes={accuracy.num_classes} is too small for the data, which has the label {labels.max()}: "
                "set num_classes, and the last layer of the network"
            ) from error
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=stage == "train", on_epoch=True)
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss


class LanguageModel(pl.LightningModule):
    """Prediction of the next token with cross-entropy.

    Logs ``train/loss`` (nats per token), ``train/bits`` (bits per token, which are bits per character if every token is
    one character) and the same for ``val`` and ``test``.

    Args:
        network: maps tokens ``(batch, length)`` to logits ``(batch, length, vocab_size)``.
        optimizer: takes the parameters and returns an optimizer; AdamW with learning rate 1e-3 by default.
        lr_scheduler: takes the optimizer and returns a scheduler, which is stepped every epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        _check_parts(network, optimizer, lr_scheduler)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the tokens that follow."""
        return self.network(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of tokens and the tokens that follow them, both ``(batch, length)``, and log it."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and bits."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log loss and bits."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the most likely token after each token."""
        return self(batch[0]).argmax(2)

    def configure_optimizers(self) -> Any:
        """The optimizer, with the scheduler if there is one."""
        return _configured(self, self.optimizer, self.lr_scheduler)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log(f"{stage}/loss", loss, on_step=stage == "train", on_epoch=True)
        self.log(f"{stage}/bits", loss / math.log(2), on_step=False, on_epoch=True, prog_bar=True)
        return loss


def _check_parts(network: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> None:
    check_instance("network", network, nn.Module, "a torch.nn.Module")
    check_callable("optimizer", optimizer)
    if scheduler is not None:
        check_callable("lr_scheduler", scheduler)


def _configured(module: nn.Module, make: OptimizerCallable, scheduler: LRSchedulerCallable | None) -> Any:
    try:
        optimizer: Optimizer = make(module.parameters())
    except ValueError as error:
        raise UsageError(f"optimizer cannot be made: {error}") from error
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float):
            check_number("lr of the optimizer", group["lr"])
    if scheduler is None:
        return optimizer
    try:
        return [optimizer], [scheduler(optimizer)]
    except ValueError as error:
        raise UsageError(f"lr_scheduler cannot be made: {error}") from error
