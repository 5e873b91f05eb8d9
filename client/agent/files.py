"""Files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

UNFINISHED = ".part"


def write_whole(path: Path, pieces: Iterable[bytes], *, durable: bool = True) -> None:
    """Write `pieces` end to end to `path`, which only its owner may read.

    `durable`: it is on the disk when this returns, and survives a power cut. Raises OSError, and
    leaves nothing, where the disk is full or cannot be written.
    """
    part = path.with_name(path.name + UNFINISHED)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Delete what an interrupted `write_whole` left."""
    for part in folder.glob(f"*{UNFINISHED}"):
        part.unlink(missing_ok=True)
