"""Analog layers and their tiles, as the core meets them.

aihwkit is imported only where something analog has been found: a digital network runs without it.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_analog(value: Any) -> bool:
    """Whether a layer computes on crossbars, or a parameter stands for the weights of one, as aihwkit's contexts do.

    aihwkit's containers of such layers do not count.
    """
    if isinstance(value, nn.Module):
        # Of the class: a module may hand on all attributes of another one.
        return hasattr(type(value), "analog_tiles") and not value.IS_CONTAINER
    return hasattr(value, "analog_tile")


def analog_layers(module: nn.Module) -> list[Any]:
    """The analog layers of a module, without the containers that aihwkit makes analog too."""
    return [layer for layer in module.modules() if is_analog(layer)]


def reset_pending_updates(module: nn.Module) -> None:
    """Drop what backwards have left for the tiles' next update, which ``zero_grad`` does not."""
    for context in _contexts(module.parameters()):
        context.reset()


@contextmanager
def own_pending_errors(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Around a backward: what it leaves with the tiles is a copy of the errors, and with frozen tiles nothing.

    With micro-batches of one sample autograd makes the same tensor the gradient of a digital bias, to which the next
    micro-batch adds in place. Optimizers of aihwkit update tiles that require no grad like others.
    """
    contexts = _contexts(parameters)
    pending = [len(context.analog_grad_output) for context in contexts]
    yield
    for context, first in zip(contexts, pending, strict=True):
        if not context.requires_grad:
            context.reset()
        context.analog_grad_output[first:] = [error.clone() for error in context.analog_grad_output[first:]]


def time_update(module: nn.Module) -> float:
    """Seconds that a module's tiles take to apply their pending errors, tried on a copy; 0 for other modules."""
    if not is_analog(module):
        return 0.0
    from aihwkit.optim import AnalogSGD

    for context in _contexts(module.parameters()):
        # A copy of their graphs is neither possible nor needed.
        context.analog_input = [x.detach() for x in context.analog_input]
        context.analog_grad_output = [error.detach() for error in context.analog_grad_output]
    optimizer = AnalogSGD(copy.deepcopy(module).parameters(), lr=0.1)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def are_seeded(module: nn.Module) -> bool:
    """Whether all random numbers of a module's tiles can be repeated; aihwkit's own tiles draw others every time."""
    tiles = [tile for layer in analog_layers(module) for tile in layer.analog_tiles()]
    if not tiles:
        return True
    from aimc_pl.devices.mean_field import MeanFieldTile

    return all(isinstance(tile, MeanFieldTile) for tile in tiles)


def _contexts(parameters: Iterable[nn.Parameter]) -> list[Any]:
    return [parameter for parameter in parameters if is_analog(parameter)]
