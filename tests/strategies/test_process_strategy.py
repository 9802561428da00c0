"""These tests check how a process of the strategy finds its place, connects, and shares values, without others."""

import os
import signal
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torchmetrics import MeanMetric

from aimc_pl.devices import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.fingerprint import fingerprint
from aimc_pl.strategies import processes
from aimc_pl.strategies.launcher import Launcher
from aimc_pl.strategies.processes import ProcessStrategy


class Environment(SimpleNamespace):
    """The environment of a cluster, which knows where this process is."""

    main_address, main_port = "10.0.0.1", 1234

    def set_global_rank(self, rank):
        self.rank = rank

    def set_world_size(self, size):
        self.size = size

    def global_rank(self):
        return self.rank

    def local_rank(self):
        return self.local

    def node_rank(self):
        return self.node


class Others:
    """Processes that send given values, and note what this process, of rank 0, sends and tells."""

    def __init__(self, *others):
        self.others = others
        self.sent = []
        self.told = []

    def gather(self, value):
        self.sent.append(value)
        return [value, *self.others]

    def fail(self, error):
        self.told.append(error)

    def is_first(self, what):
        self.told.append(what)
        return self.told.count(what) == 1


def strategy_at(node, local, devices, num_nodes, device="cpu"):
    """Return the strategy of a process with this place in a cluster of nodes with as many devices each."""
    strategy = ProcessStrategy(devices * num_nodes, 7.0, 9.0)
    strategy.num_nodes = num_nodes
    strategy.parallel_devices = [
        torch.device(device, *([index] if device != "cpu" else [])) for index in range(devices)
    ]
    strategy.cluster_environment = Environment(node=node, local=local, rank=0)
    strategy.accelerator = CPUAccelerator()
    return strategy


def alone():
    strategy = strategy_at(0, 0, 1, 1)
    strategy.parallel_devices = None
    return strategy


def among(*others):
    """Return the strategy of rank 0 among processes that send these values."""
    strategy = strategy_at(0, 0, 1 + len(others), 1)
    strategy.processes = Others(*others)
    return strategy


@pytest.mark.parametrize("name", ["timeout", "start_timeout"])
def test_times_are_positive_and_bounded(name):
    limits = {"timeout": 7.0, "start_timeout": 9.0}
    for seconds in (0.1, 10**9):
        strategy = ProcessStrategy(3, **limits | {name: seconds})
        assert {key: getattr(strategy, key) for key in limits} == limits | {name: seconds}
        assert (strategy.num_stages, strategy.num_nodes, strategy.processes) == (3, 1, None)
        assert strategy.fingerprint == ""
    for seconds in (0, 10**9 + 1):
        with pytest.raises(UsageError) as error:
            ProcessStrategy(3, **limits | {name: seconds})
        assert str(error.value) == f"{name} must be a finite number above 0 and at most 1000000000, got {seconds}"


@pytest.mark.parametrize(
    ("node", "local", "devices", "num_nodes", "rank"), [(0, 1, 2, 1, 1), (1, 0, 1, 2, 1), (1, 1, 3, 2, 4)]
)
def test_a_process_knows_its_place(node, local, devices, num_nodes, rank, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    strategy = strategy_at(node, local, devices, num_nodes)
    assert strategy.is_multiprocess
    strategy.set_world_ranks()
    assert strategy.cluster_environment.size == devices * num_nodes
    assert (strategy.global_rank, strategy.local_rank) == (rank, local)
    assert getattr(rank_zero_only, "rank") == rank  # noqa: B009, Lightning adds the attribute
    assert strategy.root_device is (strategy.parallel_devices or [])[local]
    # The processes share one replica of the model.
    assert strategy.world_size == 1


def test_one_process_is_rank_0_on_the_cpu(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 5)
    for strategy, num_stages in ((alone(), 1), (strategy_at(3, 4, 1, 1), 5)):
        strategy.num_stages = num_stages
        strategy.set_world_ranks()
        assert not strategy.is_multiprocess
        assert (strategy.global_rank, strategy.local_rank) == (0, 0)
        assert getattr(rank_zero_only, "rank") == 5  # noqa: B009, Lightning adds the attribute
        assert strategy.root_device == torch.device("cpu")
        strategy.setup_environment()
        assert strategy.processes is None
        strategy._configure_launcher()
        assert strategy.launcher is None


@pytest.mark.parametrize(("devices", "num_nodes"), [(2, 1), (1, 2), (2, 3)])
def test_every_stage_needs_a_process(devices, num_nodes):
    strategy = strategy_at(0, 0, devices, num_nodes)
    strategy._configure_launcher()
    launcher = strategy.launcher
    assert isinstance(launcher, Launcher)
    assert launcher.cluster_environment is strategy.cluster_environment
    assert (launcher.num_processes, launcher.num_nodes) == (devices, num_nodes)
    strategy.num_stages += 1
    with pytest.raises(UsageError) as error:
        strategy._configure_launcher()
    stages, found = strategy.num_stages, devices * num_nodes
    assert str(error.value) == (
        f"{found} processes do not fit num_stages={stages}: set Trainer(devices={stages}) (or devices × num_nodes = "
        f"{stages}) for one stage per process, or Trainer(devices=1) for all stages in one"
    )
    strategy.num_stages = 1
    with pytest.raises(UsageError, match=r"num_stages=1: set Trainer\(devices=1\) for one stage per process, or "):
        strategy._configure_launcher()


@pytest.mark.parametrize(
    ("num_nodes", "device", "backend"), [(1, "cpu", "gloo"), (2, "cpu", "gloo"), (1, "cuda", "cpu:gloo,cuda:nccl")]
)
def test_processes_connect(num_nodes, device, backend, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "rank_zero_info", said.append)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(warnings, "showwarning", None)
    met, connected = [], Others()
    monkeypatch.setattr(processes, "meet", lambda *args: met.append(args))
    monkeypatch.setattr(processes, "Processes", lambda *args: met.append(args) or connected)
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    strategy = strategy_at(num_nodes - 1, 1, 2, num_nodes, device)
    strategy.setup_environment()
    rank, stages = 2 * num_nodes - 1, 2 * num_nodes
    assert met == [("10.0.0.1", 1234, rank, stages, backend, 9.0, Launcher.check), (stages, 9.0, num_nodes - 1)]
    assert strategy.processes is connected
    # A test after a fit connects once more, and does not say so again.
    strategy.setup_environment()
    assert said == [f"{stages} processes, connected by {backend}"]
    assert len(met) == 4
    # Processes of one machine connect by its own interface.
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if num_nodes == 1 else None)
    shown = []
    monkeypatch.setattr(processes, "_show_warning", lambda *args: shown.append(args))
    warnings.showwarning("twice", UserWarning, "file.py", 3)
    warnings.showwarning("twice", UserWarning, "file.py", 3)
    warnings.showwarning("twice", RuntimeWarning, "file.py", 3)
    assert shown == [("twice", kind, "file.py", 3) for kind in (UserWarning, RuntimeWarning)]
    assert connected.told == ["UserWarning twice", "UserWarning twice", "RuntimeWarning twice"]
    # A data loader's worker has another process number, and asks nobody.
    monkeypatch.setattr(os, "getpid", lambda: 0)
    warnings.showwarning("twice", UserWarning, "file.py", 3)
    assert len(shown) == len(connected.told) == 3


def test_a_known_interface_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setattr(warnings, "showwarning", None)
    for name in ("meet", "Processes"):
        monkeypatch.setattr(processes, name, lambda *args: None)
    strategy_at(0, 0, 2, 1).setup_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_values_of_processes():
    strategy = among("b", "c")
    assert strategy.gather("a") == ["a", "b", "c"]
    assert [strategy.broadcast("a", src) for src in (0, 1, 2)] == ["a", "b", "c"]
    assert strategy.broadcast("a") == "a"
    strategy.barrier("here")
    # Only the source of a broadcast sends its value.
    assert strategy.processes.sent == ["a", "a", None, None, "a", None]
    value = torch.ones(2)
    assert strategy.reduce(value) is value
    assert (alone().gather("a"), alone().broadcast("a"), alone().barrier()) == (["a"], "a", None)


@pytest.mark.parametrize("others", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("own", [True, False])
def test_decisions_of_processes(own, others):
    strategy = among(*others)
    assert strategy.reduce_boolean_decision(own) is all([own, *others])
    assert strategy.reduce_boolean_decision(own, all=True) is all([own, *others])
    assert strategy.reduce_boolean_decision(own, all=False) is any([own, *others])


@pytest.mark.parametrize("make", [alone, among])
def test_batches_are_hashed_where_there_are_others(make):
    strategy, batch = make(), (torch.arange(3), "text")
    moved = strategy.batch_to_device(batch, torch.device("meta"))
    assert (moved[0].device.type, moved[1]) == ("meta", "text")
    assert strategy.fingerprint == ("" if strategy.processes is None else fingerprint(batch))


@pytest.mark.parametrize(
    ("error", "code"), [(SIGTERMException(), 128 + signal.SIGTERM), (SystemExit(3), 3), (OSError("full"), None)]
)
def test_others_are_told_of_a_failure(error, code, monkeypatch):
    ended = []
    monkeypatch.setattr(Launcher, "end_children", lambda: ended.append(True))
    strategy = among("b")
    strategy.on_exception(error)
    assert strategy.processes.told == [error]
    assert getattr(error, "code", None) == code
    alone().on_exception(error)
    assert ended == [True, True]


def test_all_start_from_the_weights_and_random_states_of_rank_0():
    def make(seed):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), MeanMetric())
        convert_to_analog(module, {"0": None, "2": "ideal"})
        module[1].running_mean.uniform_()
        return module

    first, second = make(1), make(2)
    tile = second[2].get_weights()[0].clone()
    strategy, sent = among("b"), []
    torch.manual_seed(1)
    strategy.broadcast = lambda value: sent.append(value) or value
    strategy.share_start(first)
    expected = torch.rand(3)
    received = iter(sent)
    torch.manual_seed(2)
    strategy.broadcast = lambda value: next(received)
    strategy.share_start(second)
    assert torch.equal(torch.rand(3), expected)
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(second.state_dict()[name], first.state_dict()[name])
    # Tiles were made from the random states of rank 0, before.
    assert torch.equal(second[2].get_weights()[0], tile)
    assert second[3].distributed_available_fn() is False
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("It is recommended to use `sync_dist=True` here", stacklevel=1)
    assert not caught


def test_metrics_of_rank_0_are_those_of_all(monkeypatch):
    known = []
    monkeypatch.setattr(processes, "update_callback_metrics", lambda trainer, metrics: known.append((trainer, metrics)))
    trainer = SimpleNamespace(callback_metrics={"loss": torch.tensor(2.0)})
    forgotten = []
    monkeypatch.setattr(processes, "forget_logged", forgotten.append)
    strategy = among("b")
    strategy.broadcast = lambda metrics: metrics | {"of rank 0": True}
    strategy.share_metrics(trainer)
    assert known == [(trainer, {"loss": torch.tensor(2.0), "of rank 0": True})]
    assert forgotten == []
    alone().share_metrics(trainer)
    assert len(known) == 1
