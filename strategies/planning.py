"""Before training starts: find the backbone and where to split it, on a copy that is thrown away."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aimc_pl.devices import detach_pending_updates
from aimc_pl.errors import UsageError
from aimc_pl.microbatch import batch_size, split_batch
from aimc_pl.partition import partition


@dataclass(frozen=True)
class Plan:
    """How a LightningModule is to be pipelined.

    Attributes:
        backbone: name of the submodule, ``""`` for the LightningModule itself.
        args: positional arguments of an example call, one micro-batch.
        kwargs: keyword arguments of that call.
        split_at: names, within the backbone, of the modules with which stages 1 … M−1 begin.
        before: names of the parameters that training_step uses on the way to the backbone.
    """

    backbone: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    split_at: list[str]
    before: frozenset[str]

    def other_parameters(self, module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The module's parameters outside the backbone: those on the way to it, and the others."""
        staged = {id(parameter) for parameter in module.get_submodule(self.backbone).parameters()}
        others = [(name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in staged]
        return (
            [parameter for name, parameter in others if name in self.before],
            [parameter for name, parameter in others if name not in self.before],
        )


def get_backbone(module: "pl.LightningModule", name: str | None) -> nn.Module:
    """The submodule of that name, the module itself for ``None`` and ``""``.

    Raises:
        UsageError: if there is none.
    """
    try:
        return module.get_submodule(name or "")
    except AttributeError:
        children = ", ".join(child for child, _ in module.named_children()) or "none"
        raise UsageError(
            f"backbone={name!r} is no submodule of {type(module).__name__}; its submodules are: {children}"
        ) from None


def make_plan(
    trainer: "pl.Trainer",
    backbone: str | None,
    num_stages: int,
    num_microbatches: int,
    split_at: Sequence[str] | None,
) -> Plan:
    """Run the training_step of a copy of the module on the first micro-batch, up to where it calls the backbone.

    The module itself, its data order and the random states stay as they are.

    Raises:
        UsageError: if the batch cannot be split or no backbone is found.
        PartitionError: if the backbone cannot be split into stages.
    """
    module = trainer.lightning_module
    get_backbone(module, backbone)
    replica = replicate(module)
    with isolate_rng(), _first_batch(trainer) as batch:
        if batch_size(batch) < num_microbatches:
            raise UsageError(
                f"A mini-batch of {batch_size(batch)} samples cannot be split into num_microbatches={num_microbatches} "
                "micro-batches. Lower num_microbatches or raise the batch size."
            )
        microbatch = split_batch(batch, num_microbatches)[0]
        with trainer.precision_plugin.train_step_context():
            found = _find_backbone_call(replica, backbone, microbatch)
        before = _names(replica, parameters_behind(tree_leaves((found.args, found.kwargs))))
        network = replica.get_submodule(found.name)
        with trainer.precision_plugin.train_step_context():
            parts = partition(network, num_stages, found.args, found.kwargs, split_at)
    return Plan(found.name, found.args, found.kwargs, parts.split_at, before)


def replicate(module: "pl.LightningModule") -> "pl.LightningModule":
    """A copy of the module to try things on: it logs nothing, and runs outside the pipeline.

    It shares the trainer, and callables (a partial that makes the optimizer, say) as deepcopy shares functions.
    """
    detach_pending_updates(module)
    attributes = [value for submodule in module.modules() for value in vars(submodule).values()]
    shared = [module.trainer, *(v for v in attributes if callable(v) and not isinstance(v, nn.Module))]
    replica = copy.deepcopy(module, {id(value): value for value in shared})
    replica.trainer = module.trainer
    replica.log = _discard  # pyright: ignore[reportAttributeAccessIssue]
    for submodule in replica.modules():
        # what the strategy puts in the backbone's place while the pipeline runs
        vars(submodule).pop("forward", None)
    return replica


def _discard(*args: Any, **kwargs: Any) -> None:
    pass


def parameters_behind(values: Sequence[Any]) -> set[int]:
    """The ids of the leaf tensors that autograd would reach from ``values``."""
    pending = [value.grad_fn for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
    seen, leaves = set(pending), set()
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(id(leaf))
        following = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= following
        pending.extend(following)
    return leaves


def _names(module: nn.Module, ids: set[int]) -> frozenset[str]:
    return frozenset(name for name, parameter in module.named_parameters() if id(parameter) in ids)


def call_training_step(module: "pl.LightningModule", batch: Any, batch_idx: int) -> Any:
    """Run training_step with as many arguments as it takes, as Lightning's loops do."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)


class _BackboneCall(BaseException):
    """Raised in place of the backbone's forward; not an Exception, so that no training_step catches it."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs


def _find_backbone_call(module: "pl.LightningModule", backbone: str | None, microbatch: Any) -> _BackboneCall:
    total = sum(parameter.numel() for parameter in module.parameters())
    candidates = {
        name: candidate
        for name, candidate in module.named_modules()
        if (name == backbone if backbone is not None else 2 * sum(p.numel() for p in candidate.parameters()) >= total)
    }
    for name, candidate in candidates.items():
        candidate.forward = _raise_call(name)
    try:
        call_training_step(module, microbatch, 0)
    except _BackboneCall as found:
        return found
    finally:
        for candidate in candidates.values():
            del candidate.forward
    if backbone is not None:
        raise UsageError(f"training_step does not call backbone={backbone!r}. Name the submodule that it calls.")
    raise UsageError(
        "No backbone found: training_step calls no submodule (nor the module's own forward) that holds at least half "
        "of the parameters. Move the layers into one submodule, or into forward, or name one with backbone=."
    )


def _raise_call(name: str) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _BackboneCall(name, args, kwargs)

    return forward


@contextmanager
def _first_batch(trainer: "pl.Trainer") -> Iterator[Any]:
    """The first training batch, as training_step will get it, without moving the loaders' own generators."""
    loaders = _request_dataloader(trainer.fit_loop._data_source)
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    owners = [x for loader in combined.flattened for x in (loader, getattr(loader, "sampler", None))]
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    first = next(iter(combined), None)
    if first is None:
        raise UsageError("The training dataloader is empty: there is no batch to train on.")
    batch = trainer.precision_plugin.convert_input(first[0])
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    yield call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
