"""The launcher in this module starts the other processes of this machine, and ends them."""

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from typing import Any, ClassVar, override

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info

from aimc_pl.errors import PeerError
from aimc_pl.rendezvous import SECRET
from aimc_pl.strategies.private_lightning import ScriptLauncher, share_threads

_PARENT = "AIMC_PL_PARENT"
"""The environment variable that tells a child process the process ID of its parent."""
_PATIENCE = 5.0
"""The number of seconds that child processes have to end by themselves after a failure."""


class Launcher(ScriptLauncher):
    """Lightning's launcher, which runs the user's script again for every other process of this machine.

    This class watches the child processes itself while they start. If one of them ends, Lightning would kill this
    process too, before this process can say why.
    """

    children: ClassVar[list[subprocess.Popen[bytes]]] = []
    """The child processes of this process. Later trainers of the same script use them again."""

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
            rank_zero_info(f"starting {self.num_processes} processes, each of which imports torch, which takes a while")
            self.start_children()
            Launcher.children = self.procs
        share_threads(self.num_processes)
        return function(*args, **kwargs)

    @staticmethod
    def check() -> None:
        """Check, while processes wait for each other at the start, that none of them has ended already.

        Raises:
            PeerError: if a child of this process has ended, or the parent.
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
        """Wait until the child processes, which know of the failure, end by themselves, and kill those that do not."""
        deadline = time.monotonic() + _PATIENCE
        for child in Launcher.children:
            try:
                child.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
