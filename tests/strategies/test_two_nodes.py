"""These tests run two processes on two nodes, which share nothing but the network."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import fork
from long_run import train
from multiprocess_cases import CASES, assert_same
from ports import free_port

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent


def outputs(folder):
    return [(folder / f"output{node}").read_text() for node in range(2)]


@pytest.fixture
def hosts():
    """Make two network namespaces that are connected by a virtual cable, and give their names."""
    names = [f"a{secrets.token_hex(3)}", f"b{secrets.token_hex(3)}"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    cable = ["type", "veth", "peer", "name", f"v{names[1]}", "netns", names[1]]
    subprocess.run(["ip", "link", "add", f"v{names[0]}", "netns", names[0], *cable], check=True)
    for number, name in enumerate(names):
        for command in (
            ["addr", "add", f"10.77.0.{number + 1}/24", "dev", f"v{name}"],
            ["link", "set", f"v{name}", "up"],
            ["link", "set", "lo", "up"],
        ):
            subprocess.run(["ip", "-n", name, *command], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.usefixtures("one_thread")
def test_nodes_train_as_one_process_does(tmp_path):
    """Check two nodes of torchrun."""
    address, nodes = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"], []
    for node in range(2):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", *address]
        command = [sys.executable, *torchrun, str(TESTS / "multiprocess_cases.py"), str(tmp_path)]
        with (tmp_path / f"output{node}").open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            nodes.append(
                subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
            )
    assert [node.wait(timeout=200) for node in nodes] == [0, 0], outputs(tmp_path)
    results = torch.load(tmp_path / "results of 2.pt", weights_only=False)
    assert len(results) >= 6
    for name in results:
        ours = CASES[name][1](tmp_path / "one", devices=1)
        assert_same(results[name]["weights"], ours["weights"], exactly="mean field" in name, is_analog=False)


@pytest.mark.filterwarnings("ignore:given by every process")  # long_run warns on purpose
def test_a_cut_cable_ends_the_run(hosts, tmp_path):
    """Check two nodes of Lightning's own environment, in two network namespaces."""

    def run(host):
        os.setns(os.open(f"/run/netns/{host}", os.O_RDONLY), os.CLONE_NEWNET)
        train(tmp_path, num_stages=2, timeout=10, devices=1, num_nodes=2)

    address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": free_port(), "LOCAL_RANK": 0}
    nodes = [
        fork(partial(run, host), tmp_path / f"output{node}", NODE_RANK=node, GLOO_SOCKET_IFNAME=f"v{host}", **address)
        for node, host in enumerate(hosts)
    ]
    try:
        step = tmp_path / "step"
        while not step.exists() or int(step.read_text() or 0) < 12:
            assert not any(os.waitpid(node, os.WNOHANG)[0] for node in nodes), outputs(tmp_path)
            time.sleep(0.1)
        subprocess.run(["ip", "-n", hosts[0], "link", "set", f"v{hosts[0]}", "down"], check=True)
        cut = time.monotonic()
        while not all("does not answer" in text for text in outputs(tmp_path)):
            assert time.monotonic() - cut < 60, outputs(tmp_path)
            time.sleep(0.5)
    finally:
        for node in nodes:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(node, signal.SIGKILL)
                os.waitpid(node, 0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] >= 10
