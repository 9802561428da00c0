"""One stage of a step in a process of its own, with placeholders for the values of the other stages.

Every process runs the whole, unmodified ``training_step``. Values that belong to other stages are *ghosts* there:
placeholders that have a shape and a type, but no data.
"""

from aimc_pl.ghosts.apart import Exchange, gradients_known, loss_of
from aimc_pl.ghosts.process import Flight, Ghosts, Message
from aimc_pl.ghosts.values import Ghost, Unknown, delivered, is_ghost

__all__ = [
    "Exchange",
    "Flight",
    "Ghost",
    "Ghosts",
    "Message",
    "Unknown",
    "delivered",
    "gradients_known",
    "is_ghost",
    "loss_of",
]
