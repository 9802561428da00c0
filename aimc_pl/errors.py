"""The error of a request that cannot work."""


class UsageError(ValueError):
    """A configuration, a model or data that cannot be used as asked; the message says why and what to do instead."""
