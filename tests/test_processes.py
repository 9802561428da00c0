"""These tests check what a process reports when it has lost another one."""

import pytest
import torch.distributed as dist
from torch.distributed import DistNetworkError, HashStore  # pyright: ignore[reportPrivateImportUsage], documented

from aimc_pl.processes import Processes


class Store:
    """The store of a rank 0 that ends: after some calls the connection is lost."""

    def __init__(self, calls, told=True):
        self.calls = calls
        self.told = told

    def _call(self):
        self.calls -= 1
        if self.calls < 0:
            raise DistNetworkError("Connection reset by peer")

    def set(self, key, value):
        self._call()

    def check(self, keys):
        self._call()
        return self.told

    def compare_set(self, key, expected, desired):
        self._call()
        return b"rank 0 (stage 2) has failed with OSError"


@pytest.fixture
def processes():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    alone = Processes(1, timeout=5.0, node=0)
    alone.rank, alone.num_stages = 1, 3  # as rank 1 of three, whose processes the system does not watch
    yield alone
    dist.destroy_process_group()


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_rank_0_has_ended_where_the_store_that_it_serves_has_gone(processes, calls):
    processes._store = Store(calls)
    assert str(processes.lost(0)).startswith("rank 0 (stage 2) has ended. ")
    processes.fail(OSError("there is nobody to be told"))


def test_what_was_told_first_is_said(processes):
    processes._store = Store(calls=3)
    assert str(processes.lost(0)).startswith("rank 0 (stage 2) has failed with OSError. ")


def test_another_culprit_is_not_said_to_have_ended_with_the_store(processes):
    processes._store = Store(calls=2)
    assert str(processes.lost(2)).startswith("rank 2 (stage 0) does not answer. ")
