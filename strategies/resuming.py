"""The callback in this module brings a resumed fit to the place where the checkpoint was made.

The fit then continues with the random numbers and the batches that would have come next.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, override
from zlib import crc32

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from aimc_pl.analog import inside_analog_layers
from aimc_pl.private_torch import tree_leaves, tree_map
from aimc_pl.random_states import RandomStates, set_state, state_of
from aimc_pl.reachable import GENERATORS
from aimc_pl.strategies.private_lightning import make_iterator_in_epoch, set_epoch, train_fetcher, train_loader


class Resuming(Callback):
    """A callback that remembers how an epoch began, and brings a resumed fit to the same place in the epoch.

    Batches are not part of a checkpoint. A fit that is resumed within an epoch sets the random states to what they were
    when the epoch began, and fetches the batches of the epoch up to that place once more. This works with every data
    loader that gives the same batches from the same random states.
    """

    def __init__(self) -> None:
        self._loaders: list[Any] = []
        self._random: RandomStates | None = None
        self._before_iterator: list[Any] = []

    def note_loader(self, loader: object, module: "pl.LightningModule") -> None:
        """Note a loader of training batches. The strategy calls this before Lightning makes the loader's iterator."""
        self._loaders.append(loader)
        # Tiles are left out, because the random state of a tile is in its own state dict.
        tiles = inside_analog_layers(module)
        modules = [part for part in module.modules() if id(part) not in tiles]
        datamodule = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._random = RandomStates(_generators_of([*modules, *self._loaders, datamodule]))
        self._before_iterator = self._random.read()

    @override
    def on_sanity_check_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Keep the random states that a checkpoint has restored, those of tiles too.

        The fit that made the checkpoint did not check there. Lightning only keeps torch's, NumPy's and Python's.
        """
        if trainer.ckpt_path is not None:
            self._restored = RandomStates(_generators_of(pl_module.modules()))
            self._before_check = self._restored.read()

    @override
    def on_sanity_check_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.ckpt_path is not None:
            self._restored.write(self._before_check)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Keep the random states of tiles. A resumed fit does not repeat a validation that followed the checkpoint."""
        tiles = inside_analog_layers(pl_module) if trainer.state.fn == TrainerFn.FITTING else ()
        self._of_tiles = _generators_of(part for part in pl_module.modules() if id(part) in tiles)
        self._before_validation = [state_of(generator) for generator in self._of_tiles]

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for generator, state in zip(self._of_tiles, self._before_validation, strict=True):
            set_state(generator, state)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._watch(trainer)

    def state(self, trainer: "pl.Trainer", gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """Return what a checkpoint needs to resume the fit at this place; empty if no loader is known.

        Args:
            trainer: the trainer of the fit.
            gather: returns the values of all processes. Each process holds the generators of its own stage.
        """
        if self._random is None:
            return {}
        loader = train_loader(trainer)
        state = {"now": gather(self._random.read())}
        if isinstance(loader, _Watched):
            state |= {"beginning": loader.beginning, "first_batch": loader.first_batch}
        return tree_map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value, state)

    def go_on(self, trainer: "pl.Trainer", state: dict[str, Any], rank: int) -> None:
        """Set the random states, and the iterators of the data loaders, to where a checkpoint was made.

        Args:
            trainer: the trainer, at the start of the training, with its own state restored.
            state: what :meth:`state` returned for the checkpoint.
            rank: the rank of this process.
        """
        self._watch(trainer)
        loop = trainer.fit_loop
        progress: Any = loop.epoch_loop.batch_progress
        in_epoch = loop.restarting and progress.current.processed > 0 and not progress.is_last_batch
        if in_epoch and "beginning" in state and not _keep_their_place(trainer):
            self._fetch_again(trainer, state, progress.current.processed)
        now = state["now"]
        # A rank that the checkpoint does not have takes the generators of rank 0, which holds the last stage.
        self._write(now[rank] if rank < len(now) else now[0])
        if not loop.restarting:
            make_iterator_in_epoch(trainer)
        elif progress.is_last_batch and progress.current.completed < progress.current.processed:
            # The checkpoint is from the epoch's last mini-batch. The next epoch begins, with the existing iterator.
            iter(train_fetcher(trainer))
            # Lightning would not count the beginning of that epoch, and resume wrongly from a checkpoint within it.
            loop.reset_restart_stage()

    def _watch(self, trainer: "pl.Trainer") -> None:
        loader, fetcher = train_loader(trainer), train_fetcher(trainer)
        if not self._loaders or self._random is None:
            return
        assert self._random is not None
        if not isinstance(loader, _Watched):
            loader.__class__ = type(f"Watched{type(loader).__name__}", (_Watched, type(loader)), {})
        loader.random = self._random
        # If the number of batches is not known, Lightning has fetched the first batch when it made the iterator.
        loader.beginning = [self._before_iterator] * (2 if fetcher.fetched else 1)
        self._loaders = []

    def _write(self, states: list[Any]) -> None:
        assert self._random is not None
        if not self._random.write(states):
            rank_zero_warn(
                "the module and the data loaders do not hold as many random generators as when the checkpoint was "
                "made: the states of these generators are not restored"
            )

    def _fetch_again(self, trainer: "pl.Trainer", state: dict[str, Any], number: int) -> None:
        """Make the iterator of the epoch again, and fetch its first ``number`` batches."""
        loader, fetcher = train_loader(trainer), train_fetcher(trainer)
        before_iterator, before_batches = state["beginning"]
        set_epoch(trainer)
        self._write(before_iterator)
        iter(fetcher)
        self._write(before_batches)
        for _ in range(number):
            next(fetcher, None)
        # Lightning will add the number of batches that the checkpoint counts.
        fetcher.fetched -= number
        if state["first_batch"] not in (None, loader.first_batch):
            rank_zero_warn(
                "the data loader gives other batches than when this epoch began, so that some will repeat and some "
                "will be missed: resume from the end of an epoch, or use one with state_dict and load_state_dict"
            )
        # Lightning gives this warning for every loader that does not keep its place itself.
        warnings.filterwarnings("ignore", message=".*ended before the epoch ended and your dataloader is")


class _Watched(CombinedLoader):
    """Lightning's loader of training batches, extended to remember how an epoch began.

    Attributes:
        random: reads the random states.
        beginning: the random states before the iterator was made, and those before its first batch was fetched.
        first_batch: a checksum of the first batch; ``None`` if it is not known.
    """

    random: RandomStates
    beginning: list[list[Any]]
    first_batch: int | None = None

    @override
    def __iter__(self) -> Any:
        self.beginning = [self.random.read()]
        return super().__iter__()

    @override
    def __next__(self) -> Any:
        if len(self.beginning) > 1:
            return super().__next__()
        self.beginning.append(self.random.read())
        fetched = super().__next__()
        self.first_batch = _checksum(fetched[0])
        return fetched


def _generators_of(owners: Iterable[object]) -> list[Any]:
    """Return the random generators among the attributes of objects, and among the attributes of these attributes."""
    held = [value for owner in owners if hasattr(owner, "__dict__") for value in vars(owner).values()]
    held += [inner for value in held if hasattr(value, "__dict__") for inner in vars(value).values()]
    return [value for value in held if isinstance(value, GENERATORS)]


def _keep_their_place(trainer: "pl.Trainer") -> bool:
    return all(hasattr(loader, "load_state_dict") for loader in train_loader(trainer).flattened)


def _checksum(batch: Any) -> int:
    """Return a checksum of the tensors in a batch."""
    checksum = 0
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            checksum = crc32(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), checksum)
    return checksum
