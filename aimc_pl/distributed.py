"""Carries what stages send between processes, one stage in each, on torch.distributed.

A message is a header and a body: the header tells the micro-batch and the structure, shapes and types of the values,
the body is their bytes. The next header is always expected already. Between processes of one machine bodies go through
a ring of shared memory, else through torch.distributed: of gloo a body as large as any so far is expected along with
the header, NCCL's is received once the header is there.
"""

import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from os import posix_fallocate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from aimc_pl.errors import PeerError
from aimc_pl.schedule import Operation

_HEADER = 4096
_ALIGNMENT = 64
_SLOTS = 4
_UNFINISHED = 8
"""Messages that may be on their way before their sender waits."""
_tags = count(1)
"""Every link of a process has tags of its own: what an earlier one still expects never comes."""


def rank_of(stage: int, num_stages: int) -> int:
    """The process of a stage, and the stage of a process: rank 0, where losses are logged, holds the last one."""
    return num_stages - 1 - stage


def lost(rank: int, num_stages: int, timeout: float) -> PeerError:
    """What to raise where the process of that rank does not answer."""
    return PeerError(
        f"rank {rank} (stage {rank_of(rank, num_stages)}) has ended or has kept rank {dist.get_rank()} waiting for "
        f"{timeout:g} s: see its own output. The run can be continued from the last checkpoint"
    )


class Link:
    """The connection of one stage's process to those of the stages before and after it.

    Args:
        stage: of this process.
        num_stages: M, the number of processes.
        device: where this stage computes.
        shares_memory: whether the process of a rank is on this machine.
        timeout: seconds to wait for a neighbour.

    Raises:
        PeerError: by all methods, if a neighbour has gone, or keeps this process waiting for longer.
    """

    def __init__(
        self,
        stage: int,
        num_stages: int,
        device: torch.device,
        shares_memory: Callable[[int], bool],
        timeout: float,
    ) -> None:
        self._stage = stage
        tags = next(_tags), next(_tags)
        self._out: dict[int, _Outgoing] = {}
        self._in: dict[int, _Incoming] = {}
        for neighbour in (stage - 1, stage + 1):
            if 0 <= neighbour < num_stages:
                rank = rank_of(neighbour, num_stages)
                peer = _Peer(rank, num_stages, timeout, device, shares_memory(rank), *tags)
                self._out[neighbour], self._in[neighbour] = _Outgoing(peer), _Incoming(peer)

    def send(self, operation: Operation, values: Any) -> None:
        """Hand over nested tuples of tensors for an operation of a neighbouring stage."""
        self._out[operation.stage].send(operation.microbatch, values)

    def receive(self, operation: Operation) -> Any:
        """What the neighbour has sent for the operation."""
        sender = self._stage - 1 if operation.kind == "F" else self._stage + 1
        microbatch, values = self._in[sender].receive()
        if microbatch != operation.microbatch:
            raise RuntimeError(f"{operation} is due, and stage {sender} has sent micro-batch {microbatch}")
        return values

    def clear(self) -> None:
        """What is under way cannot be called back: a run that failed ends with its processes."""


@dataclass(frozen=True)
class _Peer:
    rank: int
    num_stages: int
    timeout: float
    device: torch.device
    shares_memory: bool
    header_tag: int
    body_tag: int

    @property
    def expects_bodies(self) -> bool:
        """Whether bodies are received before their headers are read."""
        return self.device.type == "cpu" and not self.shares_memory

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Around what may fail because it does not."""
        try:
            yield
        except RuntimeError as error:
            raise lost(self.rank, self.num_stages, self.timeout) from error

    def wait(self, work: "dist.Work | None") -> None:
        assert work is not None
        with self.answers():
            work.wait(timedelta(seconds=self.timeout))


@dataclass(frozen=True)
class _Slot:
    """Where in the body a tensor lies."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    start: int
    num_bytes: int

    def of(self, body: Tensor) -> Tensor:
        return body[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class _Outgoing:
    """Sends to one neighbour."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._ring: _Ring | None = None
        self._expected = 0
        self._unfinished: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, microbatch: int, values: Any) -> None:
        tensors: list[Tensor] = []
        slots: list[_Slot] = []
        size = 0

        def place(value: Any) -> Any:
            nonlocal size
            if not isinstance(value, Tensor):
                return value
            num_bytes = value.numel() * value.element_size()
            slots.append(_Slot(value.shape, value.dtype, value.requires_grad, size, num_bytes))
            tensors.append(value.detach())
            size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            return slots[-1]

        structure = tree_map(place, values)
        ring = self._ring_for(size) if self._peer.shares_memory and self._peer.device.type == "cpu" else None
        body = ring.next_free(self._peer) if ring else torch.empty(size, dtype=torch.uint8, device=self._peer.device)
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.of(body).copy_(tensor)
        self._send_header((microbatch, structure, size, ring.path if ring else None))
        if size and not ring:
            if self._peer.expects_bodies:
                if 0 < self._expected < size:
                    self._send(body[:1], self._peer.body_tag)  # in place of the one that is expected
                self._expected = max(self._expected, size)
            self._send(body, self._peer.body_tag)

    def _ring_for(self, size: int) -> "_Ring | None":
        if size and (self._ring is None or self._ring.slot_size < size):
            self._ring = _Ring.create(size)
        return self._ring if size else None

    def _send_header(self, content: tuple[Any, ...]) -> None:
        pickled = pickle.dumps(content)
        data = torch.frombuffer(bytearray(len(pickled).to_bytes(8) + pickled), dtype=torch.uint8)
        header = torch.zeros(_HEADER, dtype=torch.uint8)
        header[: len(data)] = data[:_HEADER]
        self._send(header, self._peer.header_tag)
        if len(data) > _HEADER:
            self._send(data[_HEADER:], self._peer.header_tag)

    def _send(self, tensor: Tensor, tag: int) -> None:
        with self._peer.answers():
            self._unfinished.append((dist.isend(tensor, self._peer.rank, tag=tag), tensor))
        if len(self._unfinished) > _UNFINISHED:
            self._peer.wait(self._unfinished.popleft()[0])


class _Incoming:
    """Receives from one neighbour."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._ring: _Ring | None = None
        self._header = self._expect(_HEADER, self._peer.header_tag, "cpu")
        self._body: tuple[dist.Work | None, Tensor] | None = None
        self._expected = 0

    def receive(self) -> tuple[int, Any]:
        microbatch, structure, size, path = self._receive_header()
        if path:
            if self._ring is None or self._ring.path != path:
                self._ring = _Ring.attach(path)
            body = self._ring.take(size)
        else:
            body = self._receive_body(size) if size else torch.empty(0)

        def taken(value: Any) -> Any:
            return value.of(body).requires_grad_(value.requires_grad) if isinstance(value, _Slot) else value

        return microbatch, tree_map(taken, structure)

    def _receive_header(self) -> Any:
        work, header = self._header
        self._peer.wait(work)
        missing = 8 + int.from_bytes(header[:8].numpy().tobytes()) - _HEADER
        if missing > 0:
            work, rest = self._expect(missing, self._peer.header_tag, "cpu")
            self._peer.wait(work)
            header = torch.cat([header, rest])
        self._header = self._expect(_HEADER, self._peer.header_tag, "cpu")
        return pickle.loads(header[8:].numpy())

    def _receive_body(self, size: int) -> Tensor:
        if self._body is not None and size > self._expected:
            self._peer.wait(self._body[0])
            self._body = None
        work, body = self._body or self._expect(size, self._peer.body_tag, self._peer.device)
        self._peer.wait(work)
        if self._peer.expects_bodies:
            self._expected = max(self._expected, size)
            self._body = self._expect(self._expected, self._peer.body_tag, "cpu")
        return body

    def _expect(self, size: int, tag: int, device: Any) -> tuple[dist.Work | None, Tensor]:
        # Also what is first expected during validation may be used in a training step.
        with torch.inference_mode(False):
            tensor = torch.empty(size, dtype=torch.uint8, device=device)
        with self._peer.answers():
            return dist.irecv(tensor, self._peer.rank, tag=tag), tensor


class _Ring:
    """Slots of memory that two processes share, and how many of them have been emptied.

    Args:
        path: of a file in memory, of which only the mapping stays.
        slot_size: bytes of a slot, a multiple of the alignment.
    """

    def __init__(self, path: str, slot_size: int) -> None:
        self.path = path
        self.slot_size = slot_size
        size = _ALIGNMENT + _SLOTS * slot_size
        self._memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self._emptied = self._memory[:8].view(torch.int64)
        self._used = 0

    @classmethod
    def create(cls, slot_size: int) -> "_Ring | None":
        """A new one, or ``None`` where there is no memory for it."""
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.NamedTemporaryFile(prefix="aimc_pl_", dir=folder, delete=False) as file:
            try:
                posix_fallocate(file.fileno(), 0, _ALIGNMENT + _SLOTS * slot_size)
            except OSError:
                Path(file.name).unlink()
                return None
        return cls(file.name, slot_size)

    @classmethod
    def attach(cls, path: str) -> "_Ring":
        """The one that the neighbour has made."""
        ring = cls(path, (Path(path).stat().st_size - _ALIGNMENT) // _SLOTS)
        Path(path).unlink()
        return ring

    def next_free(self, peer: _Peer) -> Tensor:
        """The sender's next slot, as soon as it is empty."""
        deadline = time.monotonic() + peer.timeout
        while self._used - int(self._emptied) >= _SLOTS:
            if time.monotonic() > deadline:
                raise lost(peer.rank, peer.num_stages, peer.timeout)
            time.sleep(2e-5)
        self._used += 1
        return self._slot(self._used - 1)

    def take(self, size: int) -> Tensor:
        """A copy of the receiver's next slot, which is empty from now on."""
        with torch.inference_mode(False):
            body = self._slot(self._used)[:size].clone()
            self._used += 1
            self._emptied += 1
        return body

    def _slot(self, number: int) -> Tensor:
        start = _ALIGNMENT + number % _SLOTS * self.slot_size
        return self._memory[start : start + self.slot_size]
