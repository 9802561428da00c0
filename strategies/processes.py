"""The base class of the strategy launches and connects the processes of a pipeline.

It also exchanges the values that the processes share besides activations and errors.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torchmetrics import Metric

from aimc_pl.analog import is_analog
from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError
from aimc_pl.fingerprint import fingerprint
from aimc_pl.ghosts import Unknown
from aimc_pl.patches import patched
from aimc_pl.processes import Processes
from aimc_pl.rendezvous import meet
from aimc_pl.strategies.launcher import Launcher
from aimc_pl.strategies.private_lightning import (
    callbacks_of,
    forget_logged,
    random_states,
    set_random_states,
    share_before_plateaus,
    update_callback_metrics,
)


class ProcessStrategy(ParallelStrategy):
    """A strategy that runs in one process, or in one process per stage.

    Lightning or the cluster launches the processes, and torch.distributed connects them. All processes read the same
    batches in the same order. Rank 0 knows the values that are logged.

    Args:
        num_stages: M, the number of stages.
        timeout: seconds after which a process that does not answer is taken for lost.
        start_timeout: the same, until the first mini-batch runs through the processes.

    Attributes:
        processes: all processes, once they are connected; ``None`` if there is only one.
        fingerprint: a hash of the batch that was read last.
    """

    def __init__(self, num_stages: int, timeout: float, start_timeout: float) -> None:
        super().__init__()
        check_number("timeout", timeout, above=0, at_most=10**9)
        check_number("start_timeout", start_timeout, above=0, at_most=10**9)
        self.num_nodes = 1
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.num_stages = num_stages
        self.processes: Processes | None = None
        self.fingerprint = ""
        self._patches = ExitStack()

    @property
    def is_multiprocess(self) -> bool:
        """Whether every stage runs in a process of its own."""
        return self.num_nodes * len(self.parallel_devices or [None]) > 1

    @property
    @override
    def global_rank(self) -> int:
        return super().global_rank if self.is_multiprocess else 0

    @property
    @override
    def local_rank(self) -> int:
        return super().local_rank if self.is_multiprocess else 0

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank] if self.parallel_devices else torch.device("cpu")

    @property
    @override
    def world_size(self) -> int:
        """The number of replicas of the model: always 1. The processes share its stages, and read the same data."""
        return 1

    @override
    def _configure_launcher(self) -> None:
        devices = len(self.parallel_devices or [None])
        if self.num_nodes * devices not in (1, self.num_stages):
            nodes = f" (or devices × num_nodes = {self.num_stages})" if self.num_stages > 1 else ""
            raise UsageError(
                f"{self.num_nodes * devices} processes do not fit num_stages={self.num_stages}: set "
                f"Trainer(devices={self.num_stages}){nodes} for one stage per process, or Trainer(devices=1) for all "
                "stages in one"
            )
        if self.is_multiprocess:
            assert self.cluster_environment is not None
            if hasattr(sys, "ps1") or sys.argv[0] in ("", "-"):
                raise UsageError(
                    f"a notebook, an interactive Python or a script from standard input cannot start {devices} "
                    "processes: set Trainer(devices=1) here, or save the code as a script and run that"
                )
            self._launcher = Launcher(self.cluster_environment, devices, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Set the rank of this process and the number of processes in the cluster environment.

        The Trainer calls this method.
        """
        if self.is_multiprocess and self.cluster_environment is not None:
            devices = len(self.parallel_devices or [])
            self.cluster_environment.set_global_rank(self.node_rank * devices + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * devices)
            rank_zero_only.rank = self.global_rank  # pyright: ignore[reportFunctionMemberAccess]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.is_multiprocess:
            self.set_world_ranks()
            environment = self.cluster_environment
            assert environment is not None
            if self.num_nodes == 1:
                # Without this, gloo listens at the address of the machine's name.
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            backend = "gloo" if self.root_device.type == "cpu" else f"cpu:gloo,{self.root_device.type}:nccl"
            meet(
                environment.main_address,
                environment.main_port,
                self.global_rank,
                self.num_stages,
                backend,
                self.start_timeout,
                Launcher.check,
            )
            if self.processes is None:  # and not a test after a fit
                rank_zero_info(f"{self.num_stages} processes, connected by {backend}")
            self.processes = Processes(self.num_stages, self.start_timeout, self.node_rank)
            warnings.showwarning = partial(_show_once, self.processes, os.getpid())

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self.processes is not None:
            # The batch is still on the host, where a fingerprint costs no synchronization.
            self.fingerprint = fingerprint(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.processes is not None:
            if isinstance(exception, SIGTERMException):
                exception.code = 128 + signal.SIGTERM  # otherwise Python would exit with 0
            self.processes.fail(exception)
        Launcher.end_children()

    def drain(self) -> None:
        """Finish the micro-batches in flight. This base class has none."""

    # ------------------------------------------------- between the processes

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        return [value] if self.processes is None else self.processes.gather(value)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.gather(obj if self.global_rank == src else None)[src]

    @override
    def barrier(self, name: str | None = None) -> None:
        self.gather(None)

    @override
    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the tensor as it is: only one process has the value that is logged."""
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decisions = self.gather(decision)
        return False not in decisions if all else True in decisions

    def share_start(self, module: "pl.LightningModule") -> None:
        """Give all processes the weights and random states of rank 0, from which a run in one process would start."""
        set_random_states(self.broadcast(random_states()))
        values = [v.detach() for v in (*module.parameters(), *module.buffers()) if not is_analog(v)]
        for value, first in zip(values, self.broadcast(values), strict=True):
            value.copy_(first)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.distributed_available_fn = _never
        # Only one process logs values, so there is nothing to synchronize.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        if self.global_rank != 0:
            # Only the process of the last stage updates metrics. What hooks compute from them in this one is dropped.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric .* was called before")

    def share_metrics(self, trainer: "pl.Trainer") -> None:
        """Give all processes the metrics that rank 0 has logged.

        All of them then decide alike, for example to stop, to save or to lower a learning rate.
        """
        if self.is_multiprocess:
            metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
            known = self.broadcast(metrics)
            if self.global_rank != 0:
                # What hooks have logged here was computed without the values of the last stage.
                forget_logged(trainer)
            update_callback_metrics(trainer, known)

    def share_before_decisions(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """Share metrics, until the teardown, before callbacks and plateau schedulers decide by them.

        Lightning calls the callbacks that decide by metrics after the module's ``on_train_epoch_end``, which may log.
        """
        patches = [share_before_plateaus(trainer, self.share_metrics)]
        callbacks = callbacks_of(trainer)
        if deciding := [callback for callback in callbacks if isinstance(callback, EarlyStopping | Checkpoint)]:
            first = deciding[0]
            share = partial(_share_first, self, first.on_train_epoch_end)
            patches.append((first, "on_train_epoch_end", share))
        if self.global_rank != 0:
            logging = [module, *(callback for callback in callbacks if hasattr(callback, "log"))]
            patches += [(owner, "log", partial(_log_if_known, owner.log)) for owner in logging]
        self._patches.close()
        self._patches.enter_context(patched(*patches))

    @override
    def teardown(self) -> None:
        self._patches.close()
        super().teardown()


_show_warning = warnings.showwarning


def _show_once(
    processes: Processes, process: int, message: Warning | str, category: type[Warning], *where: Any
) -> None:
    """Show a warning in the first process that gives it only, since all processes run the same code."""
    is_worker = os.getpid() != process  # a data loader's worker must not use the connections that it has inherited
    if is_worker or processes.is_first(f"{category.__name__} {message}"):
        _show_warning(message, category, *where)


def _share_first(strategy: ProcessStrategy, hook: Callable[..., None], trainer: "pl.Trainer", *args: Any) -> None:
    strategy.share_metrics(trainer)
    hook(trainer, *args)


def _log_if_known(log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Log a value, unless only rank 0 knows it. Rank 0 logs it."""
    if not isinstance(value, Unknown):
        log(name, value, *args, **kwargs)


def _never() -> bool:
    """Return ``False``. torchmetrics asks this function whether there are other processes to gather from."""
    return False
