"""Blobs that a device has already, by content hash: the specification and the model's last values.

Every read is checked against the name, so a file that a power cut spoiled is one that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sottovoce.client.agent.files import remove_unfinished, write_whole
from sottovoce.client.wire import content_hash


class BlobCache:
    """Files of `folder`, named by their SHA-256. It holds what the last task named, no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(folder)

    def get(self, name: bytes) -> bytes | None:
        """The blob, or None where it is not here or not whole."""
        path = self.folder / name.hex()
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if content_hash(data) == name:
            return data
        path.unlink(missing_ok=True)
        return None

    def put(self, name: bytes, data: bytes) -> None:
        """Keep a blob whose hash was checked; a full disk costs no more than another download."""
        path = self.folder / name.hex()
        if path.exists():
            return
        try:
            write_whole(path, [data], durable=False)
        except OSError:
            path.unlink(missing_ok=True)

    def keep(self, names: Iterable[bytes]) -> None:
        """Delete all blobs but these."""
        kept = {name.hex() for name in names}
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in kept:
                path.unlink(missing_ok=True)
