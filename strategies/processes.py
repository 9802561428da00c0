"""Where the processes of a pipeline come from, and what they tell each other besides activations and errors."""

import os
import signal
import warnings
from functools import partial
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torchmetrics import Metric

from aimc_pl.analog import is_analog
from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError
from aimc_pl.fingerprint import fingerprint
from aimc_pl.processes import Processes
from aimc_pl.rendezvous import meet
from aimc_pl.strategies.launcher import Launcher
from aimc_pl.strategies.private_lightning import random_states, set_random_states, update_callback_metrics


class ProcessStrategy(ParallelStrategy):
    """One process, or one per stage, launched by Lightning or by the cluster and connected by torch.distributed.

    All processes read the same batches in the same order, and what is logged is known to rank 0.

    Args:
        num_stages: M.
        timeout: seconds after which a process that does not answer is taken for lost.
        start_timeout: the same until the first mini-batch runs through the processes.

    Attributes:
        processes: all of them, once they are connected; ``None`` if there is one.
        fingerprint: of the batch that was read last.
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
        """Replicas of the model: one, whose stages share the processes. (All of them read the same data.)"""
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
            self._launcher = Launcher(self.cluster_environment, devices, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment who we are (called by the Trainer)."""
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
                # Else gloo listens at the address of the machine's name.
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
            # Of what the loader has yielded, on the host, where it costs no synchronization.
            self.fingerprint = fingerprint(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.processes is not None:
            if isinstance(exception, SIGTERMException):
                exception.code = 128 + signal.SIGTERM  # or Python would exit with 0
            self.processes.fail(exception)
        Launcher.end_children()

    def drain(self) -> None:
        """Finish what is under way; there is nothing here."""

    # ------------------------------------------------- between the processes

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        return [value] if self.processes is None else self.processes.gather(value)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.gather(obj if self.global_rank == src else None)[src]

    @override
    def barrier(self, name: str | None = None) -> None:
        self.gather(None)

    @override
    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """What is logged is known to one process, and is all there is."""
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decisions = self.gather(decision)
        return False not in decisions if all else True in decisions

    def share_start(self, module: "pl.LightningModule") -> None:
        """Start everywhere from rank 0's weights and random states, as a run in one process would."""
        set_random_states(self.broadcast(random_states()))
        values = [v.detach() for v in (*module.parameters(), *module.buffers()) if not is_analog(v)]
        for value, first in zip(values, self.broadcast(values), strict=True):
            value.copy_(first)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.distributed_available_fn = _never
        # Values are logged by one process only.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")

    def share_metrics(self, trainer: "pl.Trainer") -> None:
        """Let every process decide (to stop, to save, to lower a learning rate) by what rank 0 has logged."""
        if self.is_multiprocess:
            metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
            known = self.broadcast(metrics)
            update_callback_metrics(trainer, known)


_show_warning = warnings.showwarning


def _show_once(
    processes: Processes, process: int, message: Warning | str, category: type[Warning], *where: Any
) -> None:
    """Show a warning in the process that is the first to give it: all of them run the same code."""
    is_worker = os.getpid() != process  # a data loader's, which must not use the connections it has inherited
    if is_worker or processes.is_first(f"{category.__name__} {message}"):
        _show_warning(message, category, *where)


def _never() -> bool:
    """For torchmetrics: whether there are other processes to gather from."""
    return False
