"""Where the processes of a pipeline come from, and what they tell each other besides activations and errors."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from aihwkit.optim.context import AnalogContext
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning_utilities.core.rank_zero import rank_zero_only
from torchmetrics import Metric

from aimc_pl.distributed import lost
from aimc_pl.errors import PeerError, UsageError
from aimc_pl.strategies.private_lightning import update_callback_metrics


class ProcessStrategy(ParallelStrategy):
    """One process, or one per stage, launched by Lightning or by the cluster and connected by torch.distributed.

    All processes read the same batches in the same order, and what is logged is known to rank 0.

    Args:
        num_stages: M.
        timeout: seconds after which a process that does not answer is taken for lost.
    """

    def __init__(self, num_stages: int, timeout: float) -> None:
        super().__init__()
        self.num_nodes = 1
        self.timeout = timeout
        self.num_stages = num_stages

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
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, devices, self.num_nodes)

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
            assert self.cluster_environment is not None
            backend = "gloo" if self.root_device.type == "cpu" else f"cpu:gloo,{self.root_device.type}:nccl"
            _init_dist_connection(self.cluster_environment, backend, timeout=timedelta(seconds=self.timeout))

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, PeerError) and isinstance(self._launcher, _SubprocessScriptLauncher):
            # One of them may hang.
            self._launcher.kill(9)

    def drain(self) -> None:
        """Finish what is under way; there is nothing here."""

    # ------------------------------------------------- between the processes

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if not self.is_multiprocess:
            return [value]
        others = range(1, self.num_stages)
        if self.is_global_zero:
            values = [value, *(self._exchange(dist.recv_object_list, None, rank) for rank in others)]
            for rank in others:
                self._exchange(dist.send_object_list, values, rank)
            return values
        self._exchange(dist.send_object_list, value, 0)
        return self._exchange(dist.recv_object_list, None, 0)

    def _exchange(self, function: Callable[..., Any], value: Any, rank: int) -> Any:
        objects = [value]
        try:
            function(objects, rank, device=torch.device("cpu"))
        except RuntimeError as error:
            raise lost(rank, self.num_stages, self.timeout) from error
        return objects[0]

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
        _set_rng_states(self.broadcast(_collect_rng_states(include_cuda=False)))
        values = [v.detach() for v in (*module.parameters(), *module.buffers()) if not isinstance(v, AnalogContext)]
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


def _never() -> bool:
    """For torchmetrics: whether there are other processes to gather from."""
    return False
