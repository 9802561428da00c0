"""The functions in this module load checkpoints with analog layers without a Trainer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning.pytorch as pl
from torch import nn

from aimc_pl.arguments import check_instance, check_path, listed, shown
from aimc_pl.errors import AnalogCheckpointWarning, UsageError
from aimc_pl.patches import patched
from aimc_pl.strategies import analog_parts
from aimc_pl.strategies.checkpoint_io import SealedCheckpointIO


def load_from_checkpoint[M: pl.LightningModule](module_class: type[M], checkpoint_path: str | Path, **kwargs: Any) -> M:
    """Return a LightningModule made from a checkpoint, with the layers analog that are analog there.

    For a checkpoint without analog layers this is ``module_class.load_from_checkpoint``, which cannot load others: an
    unmodified module has digital layers.

    Args:
        module_class: the class of the module.
        checkpoint_path: the file or the address (``https://…``).
        kwargs: those of Lightning's ``load_from_checkpoint``, such as ``map_location``, and arguments of the class that
            are not in the checkpoint.

    Raises:
        UsageError: if the file cannot be read, is damaged, is no checkpoint, names a class that is not admitted, or has
            an analog layer that the module does not have, or if ``module_class`` is no LightningModule or does
            not take an argument.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, pl.LightningModule)):
        raise UsageError(f"module_class must be the class of a LightningModule, got {shown(module_class)}")
    check_path("checkpoint_path", checkpoint_path)
    own = signature(module_class).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in own.values())
    for name in kwargs:
        if not (takes_all or name in own or name in signature(module_class.load_from_checkpoint).parameters):
            # Lightning would leave it out without a word.
            raise UsageError(f"{module_class.__name__} has no argument {name!r}: it has {listed([*own])}")
    load_state_dict = module_class.load_state_dict

    def load_as_saved(self: M, state: Any, *args: Any, **options: Any) -> Any:
        analog_parts.convert_as_saved(self, state)
        with loading_weights():
            return load_state_dict(self, state, *args, **options)

    kwargs = {"weights_only": True} | kwargs
    with analog_parts.admitted_classes(nn.Module()):
        # Lightning would not check the file.
        SealedCheckpointIO().load_checkpoint(checkpoint_path, weights_only=kwargs["weights_only"])
        with warnings.catch_warnings(), patched((module_class, "load_state_dict", load_as_saved)):
            warnings.simplefilter("ignore", AnalogCheckpointWarning)
            return module_class.load_from_checkpoint(checkpoint_path, **kwargs)


def load_checkpoint[M: nn.Module](module: M, checkpoint_path: str | Path) -> M:
    """Load the weights of a checkpoint into a module, whose layers become analog if they are analog there.

    Args:
        module: the module, with the names that the checkpoint has. It is changed in place.
        checkpoint_path: the file or the address (``https://…``). It may hold a bare state dict too, as
            ``torch.save(module.state_dict(), path)`` writes it.

    Returns:
        The module.

    Raises:
        UsageError: if the file cannot be read, is damaged, is no checkpoint, names a class that is not admitted, or has
            other analog layers than the module, or if ``module`` is no module.
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    check_path("checkpoint_path", checkpoint_path)
    with analog_parts.admitted_classes(module):
        checkpoint = SealedCheckpointIO().load_checkpoint(checkpoint_path)
    state = checkpoint.get("state_dict", checkpoint)
    analog_parts.convert_as_saved(module, state)
    analog_parts.check_devices(module, state)
    with loading_weights():
        module.load_state_dict(state)
    return module


@contextmanager
def loading_weights() -> Iterator[None]:
    """Context manager for a module that loads a state dict, in which torch and aihwkit list all that does not fit.

    Raises:
        UsageError: if something does not fit. The message has the first reason.
    """
    try:
        yield
    except RuntimeError as error:
        heading, _, reasons = str(error).partition("\n")
        first = " ".join((reasons or heading).strip().partition("\n")[0].split())
        raise UsageError(f"the checkpoint is of another network: {shorten(first, 160)}") from error
