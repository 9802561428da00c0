"""A ring of messages in memory that two processes of one machine share.

The writer first writes a slot, then increases the count of written slots. The reader first reads the count, then the
slot. This needs a processor that keeps stores in order, and loads in order. x86 does. ARM and POWER do not, and Python
has no memory fence. See :data:`IS_ORDERED`.
"""

import mmap
import os
import platform
from weakref import finalize

import torch
from torch import Tensor

from aimc_pl.messages import ALIGNMENT, aligned

IS_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
"""Whether the processor of this machine keeps the order of stores and loads that a ring relies on."""
_NAME = "aimc_pl ring"
_SLOTS = 4
_WRITTEN, _READ, _CLOSED = (line * ALIGNMENT // 8 for line in range(3))
"""Where the counts are, as indices of 8-byte numbers. Each count has a cache line of its own."""
_START = 3 * ALIGNMENT

Place = tuple[int, int]
"""Where a ring is: the ID of the process that has made the ring, and the ring's file descriptor in that process. No
other user can open the descriptor. The kernel frees the memory when the last process that uses it ends, in whatever
way."""


class Ring:
    """A ring of messages that one process writes and another process reads.

    Args:
        descriptor: the file descriptor of the ring's memory. The ring owns and closes it.
    """

    def __init__(self, descriptor: int) -> None:
        finalize(self, os.close, descriptor)
        self.place: Place = os.getpid(), descriptor
        memory = mmap.mmap(descriptor, 0)
        self.slot_size = (len(memory) - _START) // _SLOTS
        # A memoryview reads and writes single numbers faster than a tensor does.
        self._bytes = memoryview(memory)
        self._counts = self._bytes[:_START].cast("q")
        self._tensor = torch.frombuffer(memory, dtype=torch.uint8)

    @classmethod
    def create(cls, slot_size: int) -> "Ring":
        """Return a new ring whose slots have room for ``slot_size`` bytes."""
        descriptor = os.memfd_create(_NAME)
        # Reserve the memory now. If it were missing later, the system would kill the process.
        os.posix_fallocate(descriptor, 0, _START + _SLOTS * aligned(slot_size))
        return cls(descriptor)

    @classmethod
    def open(cls, place: Place) -> "Ring":
        """Open the ring of another process.

        Raises:
            OSError: if that process has ended, or if ``place`` is no ring.
        """
        process, number = place
        descriptor = os.open(f"/proc/{int(process)}/fd/{int(number)}", os.O_RDWR)
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{_NAME}"):
            os.close(descriptor)
            raise OSError(f"{place} is no ring")
        return cls(descriptor)

    @property
    def has_space(self) -> bool:
        """Whether another message can be written."""
        return self._counts[_WRITTEN] - self._counts[_READ] < _SLOTS

    @property
    def has_message(self) -> bool:
        """Whether a message can be read."""
        return self._counts[_WRITTEN] > self._counts[_READ]

    @property
    def is_closed(self) -> bool:
        """Whether the process at one of the two ends has closed the ring."""
        return self._counts[_CLOSED] > 0

    def close(self) -> None:
        """Tell the process at the other end that no message follows."""
        self._counts[_CLOSED] = 1

    def write(self, header: bytes) -> Tensor:
        """Write a header into the next slot. Return the rest of the slot, to write the body into."""
        start = self._slot(self._counts[_WRITTEN])
        self._bytes[start : start + 8] = len(header).to_bytes(8, "little")
        self._bytes[start + 8 : start + 8 + len(header)] = header
        return self._tensor[start + aligned(8 + len(header)) : start + self.slot_size]

    def written(self) -> None:
        """Declare the next slot complete, so that the reader may read it."""
        self._counts[_WRITTEN] += 1

    def read(self) -> tuple[bytes, Tensor]:
        """Return the header of the next message, and the rest of its slot, which contains the body."""
        start = self._slot(self._counts[_READ])
        length = int.from_bytes(self._bytes[start : start + 8], "little")
        header = bytes(self._bytes[start + 8 : start + 8 + length])
        return header, self._tensor[start + aligned(8 + length) : start + self.slot_size]

    def was_read(self) -> None:
        """Release the slot of the next message, so that the writer may use it again."""
        self._counts[_READ] += 1

    def _slot(self, number: int) -> int:
        return _START + number % _SLOTS * self.slot_size


def slot_for(header: bytes, size: int) -> int:
    """Return how many bytes of a slot a message needs, given its header and the size of its body."""
    return aligned(8 + len(header)) + size
