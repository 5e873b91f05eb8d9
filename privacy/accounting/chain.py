"""The ledger's file: one JSON object, an event a line, every line chained to the one before.

    {"schema": 2, "levels": ..., "deltas": ..., "claims": ..., "events": [
    {..., "previous": SHA-256 of what stands before the events},
    {..., "previous": SHA-256 of the line above}
    ], "head": SHA-256 of the last line}

A line that was changed, moved or taken out no longer fits its successor, and the last one no longer
fits the head. That shows damage and clumsy edits; whoever rewrites the whole chain can forge one,
unless its head was noted elsewhere (checkpoints and model cards do).

One more event overwrites the closing of the file, so its cost does not grow with the ledger. What
will be written is noted beside it first (`Draft`): a process that is killed half-way leaves the
old ledger, or one that the note completes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 2


def digest(values: Any) -> str:
    """SHA-256 of plain JSON values in their one canonical spelling."""
    return hashlib.sha256(canonical(values).encode()).hexdigest()


def canonical(values: Any) -> str:
    """JSON with sorted keys on one line. Raises ValueError for what JSON has no spelling for."""
    return json.dumps(values, allow_nan=False, sort_keys=True)


def verified(root: str, events: Sequence[Mapping[str, Any]], head: Any) -> list[str]:
    """The hash of each event; ValueError, in one line, where the chain is broken."""
    links, previous = list[str](), root
    for place, event in enumerate(events, 1):
        if event.get("previous") != previous:
            what = "the facts before the events were" if place == 1 else f"event {place - 1} was"
            raise ValueError(f"its chain breaks at event {place}: {what} changed, moved or removed")
        previous = digest(event)
        links.append(previous)
    if head != previous:
        raise ValueError("its chain does not end at its head: the last event was changed or lost")
    return links


def document(facts: Mapping[str, Any], lines: Sequence[str], head: str) -> bytes:
    """The whole file. `facts`: what stands before the events."""
    opening = json.dumps(facts, allow_nan=False)[:-1] + ', "events": ['
    return (opening + ",".join("\n" + line for line in lines)).encode() + closing(head)


def closing(head: str) -> bytes:
    """The end of a file whose last event has the hash `head`."""
    return f'\n], "head": "{head}"}}\n'.encode()


# -- writing ---------------------------------------------------------------------------------------


def replace_file(target: Path, data: bytes) -> None:
    """Write `target` durably and at once: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    Draft.path_of(target).unlink(missing_ok=True)


@dataclass(frozen=True)
class Draft:
    """What is about to overwrite the end of a ledger, from byte `at` of its `size` bytes on."""

    at: int
    size: int
    text: str

    @staticmethod
    def path_of(target: Path) -> Path:
        return target.with_name(f".{target.name}.append")

    def apply(self, target: Path) -> None:
        """Note the draft, write it into `target`, forget the note; each step durable."""
        note = self.path_of(target)
        try:
            _write_synced(note, 0, json.dumps(vars(self)).encode(), os.O_CREAT | os.O_TRUNC)
            _sync_folder(target.parent)
        except BaseException:
            note.unlink(missing_ok=True)
            raise
        _write_synced(target, self.at, self.text.encode())
        note.unlink(missing_ok=True)

    @classmethod
    def completed(cls, target: Path, data: bytes) -> bytes | None:
        """`data`, the torn file, as it was about to become; None where no note tells."""
        try:
            draft = cls(**json.loads(cls.path_of(target).read_bytes()))
            added = draft.text.encode()
            torn = draft.size <= len(data) <= draft.at + len(added)
            return data[: draft.at] + added if torn else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def _write_synced(path: Path, at: int, data: bytes, flags: int = 0) -> None:
    handle = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        while data:
            written = os.pwrite(handle, data, at)
            at, data = at + written, data[written:]
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Make a rename or a new file durable, where the system can sync a folder at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
