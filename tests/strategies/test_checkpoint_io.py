"""These tests check that checkpoint files are written whole or not at all, are verified, and cannot run code."""

import errno
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from aihwkit.inference.converter.wpo import loss_fxn
from lightning.pytorch.plugins import AsyncCheckpointIO

from aimc_pl.devices import checkpoint
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy, checkpoint_io
from aimc_pl.strategies.checkpoint_io import SealedCheckpointIO

IO = SealedCheckpointIO()


def content(value, size=10):
    return {"state_dict": {"weight": torch.full((size,), float(value))}, "epoch": value}


def epoch(path):
    """Load a checkpoint, check that its weights belong to its epoch, and return the epoch."""
    loaded = IO.load_checkpoint(path)
    assert (loaded["state_dict"]["weight"] == loaded["epoch"]).all()
    return loaded["epoch"]


def refusal(path):
    with pytest.raises(UsageError) as error:
        IO.load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "new" / "folder" / "one.ckpt"
    IO.save_checkpoint(content(1), path)
    return path


# ------------------------------------------------------------------- reading


def test_tensors_come_to_a_device(file):
    assert IO.load_checkpoint(file)["state_dict"]["weight"].device.type == "cpu"
    assert IO.load_checkpoint(file, map_location="meta")["state_dict"]["weight"].device.type == "meta"


def test_others_read_it_too(file):
    assert torch.load(file)["epoch"] == torch.load(file, mmap=True)["epoch"] == epoch(file) == 1
    assert ZipFile(file).testzip() is None
    # The last field of an archive is the length of the comment, in two bytes.
    whole = file.read_bytes()
    assert ZipFile(file).comment == whole[-71:]
    assert whole[-73:-71] == bytes([71, 0])


@pytest.mark.parametrize("new_format", [True, False])
def test_files_without_a_checksum_are_read(new_format, tmp_path):
    torch.save(content(3), tmp_path / "plain.ckpt", _use_new_zipfile_serialization=new_format)
    assert epoch(tmp_path / "plain.ckpt") == 3


def test_every_flipped_byte_is_noticed(file):
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "damaged" in refusal(file), place


def test_every_missing_end_is_noticed(file):
    whole = file.read_bytes()
    for length in (*range(0, len(whole), 61), len(whole) - 1):
        file.write_bytes(whole[:length])
        assert re.search("damaged|cut off|only a part of one", refusal(file)), length


def test_a_damaged_archive_without_a_checksum_is_noticed(tmp_path):
    torch.save(content(3), tmp_path / "plain.ckpt")
    whole = (tmp_path / "plain.ckpt").read_bytes()
    (tmp_path / "plain.ckpt").write_bytes(whole.replace(b"PK\1\2", b"PK\1\0"))  # where its list of contents begins
    assert "damaged" in refusal(tmp_path / "plain.ckpt")


@pytest.mark.parametrize(
    "data", [b"", b"some text", b"\x89PNG\r\n\x1a\n" + bytes(500), pickle.dumps([1]), bytes(1000), b"PK"]
)
def test_other_files_are_no_checkpoints(data, tmp_path):
    (tmp_path / "other").write_bytes(data)
    assert ("is cut off" if data == b"PK" else "is no checkpoint") in refusal(tmp_path / "other")


def test_other_archives_and_objects_are_no_checkpoints(tmp_path):
    with ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("text", "some text")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "no checkpoint" in refusal(tmp_path / "archive.zip")
    assert "no checkpoint" in refusal(tmp_path / "tensor.pt")


def test_what_is_not_there(tmp_path):
    assert "No such file" in refusal(tmp_path / "nothing.ckpt")
    assert "directory" in refusal(tmp_path)


# ---------------------------------------------------------------------- code


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(ran):
    """Return objects that would leave a file if they were unpickled."""
    payload = pickle.dumps(Calls(os.mkdir, str(ran)))
    return {
        "os": Calls(os.mkdir, str(ran)),
        "eval": Calls(eval, f"__import__('os').mkdir({str(ran)!r})"),
        "a function of aihwkit that unpickles": Calls(loss_fxn, payload),
        "our importer": Calls(vars(checkpoint)["import_module"], "antigravity"),
        "our finder of classes": Calls(checkpoint._find, "os", "mkdir"),
    }


@pytest.fixture
def server(tmp_path):
    """Serve the test's folder and give its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", evil(""))
@pytest.mark.parametrize("scheme", ["", "file://", "http"])
def test_a_file_cannot_run_code(scheme, kind, server, tmp_path):
    torch.save(content(1) | {"callbacks": evil(tmp_path / "ran")[kind]}, tmp_path / "evil.ckpt")
    path = f"{server}/evil.ckpt" if scheme == "http" else f"{scheme}{tmp_path / 'evil.ckpt'}"
    assert "could run code" in refusal(path)
    assert not (tmp_path / "ran").exists()
    # With weights_only=False the same file does run its code, so the refusal is what stopped it.
    if kind == "os" and not scheme:
        IO.load_checkpoint(path, weights_only=False)
        assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_addresses(server, tmp_path):
    IO.save_checkpoint(content(2), f"file://{tmp_path}/two.ckpt")
    assert epoch(f"{server}/two.ckpt") == epoch(f"file://{tmp_path}/two.ckpt") == epoch(tmp_path / "two.ckpt") == 2
    (tmp_path / "two.ckpt").write_bytes((tmp_path / "two.ckpt").read_bytes()[:-200])
    assert "cut off" in refusal(f"{server}/two.ckpt")
    assert "cannot read" in refusal(f"{server}/none.ckpt")


# ------------------------------------------------------------------- writing


def in_child(function):
    """Return the exit status of a forked process that calls a function, which must not compute with torch's threads."""
    if not (child := os.fork()):
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def save_and_die_at(line, state, path):
    """Save, and kill this process before the given line of checkpoint_io, counted as lines run."""
    left = line

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename != checkpoint_io.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    IO.save_checkpoint(state, path)


@pytest.mark.slow
def test_killed_at_any_line_leaves_a_checkpoint(file):
    line, status, seen, new = 0, signal.SIGKILL, set(), content(2)
    while status == signal.SIGKILL:
        IO.save_checkpoint(content(1), file)
        line += 1
        status = in_child(partial(save_and_die_at, line, new, file))
        seen.add((epoch(file), len(list(file.parent.iterdir()))))
    assert status == 0
    assert line > 20
    # The process died before, within and after the write. The next write removes what was left.
    assert seen == {(1, 1), (1, 2), (2, 1)}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.slow
def test_killed_at_any_time_leaves_a_checkpoint(file):
    contents = [content(value, size=2_000_000) for value in (2, 3)]

    def save_often():
        for turn in range(1000):
            IO.save_checkpoint(contents[turn % 2], file)

    found = set()
    for kill_after in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        if not (child := os.fork()):
            save_often()
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.add(epoch(file))
        assert len(list(file.parent.iterdir())) <= 2
    assert found & {2, 3}
    IO.save_checkpoint(content(1), file)
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_one(file):
    large = content(2, size=1_000_000)

    def save():
        # The limit acts like a disk with 100 kB left.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(UsageError, match=f"^cannot write checkpoint {file}: {os.strerror(errno.EFBIG)}"):
            IO.save_checkpoint(large, file)

    assert in_child(save) == 0
    assert epoch(file) == 1
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_may_not_be_written_to(file):
    small = content(2)

    def save():
        file.parent.chmod(0o555)
        if os.geteuid() == 0:
            for folder in (*file.parents,)[:-2]:
                folder.chmod(folder.stat().st_mode | 0o555)
            os.seteuid(65534)
        with pytest.raises(UsageError, match=f"^cannot write checkpoint {file}: Permission denied"):
            IO.save_checkpoint(small, file)

    assert in_child(save) == 0
    file.parent.chmod(0o755)
    assert epoch(file) == 1


def test_another_writer_is_left_alone(file):
    theirs = file.with_name(".two.ckpt.123.unfinished")
    with theirs.open("wb") as held:
        flock(held, LOCK_EX)
        IO.save_checkpoint(content(2), file)
        assert theirs.exists()
    IO.save_checkpoint(content(3), file)
    assert not theirs.exists()


def test_a_writer_whose_new_file_is_taken_for_a_leftover_tries_again(file, monkeypatch):
    """Check that another writer may remove the new file before it is locked."""
    kinds = []

    def removed_before(locked, kind):
        kinds.append(kind)
        if len(kinds) == 1:
            checkpoint_io._remove_leftovers(file.parent)
        flock(locked, kind)

    monkeypatch.setattr(checkpoint_io, "flock", removed_before)
    IO.save_checkpoint(content(2), file)
    assert kinds == [LOCK_EX, LOCK_EX | LOCK_NB, LOCK_EX]
    assert epoch(file) == 2
    assert list(file.parent.iterdir()) == [file]


def test_a_leftover_that_becomes_another_file_is_left_alone(file, monkeypatch):
    """Check that another writer may finish its file, and begin the next one, before the file is locked."""
    theirs = file.with_name(".two.ckpt.123.unfinished")
    theirs.write_text("finished")

    def replaced_before(locked, kind):
        if locked.name == str(theirs):
            theirs.rename(file.with_name("two.ckpt"))
            theirs.write_text("next")
        flock(locked, kind)

    monkeypatch.setattr(checkpoint_io, "flock", replaced_before)
    IO.save_checkpoint(content(2), file)
    assert theirs.read_text() == "next"


def test_a_leftover_that_others_have_removed_already(file):
    # Such a link is listed, but cannot be opened.
    file.with_name(".two.ckpt.123.unfinished").symlink_to("nothing")
    IO.save_checkpoint(content(2), file)
    assert epoch(file) == 2


def test_under_lightnings_asynchronous_writing(tmp_path):
    strategy = AnalogPipelineStrategy()
    strategy.checkpoint_io = AsyncCheckpointIO()
    strategy.checkpoint_io.save_checkpoint(content(4), tmp_path / "four.ckpt")
    strategy.checkpoint_io.teardown()
    assert Path(tmp_path / "four.ckpt").read_bytes()[-71:-64] == b"sha256:"
    assert isinstance(strategy.checkpoint_io.checkpoint_io, SealedCheckpointIO)
