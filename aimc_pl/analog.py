"""This module finds and handles analog layers and their tiles for the core.

aihwkit is imported only when something analog has been found. A digital network runs without it.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from aimc_pl.errors import UsageError

OF_IMAGES = ("patches", "image_sizes")
"""The attributes of a tile that follow from the size of the images."""


def is_analog(value: Any) -> bool:
    """Return whether a layer computes on crossbars, or a parameter stands for the weights of a crossbar.

    Such parameters are aihwkit's contexts. aihwkit's containers of analog layers do not count.
    """
    if isinstance(value, nn.Module):
        # The class is tested, because a module may pass on all attributes of another module.
        return hasattr(type(value), "analog_tiles") and not value.IS_CONTAINER
    return hasattr(value, "analog_tile")


def learns_by_pulses(value: Any) -> bool:
    """Return whether a parameter stands for the weights of a crossbar, and these have no digital parameter beside it.

    In mixed precision, and on aihwkit's tiles for inference, an optimizer trains a digital parameter of the tile.
    """
    return not isinstance(value, nn.Module) and is_analog(value) and value.analog_tile.shared_weights is None


def analog_layers(module: nn.Module) -> list[Any]:
    """Return the analog layers of a module, without the containers that aihwkit makes analog too."""
    return [layer for layer in module.modules() if is_analog(layer)]


def inside_analog_layers(module: nn.Module) -> set[int]:
    """Return the identities of the modules that analog layers consist of, such as their tiles."""
    return {id(part) for layer in analog_layers(module) for part in layer.modules() if part is not layer}


def reset_pending_updates(module: nn.Module) -> None:
    """Drop what backwards have left for the tiles' next update.

    ``zero_grad`` of an optimizer drops it too, after :func:`aimc_pl.devices.make_analog_aware`.
    """
    for context in _contexts(module.parameters()):
        context.reset()


class PendingUpdates:
    """What backwards have left for the next updates of tiles, taken away from the tiles until it is given back.

    Args:
        parameters: the parameters that stand for the tiles. Others do not count.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        self._taken: list[tuple[Any, list[Any], list[Any]]] = []
        for context in _contexts(parameters):
            self._taken.append((context, context.analog_input, context.analog_grad_output))
            context.reset()

    def give_back(self) -> None:
        """Put what was taken before what backwards have left since then."""
        for context, inputs, errors in self._taken:
            context.analog_input = inputs + context.analog_input
            context.analog_grad_output = errors + context.analog_grad_output
        self._taken = []


def left_out(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Any]:
    """Return the parameters by which crossbars of a module could learn, and which no optimizer has.

    Frozen parameters do not count.
    """
    learnt = [_learnt(context) for context in _contexts(module.parameters())]
    if not learnt:
        return []
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [parameter for parameter in learnt if parameter.requires_grad and id(parameter) not in known]


def drop_left_out(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Drop what backwards have left for tiles that no optimizer updates. It would pile up."""
    for context in _contexts(left_out(module, optimizers)):
        context.reset()


@contextmanager
def own_pending_errors(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager for a backward that leaves tiles copies of its errors, and leaves frozen tiles nothing.

    The copies are needed with micro-batches of one sample: autograd makes the error itself the gradient of a digital
    bias, to which the next micro-batch adds in place. Frozen tiles must be left nothing because aihwkit's optimizers
    update tiles that require no grad like all others.
    """
    contexts = _contexts(parameters)
    pending = [len(context.analog_grad_output) for context in contexts]
    yield
    for context, first in zip(contexts, pending, strict=True):
        if not context.requires_grad:
            context.reset()
        context.analog_grad_output[first:] = [error.clone() for error in context.analog_grad_output[first:]]


def known_images(parameter: nn.Parameter) -> Any:
    """Return what the tile behind a parameter keeps for images of one size, or ``None`` if it keeps nothing.

    After images of another size it is another object.
    """
    tile = getattr(parameter, "analog_tile", None)
    return next((getattr(tile, name) for name in OF_IMAGES if hasattr(tile, name)), None)


def images_of_another_size(tile: str) -> UsageError:
    """Return the error to raise when a tile would confuse the images of two micro-batches.

    aihwkit's own tiles know the images of one size, also in the backwards that are still to come.
    """
    return UsageError(
        f"images of another size reach {tile!r} while others are under way, and its tile knows one size at a time: use "
        "images of one size, schedule='none', or backend='mean_field' with devices=1"
    )


def time_update(module: nn.Module) -> float:
    """Return the seconds that a module's tiles take to apply their pending errors; 0 if the module is not analog.

    The update is made on a copy of the module.
    """
    if not is_analog(module):
        return 0.0
    from aihwkit.optim import AnalogSGD

    for context in _contexts(module.parameters()):
        # The graphs of these tensors cannot be copied, and are not needed.
        context.analog_input = [x.detach() for x in context.analog_input]
        context.analog_grad_output = [error.detach() for error in context.analog_grad_output]
    copied = copy.deepcopy(module)
    for parameter, original in zip(copied.parameters(), module.parameters(), strict=True):
        parameter.grad = original.grad
    optimizer = AnalogSGD(copied.parameters(), lr=0.1)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def are_seeded(module: nn.Module) -> bool:
    """Return whether a module's tiles can draw the same random numbers again. aihwkit's own tiles cannot."""
    tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
    if not tiles:
        return True
    from aimc_pl.devices.mean_field import MeanFieldTile

    return all(isinstance(tile, MeanFieldTile) for tile in tiles)


def _learnt(context: Any) -> Any:
    """Return the parameter by which a tile learns: its context, or the digital parameter beside it."""
    return context if learns_by_pulses(context) else context.analog_tile.shared_weights


def _contexts(parameters: Iterable[nn.Parameter]) -> list[Any]:
    return [parameter for parameter in parameters if is_analog(parameter)]
