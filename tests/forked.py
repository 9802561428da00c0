"""Processes that are forked from one that has imported everything, since to import takes longer than to train."""

import gc
import os
import sys
import traceback
from pathlib import Path

import omegaconf  # noqa: F401, as the import below
from lightning.fabric.plugins.environments.lightning import find_free_network_port

import aimc_pl.devices.checkpoint  # noqa: F401, here once: checkpoints would load it and omegaconf in every process


def fork(call, output=None, **environment):
    """The process number of a copy of this process, which makes the call.

    Args:
        call: a function without arguments. The exit code is 1 where it raises, or that of its ``SystemExit``.
        output: the file to which stdout and stderr are appended.
        environment: variables of the copy.
    """
    # Collections in the copy would otherwise write to, and so copy, all memory of this process.
    gc.freeze()
    if process := os.fork():
        return process
    os.environ |= {name: str(value) for name, value in environment.items()}
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
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
    # Python's own way to end takes a second of destructors.
    os._exit(code)


def fork_ranks(world, call, folder):
    """Make the call in processes of ranks 0 to ``world`` − 1 of one host.

    Raises:
        RuntimeError: with what they have written, if one of them fails.
    """
    outputs = [Path(folder) / f"{world} {rank}.txt" for rank in range(world)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_network_port()}
    processes = [fork(call, output, LOCAL_RANK=rank, **address) for rank, output in enumerate(outputs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: " + "\n".join(output.read_text()[-4000:] for output in outputs))
