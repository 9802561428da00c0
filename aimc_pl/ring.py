"""A ring of messages in memory that two processes of one machine share.

Who writes a slot counts it afterwards, and who reads the count reads the slot afterwards. This needs a processor that
keeps stores in their order, and loads in theirs: x86 does, ARM and POWER do not, and Python has no fence. See
:data:`IS_ORDERED`.
"""

import mmap
import os
import platform
from weakref import finalize

import torch
from torch import Tensor

from aimc_pl.messages import ALIGNMENT, aligned

IS_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
"""Whether this machine's processor keeps the order that a ring relies on."""
_NAME = "aimc_pl ring"
_SLOTS = 4
_WRITTEN, _READ, _CLOSED = (line * ALIGNMENT // 8 for line in range(3))
"""Where the counts are, in a cache line each, as numbers of 8 bytes."""
_START = 3 * ALIGNMENT

Place = tuple[int, int]
"""Where a ring is: the process that has made it, and its file descriptor there. No other user can open that, and the
kernel frees the memory with the last process that uses it, however it ends."""


class Ring:
    """Messages that one process writes and another one reads.

    Args:
        descriptor: of its memory, which is this object's from now on.
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
        """A new one, for messages of at most so many bytes."""
        descriptor = os.memfd_create(_NAME)
        # Reserved now: memory that is missing later would end the process.
        os.posix_fallocate(descriptor, 0, _START + _SLOTS * aligned(slot_size))
        return cls(descriptor)

    @classmethod
    def open(cls, place: Place) -> "Ring":
        """That of another process.

        Raises:
            OSError: if the process has ended, or that is no ring.
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
        """Whether there is one to read."""
        return self._counts[_WRITTEN] > self._counts[_READ]

    @property
    def is_closed(self) -> bool:
        """Whether the process at one of its ends has given up."""
        return self._counts[_CLOSED] > 0

    def close(self) -> None:
        """Tell the other end that nothing follows."""
        self._counts[_CLOSED] = 1

    def write(self, header: bytes) -> Tensor:
        """Write a header into the next slot; returns the rest of the slot, for the body."""
        start = self._slot(self._counts[_WRITTEN])
        self._bytes[start : start + 8] = len(header).to_bytes(8, "little")
        self._bytes[start + 8 : start + 8 + len(header)] = header
        return self._tensor[start + aligned(8 + len(header)) : start + self.slot_size]

    def written(self) -> None:
        """The next slot is complete."""
        self._counts[_WRITTEN] += 1

    def read(self) -> tuple[bytes, Tensor]:
        """The header of the next message, and the rest of its slot, with the body."""
        start = self._slot(self._counts[_READ])
        length = int.from_bytes(self._bytes[start : start + 8], "little")
        header = bytes(self._bytes[start + 8 : start + 8 + length])
        return header, self._tensor[start + aligned(8 + length) : start + self.slot_size]

    def was_read(self) -> None:
        """The next slot can be written again."""
        self._counts[_READ] += 1

    def _slot(self, number: int) -> int:
        return _START + number % _SLOTS * self.slot_size


def slot_for(header: bytes, size: int) -> int:
    """The slot that a message with a body of so many bytes needs."""
    return aligned(8 + len(header)) + size
