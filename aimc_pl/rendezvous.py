"""How the processes of a run find each other: each process joins a store, which rank 0 or torchrun serves.

Neither the store nor torch.distributed checks who connects. For this reason the store listens at the master's address
only. Before anything else, the processes prove to each other that they know the secret of the run.
"""

import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistError, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage], documented

from aimc_pl.errors import PeerError, UsageError

SECRET = "AIMC_PL_SECRET"
"""The environment variable that holds the secret of the run. Without it, no process has to prove anything."""


def meet(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str,
    timeout: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Connect the processes of a run by torch.distributed. Do nothing if they are connected already.

    Args:
        address: the address of the master, which is rank 0.
        port: the port of the store at that address.
        rank: the rank of this process.
        world_size: the number of processes.
        backend: the backend of torch.distributed.
        timeout: seconds within which all processes must have joined.
        check: called repeatedly until then. It raises an error if it is useless to wait any longer.

    Raises:
        UsageError: if rank 0 cannot listen at the address and port.
        PeerError: if a process is missing, or does not know the secret.
    """
    if dist.is_initialized():
        return
    listener = None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        listener = _listen(address, port)
    limit = timedelta(seconds=timeout)

    def join() -> Store:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=listener is not None,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
        _join(store, rank, world_size, timeout)
        return store

    try:
        if listener is None:
            _find(address, port, timeout, check)
        store = within(timeout + 5, join, check)
    except (TimeoutError, DistError) as error:
        raise PeerError(
            f"rank {rank} has found no rank 0 at {address}:{port} within {timeout:g} s: it has not started, or "
            "something else listens there (set MASTER_PORT to a free port)"
        ) from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    _prove(rank, world_size, os.environ.get(SECRET, "").encode(), limit)


def within(seconds: float, function: Callable[[], Any], check: Callable[[], None] = lambda: None) -> Any:
    """Return the result of a function that may never return, such as a call to a store whose server hangs.

    Args:
        seconds: how long to wait for the result.
        function: runs in a thread of its own. What it raises is raised here.
        check: called repeatedly until then. It raises an error if it is useless to wait any longer.

    Raises:
        TimeoutError: if the function has not returned in time. A thread of this process then stays inside it.
    """
    results: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = Thread(target=call, daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while not results:
        check()
        if time.monotonic() > deadline:
            raise TimeoutError
        thread.join(0.05)
    result, error = results[0]
    if error is not None:
        raise error
    return result


def _listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens at one address of this machine. torch would listen at all of them."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen at {address}:{port} ({error.strerror}): set MASTER_ADDR to an address of its "
            "machine, and MASTER_PORT to a free port"
        ) from error


def _find(address: str, port: int, timeout: float, check: Callable[[], None]) -> None:
    """Wait until a process listens at the address. torch could wait too, but its wait cannot be interrupted."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((address, port), timeout=1).close()
        except OSError as error:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError from error
            time.sleep(0.1)  # rank 0 may start later


def _join(store: Store, rank: int, world_size: int, timeout: float) -> None:
    """Write to the store that this process has joined, and wait until all others have."""
    keys = [f"joined {other}" for other in range(world_size)]
    store.set(keys[rank], "")
    deadline = time.monotonic() + timeout
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
            raise PeerError(f"rank {missing} of {world_size} has not started within {timeout:g} s: see its own output")
        time.sleep(0.05)  # a wait inside the store could not say which rank is missing


def _prove(rank: int, world_size: int, secret: bytes, limit: timedelta) -> None:
    """Check, on every connection, that the process at the other end knows the secret."""
    others = [other for other in range(world_size) if other != rank]
    asked = secrets.token_bytes(32)
    questions = _exchange(dict.fromkeys(others, asked), limit)
    proofs = _exchange({other: _proof(secret, rank, other, questions[other]) for other in others}, limit)
    for other in others:
        if not hmac.compare_digest(proofs[other], _proof(secret, other, rank, asked)):
            raise PeerError(
                f"what has joined as rank {other} does not know the secret of this run: give all processes the same "
                f"{SECRET}, or none"
            )


def _proof(secret: bytes, prover: int, asker: int, question: bytes) -> bytes:
    """Return the answer of one rank to the question of another one. Only a process with the secret can compute it."""
    return hmac.digest(secret, f"{prover} {asker} ".encode() + question, "sha256")


def _exchange(messages: dict[int, bytes], limit: timedelta) -> dict[int, bytes]:
    """Send 32 bytes to every other process, and return the 32 bytes that each of them has sent."""
    sent = {other: torch.frombuffer(bytearray(message), dtype=torch.uint8) for other, message in messages.items()}
    received = {other: torch.empty(32, dtype=torch.uint8) for other in messages}
    works = [dist.isend(tensor, other) for other, tensor in sent.items()]
    works += [dist.irecv(tensor, other) for other, tensor in received.items()]
    for work in works:
        assert work is not None
        try:
            work.wait(limit)
        except RuntimeError as error:
            raise PeerError("a process has ended while the processes connected: see the outputs of all") from error
    return {other: tensor.numpy().tobytes() for other, tensor in received.items()}
