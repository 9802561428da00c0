"""Carries what stages send between processes, one stage in each: through shared memory or torch.distributed.

A message is a header and a body: the header tells the micro-batch, what data it belongs to, and the structure, shapes
and types of the values, the body is their bytes (see :mod:`aimc_pl.messages`). Processes of one machine pass messages
through a ring of shared memory, others through torch.distributed: the next header is always expected already, and with
gloo a body as large as any so far; NCCL's body is received once its header is there.
"""

import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aimc_pl.errors import UsageError
from aimc_pl.messages import Message, decode, encode, read
from aimc_pl.processes import Processes, rank_of
from aimc_pl.ring import IS_ORDERED, Place, Ring, slot_for
from aimc_pl.schedule import Operation

_HEADER = 4096
_UNFINISHED = 8
"""Messages that may be on their way before their sender waits."""
_tags = count(1)
"""Every link of a process has tags of its own: what an earlier one still expects never comes."""

Letter = tuple[int, str, Any]
"""Micro-batch, fingerprint of its data, values."""


class Link:
    """The connection of one stage's process to those of the stages before and after it.

    Args:
        processes: of the run.
        device: where this stage computes.

    Raises:
        PeerError: by all methods, if a neighbour has gone, or keeps this process waiting for too long.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes = processes
        self._stage = processes.stage
        self._out: dict[int, _Sender] = {}
        self._in: dict[int, _Receiver] = {}
        self._unread: deque[tuple[str, str]] = deque()
        self._unsent: deque[str] = deque()
        tags = next(_tags), next(_tags)
        last = processes.num_stages - 1
        peers = {
            neighbour: _Peer(processes, rank_of(neighbour, processes.num_stages), device, *tags)
            for neighbour in (self._stage - 1, self._stage + 1)
            if 0 <= neighbour <= last
        }
        shares_memory = device.type == "cpu" and IS_ORDERED
        near = {n: peer for n, peer in peers.items() if shares_memory and processes.is_near(peer.rank)}
        rings = {n: Ring.create(_HEADER) for n in near}
        offers = {n: peer.send(torch.tensor(rings[n].place), 0) for n, peer in near.items()}
        for neighbour, peer in peers.items():
            if neighbour in near:
                place = peer.received(*peer.expect(torch.int64, 2, 0))
                peer.wait(offers[neighbour])
                self._out[neighbour] = _SharedSender(peer, rings[neighbour])
                self._in[neighbour] = _SharedReceiver(peer, (int(place[0]), int(place[1])))
            else:
                self._out[neighbour], self._in[neighbour] = _NetworkSender(peer), _NetworkReceiver(peer)
        processes.links.append(self)

    def announce(self, fingerprint: str, batch: str) -> None:
        """Say which data the next micro-batch belongs to. Its forward refuses that of another process.

        Args:
            fingerprint: equal in all processes that have read the same.
            batch: its name, for messages.
        """
        if self._stage > 0:
            self._unread.append((fingerprint, batch))
        if self._stage + 1 in self._out:
            self._unsent.append(fingerprint)

    def send(self, operation: Operation, values: Any) -> None:
        """Hand over nested tuples of tensors for an operation of a neighbouring stage."""
        fingerprint = self._unsent.popleft() if operation.kind == "F" and self._unsent else ""
        self._out[operation.stage].send(operation.microbatch, fingerprint, values)

    def receive(self, operation: Operation) -> Any:
        """What the neighbour has sent for the operation.

        Raises:
            UsageError: if it has read other data.
        """
        sender = self._stage - 1 if operation.kind == "F" else self._stage + 1
        microbatch, theirs, values = self._in[sender].receive()
        if microbatch != operation.microbatch:
            raise RuntimeError(f"{operation} is due, and stage {sender} has sent micro-batch {microbatch}")
        if operation.kind == "F" and self._unread:
            ours, batch = self._unread.popleft()
            if ours != theirs:
                name, num_stages = self._processes.name, self._processes.num_stages
                raise UsageError(
                    f"{name(rank_of(sender, num_stages))} and {name(self._processes.rank)} have read different data in "
                    f"{batch}. Every process reads all batches, in the same order: shuffle by torch's random numbers, "
                    "which all draw alike, and do not give a rank its own part"
                )
        return values

    def close(self) -> None:
        """Let the neighbours wait no longer: this process fails. What is under way cannot be called back."""
        for end in (*self._out.values(), *self._in.values()):
            end.close()


class _Sender(Protocol):
    def send(self, microbatch: int, fingerprint: str, values: Any) -> None: ...

    def close(self) -> None: ...


class _Receiver(Protocol):
    def receive(self) -> Letter: ...

    def close(self) -> None: ...


class _Peer:
    """A neighbour."""

    def __init__(self, processes: Processes, rank: int, device: torch.device, header_tag: int, body_tag: int) -> None:
        self.rank = rank
        self.device = device
        self.tags = header_tag, body_tag
        self.processes = processes

    def send(self, tensor: Tensor, tag: int) -> "dist.Work | None":
        with self.processes.answering(self.rank):
            return dist.isend(tensor, self.rank, tag=self.tags[tag])

    def expect(self, dtype: torch.dtype, size: int, tag: int, device: Any = "cpu") -> "tuple[dist.Work | None, Tensor]":
        # Also what is first expected during validation may be used in a training step.
        with torch.inference_mode(False):
            tensor = torch.empty(size, dtype=dtype, device=device)
        with self.processes.answering(self.rank):
            return dist.irecv(tensor, self.rank, tag=self.tags[tag]), tensor

    def received(self, work: "dist.Work | None", tensor: Tensor) -> Tensor:
        self.wait(work)
        return tensor

    def wait(self, work: "dist.Work | None") -> None:
        self.processes.finish(work, self.rank)

    def wait_until(self, condition: Callable[[], bool], ring: Ring) -> None:
        """Wait for what happens in shared memory."""
        start = checked = time.monotonic()
        while not condition():
            now = time.monotonic()
            # At first other processes may go on at once; the longer it takes, the longer they may have the processor.
            time.sleep(0 if now - start < 2e-4 else min(max(2e-5, (now - start) / 500), 0.01))
            if now - checked > 0.1:
                checked = now
                has_gone = ring.is_closed or self.processes.has_ended(self.rank)
                if (has_gone and not condition()) or now - start > self.processes.timeout:
                    raise self.processes.lost(self.rank)


class _SharedSender:
    """Sends through a ring, and goes over to a larger one when a message does not fit."""

    def __init__(self, peer: _Peer, ring: Ring) -> None:
        self._peer = peer
        self._ring = ring
        self._left: list[Ring] = []
        """Earlier rings, until the receiver has opened the ones that follow them."""

    def send(self, microbatch: int, fingerprint: str, values: Any) -> None:
        message = Message(values)
        header = encode([microbatch, fingerprint, message.size, message.description])
        if slot_for(header, message.size) > self._ring.slot_size:
            larger = Ring.create(slot_for(header, message.size))
            self._write(encode(larger.place), None)
            self._left = [ring for ring in self._left if ring.has_message] + [self._ring]
            self._ring = larger
        self._write(header, message)

    def close(self) -> None:
        self._ring.close()

    def _write(self, header: bytes, message: Message | None) -> None:
        ring = self._ring
        if not ring.has_space:
            self._peer.wait_until(lambda: ring.has_space, ring)
        body = ring.write(header)
        if message is not None:
            message.write(body)
        ring.written()


class _SharedReceiver:
    """Receives through a ring."""

    def __init__(self, peer: _Peer, place: Place) -> None:
        self._peer = peer
        self._open(place)

    def receive(self) -> Letter:
        ring = self._ring
        if not ring.has_message:
            self._peer.wait_until(lambda: ring.has_message, ring)
        header, slot = ring.read()
        content = decode(header)
        if len(content) == 2:
            self._open(content)
            ring.was_read()
            return self.receive()
        microbatch, fingerprint, _, description = content
        values = read(description, slot)
        ring.was_read()
        return microbatch, fingerprint, values

    def close(self) -> None:
        self._ring.close()

    def _open(self, place: Place) -> None:
        try:
            self._ring = Ring.open(place)
        except OSError as error:
            raise self._peer.processes.lost(self._peer.rank) from error


class _NetworkSender:
    """Sends through torch.distributed."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._expected = 0
        self._unfinished: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, microbatch: int, fingerprint: str, values: Any) -> None:
        message = Message(values)
        body = torch.empty(message.size, dtype=torch.uint8, device=self._peer.device)
        message.write(body)
        header = _to_tensor(encode([microbatch, fingerprint, message.size, message.description]))
        self._send(header[:_HEADER], 0)
        if len(header) > _HEADER:
            self._send(header[_HEADER:], 0)
        if 0 < self._expected < message.size:
            self._send(body[:1], 1)  # in place of the one that is expected
        if self._peer.device.type == "cpu":
            self._expected = max(self._expected, message.size)
        if message.size:
            self._send(body, 1)

    def close(self) -> None:
        """Its connection ends with the process."""

    def _send(self, tensor: Tensor, tag: int) -> None:
        self._unfinished.append((self._peer.send(tensor, tag), tensor))
        if len(self._unfinished) > _UNFINISHED:
            self._peer.wait(self._unfinished.popleft()[0])


class _NetworkReceiver:
    """Receives through torch.distributed."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._header = self._expect(_HEADER, 0)
        self._body: tuple[dist.Work | None, Tensor] | None = None
        self._expected = 0

    def receive(self) -> Letter:
        header = self._peer.received(*self._header)
        missing = 8 + _length(header) - _HEADER
        if missing > 0:
            header = torch.cat([header, self._peer.received(*self._expect(missing, 0))])
        self._header = self._expect(_HEADER, 0)
        content = decode(header[8 : 8 + _length(header)].numpy().tobytes())
        microbatch, fingerprint, size, description = content
        return microbatch, fingerprint, read(description, self._receive_body(size) if size else header[:0])

    def close(self) -> None:
        """Its connection ends with the process."""

    def _receive_body(self, size: int) -> Tensor:
        if self._body is not None and size > self._expected:
            self._peer.received(*self._body)
            self._body = None
        body = self._peer.received(*(self._body or self._expect(size, 1, self._peer.device)))
        if self._peer.device.type == "cpu":
            self._expected = max(self._expected, size)
            self._body = self._expect(self._expected, 1)
        return body

    def _expect(self, size: int, tag: int, device: Any = "cpu") -> "tuple[dist.Work | None, Tensor]":
        return self._peer.expect(torch.uint8, size, tag, device)


def _to_tensor(header: bytes) -> Tensor:
    """A header with its length, as bytes, of which there are at least so many as are expected."""
    data = len(header).to_bytes(8, "little") + header
    return torch.frombuffer(bytearray(data.ljust(_HEADER, b"\0")), dtype=torch.uint8)


def _length(header: Tensor) -> int:
    return int.from_bytes(header[:8].numpy().tobytes(), "little")
