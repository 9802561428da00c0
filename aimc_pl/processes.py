"""The processes of a run, one per stage, and what they tell each other apart from activations and gradients.

If a process fails or is lost, all others end too. All of them report the same cause: the first failure that a process
has written to the store. A process that gets no answer writes to the store which process it waits for. A chain of such
entries leads to the process at fault.
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
"""How many seconds a lost process has to report why it failed, or which process it waits for itself."""
_FIRST = "first failure"
"""The key of the store under which the first failure is written."""
_runs = count()
"""Numbers of the runs. Connected processes may run several fits in a row; each fit has its own part of the store."""


def rank_of(stage: int, num_stages: int) -> int:
    """Return the rank of the process that holds ``stage`` or, given a rank, the stage that its process holds.

    Rank 0, where losses are logged, holds the last stage.
    """
    return num_stages - 1 - stage


class Closes(Protocol):
    """Anything that other processes may wait for, and that can be closed."""

    def close(self) -> None:
        """Tell the processes that wait to stop waiting."""
        ...


class Processes:
    """All processes of a run, as seen by one of them.

    Args:
        num_stages: M, the number of stages and of processes.
        timeout: how many seconds to wait for another process. It may be changed later.
        node: the number of this machine. Only processes with the same number share memory.

    Raises:
        PeerError: from every method, if another process has ended or has not answered within ``timeout``.
    """

    def __init__(self, num_stages: int, timeout: float, node: int) -> None:
        self.rank = dist.get_rank()
        self.stage = rank_of(self.rank, num_stages)
        self.num_stages = num_stages
        self.timeout = timeout
        self.links: list[Closes] = []
        """The links to close when this process fails."""
        self._store = PrefixStore(f"aimc_pl {next(_runs)}", default_store())
        self._exchanges = 0
        self._near: dict[int, select.poll] = {}
        for rank, (other, process) in enumerate(self.gather((node, os.getpid()))):
            if other == node and rank != self.rank:
                self._near[rank] = self._watch(rank, process)

    def name(self, rank: int) -> str:
        """Return how messages name a process: by its rank and its stage."""
        return f"rank {rank} (stage {rank_of(rank, self.num_stages)})"

    def is_near(self, rank: int) -> bool:
        """Return whether a process runs on this machine."""
        return rank in self._near

    def has_ended(self, rank: int) -> bool:
        """Return whether a process is known to have ended. Only processes of one machine know this of each other."""
        return rank in self._near and bool(self._near[rank].poll(0))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks. All processes must call this method.

        Args:
            value: the value of this process. See :class:`aimc_pl.messages.Message` for the kinds that can be sent.

        Raises:
            UsageError: if another process has called this method more often or less often than this one.
        """
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
        """Send a tensor to a process, and wait until the transfer has finished."""
        with self.answering(rank):
            work = dist.isend(tensor, rank)
        self.finish(work, rank)

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fill ``tensor`` with what a process has sent, and return it."""
        with self.answering(rank):
            work = dist.irecv(tensor, rank)
        self.finish(work, rank)
        return tensor

    def finish(self, work: "dist.Work | None", rank: int) -> None:
        """Wait until a transfer from or to ``rank`` has finished."""
        assert work is not None
        with self.answering(rank):
            work.wait(timedelta(seconds=self.timeout))

    @contextmanager
    def answering(self, rank: int) -> Iterator[None]:
        """Context manager that turns an error of torch.distributed into a PeerError that names the process at fault."""
        try:
            yield
        except RuntimeError as error:
            raise self.lost(rank) from error

    def lost(self, rank: int) -> PeerError:
        """Return the error to raise when ``rank`` has ended or has not answered in time."""
        culprit = [0]  # at fault if the store does not answer, since rank 0 serves it
        try:
            culprit = within(2 * _GRACE, lambda: self._culprit(rank))
            told = self.tell(self._charge(culprit))
        except TimeoutError:
            told = self._charge(culprit)
        except DistError:
            # The store ends with rank 0, a moment before the operating system reports the end of that process.
            told = self._charge(culprit, gone=0)
        return PeerError(f"{told}. See its own output. The run can be continued from the last checkpoint")

    def fail(self, error: BaseException) -> None:
        """Tell the other processes that this one ends and why, unless the cause is a lost process. Close the links."""
        if not isinstance(error, PeerError):
            text = " ".join(str(error).split())
            with suppress(TimeoutError, DistError):  # without the store, no process can be told
                self.tell(f"{self.name(self.rank)} has failed with {type(error).__name__}{text and ': '}{text}")
        for link in self.links:
            link.close()

    def is_first(self, what: str) -> bool:
        """Return whether no process has asked for ``what`` before, or ``True`` if the store does not answer."""
        try:
            return within(_GRACE, lambda: self._store.add(what, 1)) == 1
        except (TimeoutError, DistError):
            return True

    def tell(self, what: str) -> str:
        """Tell the other processes why the run ends. Return the reason that a process has told first.

        Raises:
            TimeoutError, DistError: if rank 0, which serves the store, hangs or has ended.
        """
        return within(_GRACE, lambda: self._store.compare_set(_FIRST, "", what)).decode()

    def _charge(self, culprit: list[int], gone: int | None = None) -> str:
        """Return the message about the ranks at fault. ``gone`` is a rank that is known to have ended, if any."""
        if len(culprit) > 1:
            what = "wait for each other: all must read as many batches, and validate and save at the same steps"
        else:
            what = "has ended" if culprit == [gone] or self.has_ended(*culprit) else "does not answer"
        return f"{' and '.join(map(self.name, culprit))} {what}"

    def _culprit(self, rank: int) -> list[int]:
        """Return the ranks at fault if ``rank`` does not answer.

        If ``rank`` itself waits for another process, follow the chain to its end. If the chain is a circle, return all
        ranks in it.
        """
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
                time.sleep(0.05)  # until that process has reported, or has ended
        return path[-1:]

    def _watch(self, rank: int, process: int) -> select.poll:
        """Return an object that reports when a process of this machine ends."""
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError as error:
            raise PeerError(f"{self.name(rank)} has ended") from error
        finalize(self, os.close, descriptor)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return poll
