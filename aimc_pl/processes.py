"""The processes of a run, one per stage: what they tell each other besides activations and errors.

When one is lost, all others end, and all of them say the same: what the first one has told that failed. A process that
waits in vain tells for whom; from one to the next this leads to the one that holds up all others.
"""

import os
import select
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, Protocol
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, PrefixStore  # pyright: ignore[reportPrivateImportUsage], documented

from aimc_pl.errors import PeerError, UsageError
from aimc_pl.messages import Message, aligned, decode, encode, read
from aimc_pl.private_torch import default_store
from aimc_pl.rendezvous import within

_GRACE = 5.0
"""Seconds in which a process that is lost tells why, or for whom it waits itself."""
_FIRST = "first failure"
_runs = count()
"""Processes that are connected may run one fit after another; each has a part of the store to itself."""


def rank_of(stage: int, num_stages: int) -> int:
    """The process of a stage, and the stage of a process: rank 0, where losses are logged, holds the last one."""
    return num_stages - 1 - stage


class Closes(Protocol):
    """What others wait at."""

    def close(self) -> None:
        """Let them wait no longer."""
        ...


class Processes:
    """All processes of a run, as one of them sees them.

    Args:
        num_stages: M, their number.
        timeout: seconds to wait for another process. May be changed.
        node: a number of this machine. Only processes with the same one share memory.

    Raises:
        PeerError: by all methods, if another process has ended, or keeps this one waiting for longer.
    """

    def __init__(self, num_stages: int, timeout: float, node: int) -> None:
        self.rank = dist.get_rank()
        self.stage = rank_of(self.rank, num_stages)
        self.num_stages = num_stages
        self.timeout = timeout
        self.links: list[Closes] = []
        """Closed when this process fails."""
        self._store = PrefixStore(f"aimc_pl {next(_runs)}", default_store())
        self._exchanges = 0
        self._near: dict[int, select.poll] = {}
        for rank, (other, process) in enumerate(self.gather((node, os.getpid()))):
            if other == node and rank != self.rank:
                self._near[rank] = self._watch(rank, process)

    def name(self, rank: int) -> str:
        """Of a process, for messages."""
        return f"rank {rank} (stage {rank_of(rank, self.num_stages)})"

    def is_near(self, rank: int) -> bool:
        """Whether a process is on this machine."""
        return rank in self._near

    def has_ended(self, rank: int) -> bool:
        """Whether a process is known to have ended, which only those of one machine know of each other."""
        return rank in self._near and bool(self._near[rank].poll(0))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; see :class:`aimc_pl.messages.Message` for what they may be."""
        self._exchanges += 1
        others = range(1, self.num_stages)
        if self.rank:
            self._send(value, [0])
            return self._receive(0)
        values = [value, *map(self._receive, others)]
        self._send(values, others)
        return values

    def _send(self, value: Any, ranks: Iterable[int]) -> None:
        message = Message(value)
        header = encode([self._exchanges, message.description])
        content = torch.empty(aligned(len(header)) + message.size, dtype=torch.uint8)
        content[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        message.write(content[aligned(len(header)) :])
        sizes = torch.tensor([len(header), message.size])
        for rank in ranks:
            self.send(sizes, rank)
            self.send(content, rank)

    def _receive(self, rank: int) -> Any:
        header, size = self.receive(torch.empty(2, dtype=torch.int64), rank).tolist()
        content = self.receive(torch.empty(aligned(header) + size, dtype=torch.uint8), rank)
        number, description = decode(content[:header].numpy().tobytes())
        if number != self._exchanges:
            raise UsageError(
                f"{self.name(rank)} and {self.name(self.rank)} do not take the same way: one has validated, saved or "
                "logged where the other has not. Let all processes do the same"
            )
        return read(description, content[aligned(header) :])

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor."""
        with self.answering(rank):
            work = dist.isend(tensor, rank)
        self.finish(work, rank)

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Receive into a tensor."""
        with self.answering(rank):
            work = dist.irecv(tensor, rank)
        self.finish(work, rank)
        return tensor

    def finish(self, work: "dist.Work | None", rank: int) -> None:
        """Wait for a transfer from or to another process."""
        assert work is not None
        with self.answering(rank):
            work.wait(timedelta(seconds=self.timeout))

    @contextmanager
    def answering(self, rank: int) -> Iterator[None]:
        """Around what torch.distributed fails at if another process does not answer."""
        try:
            yield
        except RuntimeError as error:
            raise self.lost(rank) from error

    def lost(self, rank: int) -> PeerError:
        """What to raise where another process does not answer in time, or any more."""
        culprit = [0]  # which serves the store
        try:
            culprit = within(2 * _GRACE, lambda: self._culprit(rank))
            told = self.tell(self._charge(culprit))
        except TimeoutError:
            told = self._charge(culprit)
        except DistError:
            # The store goes with rank 0, a moment before the system says that this process has ended.
            told = self._charge(culprit, gone=0)
        return PeerError(f"{told}. See its own output. The run can be continued from the last checkpoint")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends, and why."""
        if not isinstance(error, PeerError):
            text = " ".join(str(error).split())
            with suppress(TimeoutError, DistError):  # without the store, there is nobody to be told
                self.tell(f"{self.name(self.rank)} has failed with {type(error).__name__}{text and ': '}{text}")
        for link in self.links:
            link.close()

    def is_first(self, what: str) -> bool:
        """Whether no process has asked this before."""
        try:
            return within(_GRACE, lambda: self._store.add(what, 1)) == 1
        except (TimeoutError, DistError):
            return True

    def tell(self, what: str) -> str:
        """Tell the others why the run ends; returns what the first of all processes has told.

        Raises:
            TimeoutError, DistError: if rank 0, which serves the store, hangs or has gone.
        """
        return within(_GRACE, lambda: self._store.compare_set(_FIRST, "", what)).decode()

    def _charge(self, culprit: list[int], gone: int | None = None) -> str:
        """What is said of those to blame, if one process is known to have gone."""
        if len(culprit) > 1:
            what = "wait for each other: all must read as many batches, and validate and save at the same steps"
        else:
            what = "has ended" if culprit == [gone] or self.has_ended(*culprit) else "does not answer"
        return f"{' and '.join(map(self.name, culprit))} {what}"

    def _culprit(self, rank: int) -> list[int]:
        """Who is to blame that a process does not answer: it, or the one that it waits for; or all in a circle."""
        self._store.set(f"{self.rank} waits for", str(rank))
        path = [self.rank, rank]
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not self._store.check([_FIRST]):
            if self._store.check([f"{path[-1]} waits for"]):
                following = int(self._store.get(f"{path[-1]} waits for"))
                if following in path:
                    return sorted(path[path.index(following) :])
                path.append(following)
            elif self.has_ended(path[-1]):
                break
            else:
                time.sleep(0.05)  # until it has told, or has ended
        return path[-1:]

    def _watch(self, rank: int, process: int) -> select.poll:
        """What tells of the end of a process of this machine."""
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError as error:
            raise PeerError(f"{self.name(rank)} has ended") from error
        finalize(self, os.close, descriptor)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return poll
