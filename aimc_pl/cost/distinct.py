"""This module counts the numbers of tensors that may be views of one another."""

import numpy as np
from torch import Tensor

from aimc_pl.private_torch import storage_of


class Distinct:
    """Counts numbers in memory, each of them once, whichever and however many views show it.

    The caller keeps the tensors alive: other tensors could take the memory of those that are freed.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], np.ndarray] = {}
        """For each storage, and the size of a number in it, which numbers have been counted."""

    def add(self, tensor: Tensor) -> int:
        """Count the numbers of a tensor, and return how many of them are new."""
        key = storage_of(tensor), tensor.itemsize
        if key not in self._seen:
            self._seen[key] = np.zeros(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=bool)
        seen = self._seen[key]
        before = np.count_nonzero(seen)
        # numpy, because torch's own operations would be counted here as those of the step
        np.lib.stride_tricks.as_strided(seen[tensor.storage_offset() :], tensor.shape, tensor.stride())[...] = True
        return int(np.count_nonzero(seen) - before)
