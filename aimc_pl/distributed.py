"""Carries what stages send between processes, one stage in each: through shared memory or torch.distributed.

A message is a header and a body: the header tells the micro-batch and the structure, shapes and types of the values,
the body is their bytes. Processes of one machine pass messages through a ring of shared memory, others through
torch.distributed: the next header is always expected already, and with gloo a body as large as any so far; NCCL's body
is received once its header is there.
"""

import os
import pickle
import select
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor

from aimc_pl.errors import PeerError
from aimc_pl.private_torch import tree_map
from aimc_pl.schedule import Operation

_ALIGNMENT = 64
_HEADER = 4096
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
        self._out: dict[int, _Sender] = {}
        self._in: dict[int, _Receiver] = {}
        tags = next(_tags), next(_tags)
        peers = {
            neighbour: _Peer(rank_of(neighbour, num_stages), num_stages, timeout, device, *tags)
            for neighbour in (stage - 1, stage + 1)
            if 0 <= neighbour < num_stages
        }
        near = {n: peer for n, peer in peers.items() if device.type == "cpu" and shares_memory(peer.rank)}
        rings = {n: _Ring.create(_HEADER) for n in near}
        offers = {n: peer.send(_to_tensor((os.getpid(), rings[n].path), _HEADER), 0) for n, peer in near.items()}
        for neighbour, peer in peers.items():
            if neighbour in near:
                process, path = _from_tensor(peer.received(*peer.expect(_HEADER, 0)))
                peer.watch(process)
                peer.wait(offers[neighbour])
                self._out[neighbour] = _SharedSender(peer, rings[neighbour])
                self._in[neighbour] = _SharedReceiver(peer, path)
            else:
                self._out[neighbour], self._in[neighbour] = _NetworkSender(peer), _NetworkReceiver(peer)

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


class _Sender(Protocol):
    def send(self, microbatch: int, values: Any) -> None: ...


class _Receiver(Protocol):
    def receive(self) -> tuple[int, Any]: ...


class _Peer:
    """A neighbour, and how long to wait for it."""

    def __init__(
        self, rank: int, num_stages: int, timeout: float, device: torch.device, header_tag: int, body_tag: int
    ) -> None:
        self.rank = rank
        self.device = device
        self.tags = header_tag, body_tag
        self._num_stages = num_stages
        self._timeout = timeout
        self._process = select.poll()

    def send(self, tensor: Tensor, tag: int) -> "dist.Work | None":
        with self._answers():
            return dist.isend(tensor, self.rank, tag=self.tags[tag])

    def expect(self, size: int, tag: int, device: Any = "cpu") -> "tuple[dist.Work | None, Tensor]":
        # Also what is first expected during validation may be used in a training step.
        with torch.inference_mode(False), self._answers():
            tensor = torch.empty(size, dtype=torch.uint8, device=device)
            return dist.irecv(tensor, self.rank, tag=self.tags[tag]), tensor

    def received(self, work: "dist.Work | None", tensor: Tensor) -> Tensor:
        self.wait(work)
        return tensor

    def wait(self, work: "dist.Work | None") -> None:
        assert work is not None
        with self._answers():
            work.wait(timedelta(seconds=self._timeout))

    def watch(self, process: int) -> None:
        """Know of the end of its process, which is on this machine."""
        descriptor = os.pidfd_open(process)
        finalize(self, os.close, descriptor)
        self._process.register(descriptor, select.POLLIN)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what happens in shared memory."""
        start = checked = time.monotonic()
        while not condition():
            now = time.monotonic()
            # At first other processes may go on at once, later they may have the processor for longer.
            time.sleep(0 if now - start < 2e-4 else 2e-5)
            if now - checked > 0.1:
                checked = now
                if (self._process.poll(0) and not condition()) or now - start > self._timeout:
                    raise self._lost()

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Around what may fail because it does not."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> PeerError:
        return lost(self.rank, self._num_stages, self._timeout)


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


class _Message:
    """Values laid out one after the other."""

    def __init__(self, values: Any) -> None:
        self.size = 0
        self._tensors: list[tuple[_Slot, Tensor]] = []
        self.structure = tree_map(self._place, values)

    def write(self, body: Tensor) -> None:
        for slot, tensor in self._tensors:
            slot.of(body).copy_(tensor)

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        num_bytes = value.numel() * value.element_size()
        slot = _Slot(value.shape, value.dtype, value.requires_grad, self.size, num_bytes)
        self._tensors.append((slot, value.detach()))
        self.size += _aligned(num_bytes)
        return slot


def _read(structure: Any, body: Tensor) -> Any:
    def take(value: Any) -> Any:
        return value.of(body).requires_grad_(value.requires_grad) if isinstance(value, _Slot) else value

    return tree_map(take, structure)


class _Ring:
    """Messages in memory that two processes share: counts of those written and read, then slots.

    Args:
        path: of a file in memory. Its receiver removes it; the memory stays as long as it is used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = Path(path).stat().st_size
        self.slot_size = (size - 2 * _ALIGNMENT) // _SLOTS
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        # Counts of their own cache lines, as numpy reads single numbers faster.
        self._counts = memory[: 2 * _ALIGNMENT].view(torch.int64).numpy()
        self._slots = memory[2 * _ALIGNMENT :]

    @classmethod
    def create(cls, slot_size: int) -> "_Ring":
        """A new one; on Linux in memory even if temporary files are not."""
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.NamedTemporaryFile(prefix="aimc_pl_", dir=folder, delete=False) as file:
            # Reserved now: memory that is missing later would end the process.
            os.posix_fallocate(file.fileno(), 0, 2 * _ALIGNMENT + _SLOTS * _aligned(slot_size))
        return cls(file.name)

    @property
    def has_space(self) -> bool:
        return self._counts[0] - self._counts[_ALIGNMENT // 8] < _SLOTS

    @property
    def has_message(self) -> bool:
        return self._counts[0] > self._counts[_ALIGNMENT // 8]

    def next_to_write(self) -> Tensor:
        return self._slot(self._counts[0])

    def next_to_read(self) -> Tensor:
        return self._slot(self._counts[_ALIGNMENT // 8])

    def written(self) -> None:
        self._counts[0] += 1

    def read(self) -> None:
        self._counts[_ALIGNMENT // 8] += 1

    def _slot(self, number: int) -> Tensor:
        start = int(number) % _SLOTS * self.slot_size
        return self._slots[start : start + self.slot_size]


class _SharedSender:
    """Sends through a ring, and goes over to a larger one when a message does not fit."""

    def __init__(self, peer: _Peer, ring: _Ring) -> None:
        self._peer = peer
        self._ring = ring

    def send(self, microbatch: int, values: Any) -> None:
        message = _Message(values)
        header = _to_tensor((microbatch, message.structure, message.size))
        start = _aligned(len(header))
        if start + message.size > self._ring.slot_size:
            larger = _Ring.create(start + message.size)
            self._write(_to_tensor(larger.path), None)
            self._ring = larger
        self._write(header, message)

    def _write(self, header: Tensor, message: _Message | None) -> None:
        self._peer.wait_until(lambda: self._ring.has_space)
        slot = self._ring.next_to_write()
        slot[: len(header)] = header
        if message is not None:
            message.write(slot[_aligned(len(header)) :])
        self._ring.written()


class _SharedReceiver:
    """Receives through a ring."""

    def __init__(self, peer: _Peer, path: str) -> None:
        self._peer = peer
        self._open(path)

    def receive(self) -> tuple[int, Any]:
        self._peer.wait_until(lambda: self._ring.has_message)
        slot = self._ring.next_to_read()
        content = _from_tensor(slot)
        if isinstance(content, str):
            self._open(content)
            return self.receive()
        microbatch, structure, size = content
        start = _aligned(_length(slot))
        with torch.inference_mode(False):
            body = slot[start : start + size].clone()
        self._ring.read()
        return microbatch, _read(structure, body)

    def _open(self, path: str) -> None:
        self._ring = _Ring(path)
        Path(path).unlink()


class _NetworkSender:
    """Sends through torch.distributed."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._expected = 0
        self._unfinished: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, microbatch: int, values: Any) -> None:
        message = _Message(values)
        body = torch.empty(message.size, dtype=torch.uint8, device=self._peer.device)
        message.write(body)
        header = _to_tensor((microbatch, message.structure, message.size), _HEADER)
        self._send(header[:_HEADER], 0)
        if len(header) > _HEADER:
            self._send(header[_HEADER:], 0)
        if 0 < self._expected < message.size:
            self._send(body[:1], 1)  # in place of the one that is expected
        if self._peer.device.type == "cpu":
            self._expected = max(self._expected, message.size)
        if message.size:
            self._send(body, 1)

    def _send(self, tensor: Tensor, tag: int) -> None:
        self._unfinished.append((self._peer.send(tensor, tag), tensor))
        if len(self._unfinished) > _UNFINISHED:
            self._peer.wait(self._unfinished.popleft()[0])


class _NetworkReceiver:
    """Receives through torch.distributed."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._header = peer.expect(_HEADER, 0)
        self._body: tuple[dist.Work | None, Tensor] | None = None
        self._expected = 0

    def receive(self) -> tuple[int, Any]:
        header = self._peer.received(*self._header)
        missing = _length(header) - _HEADER
        if missing > 0:
            header = torch.cat([header, self._peer.received(*self._peer.expect(missing, 0))])
        self._header = self._peer.expect(_HEADER, 0)
        microbatch, structure, size = _from_tensor(header)
        return microbatch, _read(structure, self._receive_body(size) if size else header[:0])

    def _receive_body(self, size: int) -> Tensor:
        if self._body is not None and size > self._expected:
            self._peer.received(*self._body)
            self._body = None
        body = self._peer.received(*(self._body or self._peer.expect(size, 1, self._peer.device)))
        if self._peer.device.type == "cpu":
            self._expected = max(self._expected, size)
            self._body = self._peer.expect(self._expected, 1)
        return body


def _to_tensor(content: Any, at_least: int = 0) -> Tensor:
    """Any object as bytes that begin with their number."""
    pickled = pickle.dumps(content)
    length = 8 + len(pickled)
    data = length.to_bytes(8, "little") + pickled + bytes(max(at_least - length, 0))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _from_tensor(data: Tensor) -> Any:
    return pickle.loads(data[8 : _length(data)].numpy())


def _length(data: Tensor) -> int:
    return int.from_bytes(data[:8].numpy().tobytes(), "little")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
