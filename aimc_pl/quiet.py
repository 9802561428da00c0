"""This module keeps Lightning from printing what is of no use to the users of this package."""

import logging
import warnings


def quiet_lightning() -> None:
    """Silence one warning of Lightning about its own code, and its advertisements."""
    # Lightning itself uses a name that torch will drop, which its users cannot change.
    warnings.filterwarnings(
        "ignore",
        r".isinstance\(treespec, LeafSpec\). is deprecated",
        module=r"lightning\.pytorch\.utilities\._pytree",
    )
    # Every Trainer advertises other packages, each in a line that begins with these words.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith("💡 Tip: For seamless cloud"))
