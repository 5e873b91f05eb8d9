"""Finished updates on their way: on the disk before the first byte is sent, until the receipt.

An update that was perhaps sent must be sent again as it is or not at all: a second one with other
noise for the same task would let the gateway take both noises apart. So an update is spooled as the
very bytes that travel, and a file that is not whole any more is never made anew.

A file: 4 bytes length of the head, the head (JSON: task, run, tensors, clipped, SHA-256 of the
data), the data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sottovoce.client.agent.files import remove_unfinished, write_whole
from sottovoce.client.protocol import CHUNK_BYTES
from sottovoce.client.protocol.device_pb2 import EncodedTensor, UploadHead, UploadPart
from sottovoce.client.wire import encode

SUFFIX = ".update"
HEAD_BYTES = 4
LARGEST_HEAD = 1 << 22
TASK_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Spooled:
    """An update on the disk, as long as its file is whole."""

    path: Path
    task: str
    run: str
    tensors: tuple[tuple[str, tuple[int, ...], str, int], ...]
    clipped: bool
    start: int

    @property
    def sent_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry[3] for entry in self.tensors)

    def parts(self) -> Iterator[UploadPart]:
        """The messages that carry it: always the same."""
        tensors = [
            EncodedTensor(name=name, shape=shape, encoding=encoding, bytes=size)
            for name, shape, encoding, size in self.tensors
        ]
        yield UploadPart(head=UploadHead(task=self.task, tensors=tensors, clipped=self.clipped))
        with self.path.open("rb") as file:
            file.seek(self.start)
            while data := file.read(CHUNK_BYTES):
                yield UploadPart(data=data)


class Spool:
    """Updates in `folder`, a file each. A task id is 32 hexadecimal digits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(folder)

    def write(
        self, task: str, run: str, update: dict[str, Tensor], encoding: str, *, clipped: bool
    ) -> Spooled:
        """Encode an update and put it on the disk; what is there for `task` already stays.

        Raises OSError where it cannot be written, ValueError where it is not finite.
        """
        found = self.find(task)
        if found is not None:
            return found
        pieces = [encode(tensor, encoding) for tensor in update.values()]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        head = json.dumps({
            "task": task, "run": run, "clipped": clipped, "sha256": digest.hexdigest(),
            "tensors": [
                [name, list(tensor.shape), encoding, len(piece)]
                for (name, tensor), piece in zip(update.items(), pieces, strict=True)
            ],
        }).encode()  # fmt: skip
        write_whole(self._path(task), [len(head).to_bytes(HEAD_BYTES, "big"), head, *pieces])
        written = self.find(task)
        if written is None:
            raise OSError(f"{self._path(task)} is not what was written to it: check the disk")
        return written

    def find(self, task: str) -> Spooled | None:
        """The update of a task; None where there is none, or none that is whole."""
        return _read(self._path(task))

    def pending(self) -> list[Spooled]:
        """All updates that are whole, the oldest first."""
        paths = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        return [found for found in map(_read, paths) if found is not None]

    def remove(self, task: str) -> None:
        """Delete a task's update, whole or not."""
        self._path(task).unlink(missing_ok=True)

    def tasks(self) -> list[str]:
        """Ids of all files, whole or not."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))

    def _path(self, task: str) -> Path:
        if not TASK_ID.fullmatch(task):
            raise ValueError(f"task id {task[:40]!r} is not 32 hexadecimal digits")
        return self.folder / f"{task}{SUFFIX}"


def _read(path: Path) -> Spooled | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEAD_BYTES), "big")
            head: Any = json.loads(file.read(min(length, LARGEST_HEAD)))
            digest = hashlib.sha256()
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
        if digest.hexdigest() != head["sha256"] or path.name != head["task"] + SUFFIX:
            return None
        tensors = tuple((n, tuple(s), e, int(b)) for n, s, e, b in head["tensors"])
        return Spooled(
            path, head["task"], head["run"], tensors, bool(head["clipped"]), HEAD_BYTES + length
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
