"""Functions that fork processes from one that has imported everything, because importing takes longer than training."""

import gc
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import omegaconf  # noqa: F401, like the next import
import torch
import torch.distributed as dist
from ports import free_port

import aimc_pl.devices.checkpoint  # noqa: F401, here once, or every process would load it and omegaconf


def fork(call, output=None, **environment):
    """Fork this process, make the call in the copy, and return the copy's process number.

    Args:
        call: a function without arguments. The copy's exit code is 1 if it raises, or that of its ``SystemExit``.
        output: the file to which stdout and stderr are appended.
        environment: environment variables of the copy.
    """
    # Otherwise garbage collection in the copy would write to all memory, and so duplicate it.
    gc.freeze()
    if process := os.fork():
        gc.unfreeze()
        return process
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)  # the copy has only the thread that forks
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(file, number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))  # pytest replaces these
    code = 0
    try:
        call()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit takes a second for destructors.
    os._exit(code)


def fork_ranks(world, call, folder):
    """Make the call in processes of ranks 0 to ``world`` − 1 on one host.

    Raises:
        RuntimeError: if a process fails, with the end of all outputs.
    """
    outputs = [Path(folder) / f"{world} {rank}.txt" for rank in range(world)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [fork(call, output, LOCAL_RANK=rank, **address) for rank, output in enumerate(outputs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: " + "\n".join(output.read_text()[-4000:] for output in outputs))


def make_in_two(call, folder, monkeypatch):
    """Make the call in this process, as rank 0 of two, and in a copy, as rank 1. Return the results of both.

    Args:
        call: a function without arguments. Its result must be one that ``torch.save`` can write.
        folder: an empty folder.
        monkeypatch: sets the environment of this process, until the test ends.
    """
    result, output = Path(folder) / "rank 1.pt", Path(folder) / "rank 1.txt"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    copy = fork(lambda: torch.save(call(), result), output, LOCAL_RANK=1, **address)
    try:
        for name, value in (address | {"LOCAL_RANK": 0}).items():
            monkeypatch.setenv(name, str(value))
        ours = call()
        assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0, output.read_text()[-4000:]
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(copy, signal.SIGKILL)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return ours, torch.load(result, weights_only=False)
