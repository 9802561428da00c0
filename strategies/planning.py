"""From the first call of the backbone to the stages: which submodule, where to split it, who else trains with it."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from aimc_pl.devices import detach_pending_updates
from aimc_pl.errors import UsageError
from aimc_pl.partition import partition


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


def backbone_candidates(module: "pl.LightningModule", name: str | None) -> dict[str, nn.Module]:
    """The submodules whose call, the outermost first, enters the pipeline.

    The named one, or else all that hold at least half of the parameters.
    """
    if name is not None:
        return {name: get_backbone(module, name)}
    total = sum(parameter.numel() for parameter in module.parameters())
    return {
        name: candidate
        for name, candidate in module.named_modules()
        if 2 * sum(parameter.numel() for parameter in candidate.parameters()) >= total
    }


def measured_split(
    module: "pl.LightningModule", backbone: str, num_stages: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[str]:
    """Where to split the backbone for stages of equal cost, measured on a copy; random states stay as they are.

    Raises:
        PartitionError: if it cannot be split.
    """
    with isolate_rng():
        return partition(replicate(module).get_submodule(backbone), num_stages, args, kwargs).split_at


def other_parameters(
    module: "pl.LightningModule", stages: Sequence[nn.Module], inputs: Sequence[Any]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The module's parameters outside the stages: those that the backbone's inputs came through, and the others."""
    inside = {id(parameter) for stage in stages for parameter in stage.parameters()}
    before = parameters_behind(inputs)
    others = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    return [p for p in others if id(p) in before], [p for p in others if id(p) not in before]


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


def replicate(module: "pl.LightningModule") -> "pl.LightningModule":
    """A copy of the module to try things on: it logs nothing, and runs outside the pipeline.

    It shares the trainer, and callables (a partial that makes the optimizer, say) as deepcopy shares functions.
    """
    detach_pending_updates(module)
    attributes = [value for submodule in module.modules() for value in vars(submodule).values()]
    shared = [module.trainer, *(v for v in attributes if callable(v) and not isinstance(v, nn.Module))]
    replica = copy.deepcopy(module, {id(value): value for value in shared})
    for submodule in replica.modules():
        # what the strategy puts in the backbone's place while the pipeline runs
        vars(submodule).pop("forward", None)
    replica.trainer = module.trainer
    replica.log = _discard  # pyright: ignore[reportAttributeAccessIssue]
    return replica


def _discard(*args: Any, **kwargs: Any) -> None:
    pass
