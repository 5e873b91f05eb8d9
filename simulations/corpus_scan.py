"""The first pass over a corpus' files: from rows to chunks of numbers, each on disk for good.

A chunk numbers its own words, users and labels. Once its file is on disk, one line in the journal
says so and where the next chunk begins; a build that was killed goes on there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.simulations.corpus import CorpusSettings
from sottovoce.simulations.corpus_devices import user_keys
from sottovoce.simulations.corpus_index import encoded
from sottovoce.simulations.corpus_numbers import name_hashes
from sottovoce.simulations.flat_arrays import Array, write_bundle
from sottovoce.simulations.jsonl_reader import Reader, check_content
from sottovoce.simulations.row_files import RowFormat

Report = Callable[[str, float], None]  # phase and share of it done


@dataclass(frozen=True)
class BuildLimits:
    """What a build holds in memory at once: it changes its speed, never its result."""

    chunk_tokens: int = 4_000_000
    chunk_rows: int = 400_000
    sorted_records: int = 2_000_000
    bucket_bytes: int = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its sizes, its labels, and where the next one begins.

    `file`: number of its file, training files first. `number` and `mark`: of its last row.
    `ended`: whether the file ends with it. `examples`: of the file so far. `unit`: what a row of
    the file is called. `said`: whether an example has a user. `without_user`: where the first row
    without a user stands.
    """

    file: int
    number: int
    mark: int
    ended: bool
    examples: int
    rows: int
    tokens: int
    words: int
    users: int
    intents: list[str]
    tags: list[str]
    has_intents: bool | None
    has_slots: bool | None
    said: bool
    without_user: str | None
    empty: int
    unit: str


class Journal:
    """Lines of JSON, each on disk before the next step; from a broken line on, none counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[dict[str, Any]] = []
        whole = 0
        with path.open("a+b") as file:
            file.seek(0)
            for line in file:
                try:
                    self.notes.append(json.loads(line))
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    self.notes.pop()
                    break
                whole += len(line)
            file.truncate(whole)

    def append(self, note: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(note).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.notes.append(note)

    def chunks(self) -> list[Chunk]:
        return [Chunk(**note["chunk"]) for note in self.notes if "chunk" in note]

    def stages(self) -> set[str]:
        """The stages that are done."""
        return {note["stage"] for note in self.notes if "stage" in note}


def chunk_file(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:06}"


def scan(
    settings: CorpusSettings,
    format: RowFormat,
    folder: Path,
    journal: Journal,
    limits: BuildLimits,
    report: Report,
) -> list[Chunk]:
    """Read all files that the journal does not have yet. Raises DataError at the first fault."""
    files = [*settings.paths, *settings.test_paths]
    sizes = [path.stat().st_size for path in files]
    chunks = journal.chunks()
    start = 0 if not chunks else chunks[-1].file + chunks[-1].ended
    for place in range(start, len(files)):
        path = files[place]
        for chunk, read_bytes in _read(place, path, settings, format, folder, chunks, limits):
            journal.append({"chunk": asdict(chunk)})
            chunks.append(chunk)
            report("reading", (sum(sizes[:place]) + read_bytes) / max(1, sum(sizes)))
    return chunks


def _read(
    place: int,
    path: Path,
    settings: CorpusSettings,
    format: RowFormat,
    folder: Path,
    before: list[Chunk],
    limits: BuildLimits,
) -> Iterator[tuple[Chunk, int]]:
    """The chunks of a file behind those `before`, saved, and the bytes read; `before` may grow."""
    last = before[-1] if before and before[-1].file == place else None
    number, mark = (last.number, last.mark) if last else (0, 0)
    file = format(path, mark, number)

    def finish(ended: bool) -> Chunk:
        chunk = _chunk(reader, place, number, mark, ended, before)
        save_chunk(reader, settings, chunk_file(folder, len(before)))
        return chunk

    reader = _reader(before, format, file.unit)
    for number, row, mark in file:  # noqa: B007  `finish` reads `mark`
        if row is None:
            continue
        reader.add(row, path, number)
        if len(reader.tokens) >= limits.chunk_tokens or reader.added >= limits.chunk_rows:
            yield finish(ended=False), file.read_bytes
            reader = _reader(before, format, file.unit)
    chunk = finish(ended=True)
    known = any(past.users for past in before) or chunk.users > 0
    check_content(path, number, chunk.examples > 0 or known)
    yield chunk, path.stat().st_size


def _reader(before: list[Chunk], format: RowFormat, unit: str) -> Reader:
    """A reader with nothing in it that knows which labels the rows so far have."""
    reader = Reader(format)
    reader.unit = unit
    if before:
        reader.has_intents, reader.has_slots = before[-1].has_intents, before[-1].has_slots
    return reader


def _chunk(
    reader: Reader, place: int, number: int, mark: int, ended: bool, before: list[Chunk]
) -> Chunk:
    past = before[-1].examples if before and before[-1].file == place else 0
    return Chunk(
        file=place,
        number=number,
        mark=mark,
        ended=ended,
        examples=past + len(reader.lengths),
        rows=len(reader.lengths),
        tokens=len(reader.tokens),
        words=len(reader.words),
        users=len(reader.users),
        intents=list(reader.intents),
        tags=list(reader.tags),
        has_intents=reader.has_intents,
        has_slots=reader.has_slots,
        said=any(user >= 0 for user in reader.user),
        without_user=reader.without_user,
        empty=reader.empty,
        unit=reader.unit,
    )


def save_chunk(reader: Reader, settings: CorpusSettings, path: Path) -> None:
    """Write what a reader holds; names only as hashes, but for the words."""
    rows = reader.rows()
    words = [encoded(word) for word in reader.words]
    arrays: dict[str, Array] = {
        "tokens": rows.tokens,
        "lengths": np.diff(rows.offsets).astype(np.int32),
        "user": rows.user,
        "word_hashes": name_hashes(reader.words),
        "word_text": np.frombuffer(b"".join(words), dtype=np.uint8),
        "word_lengths": np.array([len(word) for word in words], dtype=np.int32),
        "user_hashes": name_hashes(reader.users),
        "user_keys": user_keys(reader.users, settings.seed),
        "user_rows": np.array([row for _, row in reader.first_rows], dtype=np.int64),
    }
    if rows.intent is not None:
        arrays["intent"] = rows.intent
    if rows.slots is not None:
        arrays["slots"] = rows.slots
    write_bundle(path, arrays)
