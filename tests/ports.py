"""Free ports for tests that run at the same time.

The operating system gives ports from 32768 on to every connection, so one that was free a moment ago may be in use when
a test listens there. These tests take lower ones, each worker of pytest from a range of its own.
"""

import itertools
import os
import socket
from contextlib import suppress

SIZE = 2000
"""The number of ports of a worker. Ten workers have ports of their own."""

_first = 10000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10 * SIZE
# Processes of one worker start at different ports.
_numbers = itertools.count(os.getpid() * 37)


def free_port():
    """Return a port of this machine at which nothing listens. The next call returns another one."""
    for number in itertools.islice(_numbers, SIZE):
        port = _first + number % SIZE
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"no port from {_first} to {_first + SIZE - 1} is free")
