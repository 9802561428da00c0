"""This script sends awkward messages between two processes. test_distributed.py runs it under torchrun."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from aimc_pl.distributed import Link
from aimc_pl.errors import UsageError
from aimc_pl.processes import Processes
from aimc_pl.schedule import Operation

NUMBERS = torch.arange(1_000_000, dtype=torch.float32)
MESSAGES = [
    (torch.ones(3),),
    (torch.ones(3, requires_grad=True), None, 7, "text", (torch.zeros(2, 0), [torch.tensor(True)])),
    (NUMBERS,),
    (NUMBERS[:5],),
    (NUMBERS.view(1000, 1000).T, NUMBERS.double()[::7], NUMBERS[:10].bfloat16(), NUMBERS[:9].long()),
    tuple(torch.full((2, 3), float(i)) for i in range(200)),
    None,
    (NUMBERS.repeat(3),),
    (),
    (torch.tensor(5),),
]
"""Messages of growing and shrinking sizes, many types, non-contiguous tensors, and 200 tensors with a long header."""


def same(a, b):
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b)
    if isinstance(b, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for shares_memory in (True, False):
        processes = Processes(2, 60, node=0 if shares_memory else dist.get_rank())
        assert processes.is_near(1 - processes.rank) == shares_memory
        link, stage = Link(processes, torch.device("cpu")), processes.stage
        # There are more messages than fit into the link, in both directions, and some are sent in inference mode.
        for turn in range(4):
            with torch.inference_mode(turn % 2 == 1):
                for k, message in enumerate(MESSAGES):
                    if stage == 0:
                        link.send(Operation("F", 1, k), message)
                        if k >= 2:
                            assert same(link.receive(Operation("B", 0, k - 2)), MESSAGES[k - 2]), (
                                shares_memory,
                                turn,
                                k,
                            )
                    else:
                        assert same(link.receive(Operation("F", 1, k)), message), (shares_memory, turn, k)
                        link.send(Operation("B", 0, k), message)
                for k in range(len(MESSAGES) - 2, len(MESSAGES) if stage == 0 else 0):
                    assert same(link.receive(Operation("B", 0, k)), MESSAGES[k]), (shares_memory, turn, k)
        if stage == 1:
            link.send(Operation("B", 0, 3), ())
        else:
            with pytest.raises(RuntimeError, match="has sent micro-batch 3"):
                link.receive(Operation("B", 0, 4))
        link.announce(f"read by stage {stage}", "batch 7")
        if stage == 0:
            link.send(Operation("F", 1, 5), ())
        else:
            with pytest.raises(
                UsageError, match=r"rank 1 \(stage 0\) and rank 0 \(stage 1\) .* different data in batch 7"
            ):
                link.receive(Operation("F", 1, 5))
        assert ("/memfd:aimc_pl ring" in Path("/proc/self/maps").read_text()) or not shares_memory
        dist.barrier()
    assert processes.gather({"rank": processes.rank, "value": NUMBERS[:3]})[1]["rank"] == 1
    processes._exchanges += processes.rank
    with pytest.raises(UsageError, match="do not take the same way"):
        processes.gather(None)
    if processes.rank == 0:  # Rank 0 has raised before it sent its answer, so the answer is sent here.
        processes._send(None, [1])
    dist.barrier()


if __name__ == "__main__":
    main()
