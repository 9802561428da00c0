"""This module keeps Lightning from printing what is of no use to the users of this package."""

import logging
import warnings


def quiet_evaluation() -> None:
    """Silence, until the filters of warnings are restored, Lightning's warning that a checkpoint has another folder."""
    # Every run of the command has a new folder, and the warning is about the best checkpoints, which only a fit saves.
    warnings.filterwarnings(
        "ignore", "The dirpath has changed from", module=r"lightning\.pytorch\.callbacks\.model_checkpoint"
    )


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
