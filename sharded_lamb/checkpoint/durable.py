"""Files and names that survive a crash: synced folders, atomic exchange, files written aside and renamed."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def sync_file(file: BinaryIO) -> None:
    """Returns once the file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns once the names in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, synced. Raises FileExistsError if it exists."""
    if not path.parent.is_dir():
        with suppress(FileExistsError):  # another process made it meanwhile
            make_folder(path.parent)
    path.mkdir()
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two files or folders atomically; returns False if that is unsupported (NFS, not Linux)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and not renameat2(
        at_fdcwd, os.fsencode(one.absolute()), at_fdcwd, os.fsencode(other.absolute()), rename_exchange
    )


def write_aside(target: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a path beside ``target``, syncs the file and renames it: ``target`` is whole or unchanged.

    Raises:
        OSError: the file could not be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            sync_file(file)
        part.replace(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
