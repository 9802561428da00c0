"""The errors of requests that cannot work, and of processes that have gone."""


class UsageError(ValueError):
    """A configuration, a model or data that cannot be used as asked; the message says why and what to do instead."""


class PeerError(RuntimeError):
    """Another process of the pipeline has ended, hangs or cannot be reached."""


class AnalogCheckpointWarning(UserWarning):
    """A checkpoint with analog layers has been read."""
