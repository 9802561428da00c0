"""One stage of a step in a process of its own, the other stages as ghosts: shapes and types without values."""

from aimc_pl.ghosts.apart import Exchange, gradients_known, loss_of
from aimc_pl.ghosts.process import Flight, Ghosts, Message
from aimc_pl.ghosts.values import Ghost, Unknown, delivered

__all__ = ["Exchange", "Flight", "Ghost", "Ghosts", "Message", "Unknown", "delivered", "gradients_known", "loss_of"]
