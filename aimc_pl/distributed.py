"""Links that carry messages between the processes of neighbouring stages, by shared memory or torch.distributed.

A message is a header and a body. The header holds the number of the micro-batch, a fingerprint of the batch, and the
structure, shapes and types of the values. The body holds the bytes of the values (see :mod:`aimc_pl.messages`).
Processes of one machine pass messages through a ring of shared memory, other processes through torch.distributed.
There, the receive of the next header is always posted ahead. With gloo, so is the receive of a body as large as the
largest one so far. With NCCL, the receive of a body is posted once its header has arrived.
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
"""How many bytes of a header are received at first. The rest of a longer header follows separately."""
_UNFINISHED = 8
"""How many transfers may be under way before their sender waits for the oldest one."""
_tags = count(1)
"""Tags of the links. No two links share a tag: a receive that an earlier link has posted must not get a message of a
later one."""

Letter = tuple[int, str, Any]
"""The number of a micro-batch, the fingerprint of its batch (or an empty string), and the values."""


class Link:
    """The connection of the process of one stage to the processes of the stages before and after it.

    Args:
        processes: the processes of the run.
        device: the device on which this stage computes.

    Raises:
        PeerError: from every method, if a neighbour has ended or has not answered in time.
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
        """Note which batch the next micro-batch belongs to. :meth:`receive` checks that its sender has read the same.

        Args:
            fingerprint: a hash of the batch, equal in all processes that have read the same data.
            batch: the name of the batch, for messages.
        """
        if self._stage > 0:
            self._unread.append((fingerprint, batch))
        if self._stage + 1 in self._out:
            self._unsent.append(fingerprint)

    def send(self, operation: Operation, values: Any) -> None:
        """Send nested tuples of tensors to a neighbouring stage, as the input of its ``operation``."""
        fingerprint = self._unsent.popleft() if operation.kind == "F" and self._unsent else ""
        self._out[operation.stage].send(operation.microbatch, fingerprint, values)

    def receive(self, operation: Operation) -> Any:
        """Return what the neighbour has sent as the input of ``operation``.

        Raises:
            UsageError: if the neighbour has read other data than this process.
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
                    f"{batch}. All processes must read the same batches: shuffle with torch's random numbers, and do "
                    "not split data by rank"
                )
        return values

    def close(self) -> None:
        """Tell the neighbours to stop waiting, because this process fails. Transfers under way cannot be cancelled."""
        for end in (*self._out.values(), *self._in.values()):
            end.close()


class _Sender(Protocol):
    def send(self, microbatch: int, fingerprint: str, values: Any) -> None: ...

    def close(self) -> None: ...


class _Receiver(Protocol):
    def receive(self) -> Letter: ...

    def close(self) -> None: ...


class _Peer:
    """The process of a neighbouring stage."""

    def __init__(self, processes: Processes, rank: int, device: torch.device, header_tag: int, body_tag: int) -> None:
        self.rank = rank
        self.device = device
        self.tags = header_tag, body_tag
        self.processes = processes

    def send(self, tensor: Tensor, tag: int) -> "dist.Work | None":
        with self.processes.answering(self.rank):
            return dist.isend(tensor, self.rank, tag=self.tags[tag])

    def expect(self, dtype: torch.dtype, size: int, tag: int, device: Any = "cpu") -> "tuple[dist.Work | None, Tensor]":
        # A receive that is posted during validation may serve a training step. So this must not be an inference tensor.
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
        """Wait until the neighbour has made ``condition`` true, by a change of the shared memory of ``ring``."""
        start = checked = time.monotonic()
        while not condition():
            now = time.monotonic()
            # Poll without a pause at first. The longer the wait, the longer the sleep, which leaves the processor to
            # other processes.
            time.sleep(0 if now - start < 2e-4 else min(max(2e-5, (now - start) / 500), 0.01))
            if now - checked > 0.1:
                checked = now
                has_gone = ring.is_closed or self.processes.has_ended(self.rank)
                if (has_gone and not condition()) or now - start > self.processes.timeout:
                    raise self.processes.lost(self.rank)


class _SharedSender:
    """The sending end of a ring in shared memory. When a message does not fit, it creates a larger ring."""

    def __init__(self, peer: _Peer, ring: Ring) -> None:
        self._peer = peer
        self._ring = ring
        self._left: list[Ring] = []
        """Earlier rings, each of which is kept until the receiver has opened the ring that replaces it."""

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
    """The receiving end of a ring in shared memory."""

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
    """The sending end of a connection through torch.distributed."""

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
            self._send(body[:1], 1)  # completes the posted receive, which is too small
        if self._peer.device.type == "cpu":
            self._expected = max(self._expected, message.size)
        if message.size:
            self._send(body, 1)

    def close(self) -> None:
        """Do nothing: the connection ends with the process."""

    def _send(self, tensor: Tensor, tag: int) -> None:
        self._unfinished.append((self._peer.send(tensor, tag), tensor))
        if len(self._unfinished) > _UNFINISHED:
            self._peer.wait(self._unfinished.popleft()[0])


class _NetworkReceiver:
    """The receiving end of a connection through torch.distributed."""

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
        """Do nothing: the connection ends with the process."""

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
    """Return a header, preceded by its length, as a tensor of at least :data:`_HEADER` bytes."""
    data = len(header).to_bytes(8, "little") + header
    return torch.frombuffer(bytearray(data.ljust(_HEADER, b"\0")), dtype=torch.uint8)


def _length(header: Tensor) -> int:
    """Return the length of a header, which its first eight bytes hold."""
    return int.from_bytes(header[:8].numpy().tobytes(), "little")
