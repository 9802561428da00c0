"""Starts the other processes of this machine, and ends them."""

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from typing import Any, ClassVar, override

import lightning.pytorch as pl

from aimc_pl.errors import PeerError
from aimc_pl.rendezvous import SECRET
from aimc_pl.strategies.private_lightning import ScriptLauncher, share_threads

_PARENT = "AIMC_PL_PARENT"
"""The environment variable that tells a child the process that has started it."""
_PATIENCE = 5.0
"""Seconds in which children end by themselves after a failure."""


class Launcher(ScriptLauncher):
    """Lightning's, which runs the script again for every other process of this machine.

    It watches the children itself while they start: Lightning would kill this process too, before it can say why.
    """

    children: ClassVar[list[subprocess.Popen[bytes]]] = []
    """Of this process, which later trainers of the same script go on with."""

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: "pl.Trainer | None" = None, **kwargs: Any
    ) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            if self.num_nodes == 1:
                os.environ.setdefault(SECRET, secrets.token_hex())
            os.environ[_PARENT] = str(os.getpid())
            self.start_children()
            Launcher.children = self.procs
        share_threads(self.num_processes)
        return function(*args, **kwargs)

    @staticmethod
    def check() -> None:
        """Nobody needs to wait for a process that has ended before it could join.

        Raises:
            PeerError: if a child of this process has, or its parent.
        """
        for rank, child in enumerate(Launcher.children, 1):
            if child.poll() is not None:
                raise PeerError(
                    f"rank {rank} has ended with exit code {child.returncode} before it had joined the others: see its "
                    "own output"
                )
        parent = os.environ.get(_PARENT)
        if parent not in (None, str(os.getpid()), str(os.getppid())):
            raise PeerError("rank 0, which has started this process, has ended")

    @staticmethod
    def end_children() -> None:
        """Let them end by themselves, for they know of the failure, and kill those that do not."""
        deadline = time.monotonic() + _PATIENCE
        for child in Launcher.children:
            try:
                child.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
