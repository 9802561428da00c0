"""This module writes checkpoint files completely or not at all, and refuses to read files that have changed since."""

import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, Any, override
from zipfile import BadZipFile, ZipFile, is_zipfile

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io import TorchCheckpointIO

from aimc_pl.errors import AnalogCheckpointWarning, UsageError

_LABEL = b"sha256:"
_COMMENT_LENGTH = len(_LABEL) + 64
_BEFORE_ARCHIVES = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file that torch before 1.6 has written. Such a file is no ZIP archive."""


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files, with a checksum and with replacement of the old file in one step.

    A checkpoint is the ZIP archive that :func:`torch.save` writes. Its checksum is the comment of the archive, which
    other readers ignore. Files without a checksum, as plain Lightning writes them, are read too.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside the old file, and replace the old file when all of the new one is on the disk.

        Files that are not on a local file system are written by Lightning.

        Raises:
            UsageError: if the file cannot be written. The old file is then unchanged.
        """
        system, local = fsspec.core.url_to_fs(str(path))
        if not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = _sealed(checkpoint)
        try:
            _replace(Path(local), content)
        except OSError as error:
            raise UsageError(
                f"cannot write checkpoint {local}: {error.strerror or error}. What was there before is untouched"
            ) from error

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint from a file, or from an address with a scheme (``https://…``).

        Args:
            path: the file or the address.
            map_location: see :func:`torch.load`.
            weights_only: ``False`` lets the file run code. With any other value it cannot, wherever the file is.

        Raises:
            UsageError: if the file does not exist, is damaged, is no checkpoint, or names a class that is not admitted.
        """
        with _opened(path) as file, reading(file, path):
            checkpoint = torch.load(file, map_location, weights_only=weights_only is not False)
        if not isinstance(checkpoint, dict):
            raise _no_checkpoint(path)
        return checkpoint


@contextmanager
def reading(file: IO[bytes], path: Any) -> Iterator[None]:
    """Context manager that verifies a checkpoint, and turns errors of reading it into a :class:`UsageError`.

    Args:
        file: the open checkpoint, which is read inside the context.
        path: the name of the file in messages.

    Raises:
        UsageError: if the file is damaged, is no checkpoint, or names a class that is not admitted.
    """
    _check_seal(file, path)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            # The warning is for readers that do not know this package.
            warnings.simplefilter("ignore", AnalogCheckpointWarning)
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _no_checkpoint(path) from error
        raise UsageError(
            f"checkpoint {path} names {found[1]}, which is not loaded because it could run code. If you trust the "
            f"file, call torch.serialization.add_safe_globals([{found[1]}]) first"
        ) from error
    except (RuntimeError, EOFError, LookupError) as error:
        raise _no_checkpoint(path) from error


def _check_seal(file: IO[bytes], path: Any) -> None:
    """Check that a file is complete, and that it is as it was written if it has a checksum."""
    size = max(file.seek(0, os.SEEK_END) - _COMMENT_LENGTH, 0)
    file.seek(size)
    comment = file.read()
    file.seek(0)
    if comment.startswith(_LABEL):
        if comment != _LABEL + _digest(file, size):
            raise _damaged(path)
    elif is_zipfile(file):
        with _archive(file, path) as archive:
            # An archive of plain Lightning has no comment.
            if archive.comment:
                raise _damaged(path)
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise _no_checkpoint(path)
    else:
        file.seek(0)
        beginning = file.read(len(_BEFORE_ARCHIVES))
        if beginning.startswith(b"PK"):
            raise UsageError(f"checkpoint {path} is cut off: its end is missing. Use an earlier one")
        if beginning != _BEFORE_ARCHIVES:
            raise _no_checkpoint(path)


def _sealed(checkpoint: dict[str, Any]) -> memoryview:
    """Return the content of a checkpoint file, with its checksum."""
    buffer = BytesIO()
    torch.save(checkpoint, buffer)
    # The last two bytes of an archive are the length of its comment, so far 0.
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_COMMENT_LENGTH.to_bytes(2, "little"))
    buffer.write(_LABEL + sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getbuffer()


def _replace(path: Path, content: memoryview) -> None:
    """Replace the content of a file. If this is interrupted at any moment, the file has all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with _locked(beside) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # The new name is on the disk only when the folder is.
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Context manager that creates a file and locks it, so that no other process takes the file for a leftover."""
    while True:
        with path.open("wb") as file:
            flock(file, LOCK_EX)
            # Another process may have removed the file before it was locked.
            if _is_at(path, file):
                yield file
                return


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed. A process that still writes holds a lock.

    Files of other users stay.
    """
    for leftover in folder.glob(".*.unfinished"):
        with suppress(BlockingIOError, FileNotFoundError, PermissionError), leftover.open("rb") as file:
            flock(file, LOCK_EX | LOCK_NB)
            # Another process may have finished this file, and begun the next one under the same name.
            if _is_at(leftover, file):
                leftover.unlink()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Return whether an open file is still the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


@contextmanager
def _opened(path: Any) -> Iterator[IO[bytes]]:
    system, local = fsspec.core.url_to_fs(str(path))
    is_local = isinstance(system, LocalFileSystem)
    try:
        with Path(local).open("rb") if is_local else BytesIO(system.cat_file(local)) as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot read checkpoint {path}: {error.strerror or error}") from error


def _digest(file: IO[bytes], size: int) -> bytes:
    """Return the SHA-256 digest, in hexadecimal, of the next ``size`` bytes of a file."""
    digest, left = sha256(), size
    while left and (part := file.read(min(left, 1 << 20))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest().encode()


def _archive(file: IO[bytes], path: Any) -> ZipFile:
    try:
        return ZipFile(file)
    except BadZipFile as error:
        raise _damaged(path) from error


def _damaged(path: Any) -> UsageError:
    return UsageError(f"checkpoint {path} is damaged: its content has changed since it was written. Use an earlier one")


def _no_checkpoint(path: Any) -> UsageError:
    return UsageError(f"{path} is no checkpoint, or only a part of one: give ckpt_path another file")
