"""This module defines the errors for requests that cannot work and for lost processes, and a warning."""


class UsageError(ValueError):
    """A configuration, model or data that cannot be used as asked. The message says why and what to do instead."""


class PeerError(RuntimeError):
    """An error raised when another process of the pipeline has ended, hangs or cannot be reached."""


class AnalogCheckpointWarning(UserWarning):
    """A warning that a checkpoint with analog layers has been read without the strategy."""
