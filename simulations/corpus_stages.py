"""The stages of building an index, each repeatable: a build that was killed goes on at its stage.

read -> number words -> number users -> choose devices -> sort chunks -> merge -> seal. Memory is
that of `BuildLimits` and about 50 bytes a user, whatever the text; devices that are assigned, not
natural, take about 80 bytes an example (`partition` deals them out all at once).
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.simulations.corpus import CorpusSettings, activity_kind
from sottovoce.simulations.corpus_arrange import Numbers, device_sizes, merge_runs, sort_chunk
from sottovoce.simulations.corpus_devices import (
    assigned,
    assigned_keys,
    is_natural,
    numbered,
    silent,
    test_places,
)
from sottovoce.simulations.corpus_index import write_header
from sottovoce.simulations.corpus_numbers import number_names
from sottovoce.simulations.corpus_scan import (
    BuildLimits,
    Chunk,
    Journal,
    Report,
    chunk_file,
    scan,
)
from sottovoce.simulations.flat_arrays import Array, ArrayWriter, Bundle, load, save
from sottovoce.simulations.row_files import RowFormat

ARRAYS = (".u1", ".u2", ".u4", ".i4", ".i8")
SCRATCH = ("chunks", "runs", "work")
JOURNAL = "journal.jsonl"


class Build:
    """An index on its way, in `folder`. `run` takes it from wherever it stands to its header."""

    def __init__(
        self,
        settings: CorpusSettings,
        format: RowFormat,
        folder: Path,
        limits: BuildLimits,
        report: Report,
    ) -> None:
        self.settings, self.format, self.folder = settings, format, folder
        self.limits, self.report = limits, report
        folder.mkdir(mode=0o700, exist_ok=True)  # the words of private text are its owner's
        for part in SCRATCH:
            (folder / part).mkdir(exist_ok=True)
        self.work = folder / "work"
        self.journal = Journal(folder / JOURNAL)

    def run(self) -> None:
        """Do all stages that the journal does not have. Raises DataError for malformed files."""
        self.chunks: list[Chunk] = scan(
            self.settings, self.format, self.folder, self.journal, self.limits, self.report
        )
        for stage in (self.words, self.users, self.devices, self.sort, self.merge):
            if stage.__name__ not in self.journal.stages():
                stage()
                self.journal.append({"stage": stage.__name__})
        self.seal()

    @cached_property
    def trained(self) -> int:
        """How many chunks are of training files; they come first."""
        return sum(chunk.file < len(self.settings.paths) for chunk in self.chunks)

    @cached_property
    def natural(self) -> bool:
        chunks = self.chunks[: self.trained]
        without = next((c.without_user for c in chunks if c.without_user), None)
        return is_natural(self.settings.users, without, any(chunk.said for chunk in chunks))

    def words(self) -> None:
        """Number words across chunks and write the word table."""
        parts = [(self._chunk(k), chunk.words) for k, chunk in enumerate(self.chunks)]
        number_names(parts, "word", self.work, self.limits.sorted_records)
        known, start, end = 0, 0, 0
        with (
            ArrayWriter(self.folder, "word_text", "u1") as text,
            ArrayWriter(self.folder, "word_offsets", "i8") as offsets,
        ):
            offsets.append(np.zeros(1, dtype=np.int64))
            for part, count in parts:
                new = load(self.work, "word_numbers", "i4", start, start + count) >= known
                lengths = part.load("word_lengths")
                text.append(part.load("word_text")[np.repeat(new, lengths)])
                ends = end + np.cumsum(lengths[new], dtype=np.int64)
                offsets.append(ends)
                known, start, end = known + len(ends), start + count, text.count
                self.report("numbering words", start / max(1, self._bases("words")[-1]))

    def users(self) -> None:
        """Number users across chunks, where they are devices."""
        if self.natural:
            parts = [(self._chunk(k), chunk.users) for k, chunk in enumerate(self.chunks)]
            number_names(parts, "user", self.work, self.limits.sorted_records)
        self.report("numbering users", 1)

    def devices(self) -> None:
        """Choose the held-out devices; where each row goes, as files that `_numbers` reads."""
        if self.natural:
            keys = self._user_keys()
        else:
            keys = assigned_keys(self.settings.devices, self.settings.seed)
            save(self.work, "row_devices", "i4", assigned(self.settings, self._all_labels()))
        number, training = numbered(keys, self.settings.held_out_fraction)
        save(self.work, "device_numbers", "i4", number)
        left_out = number >= training if self.natural else np.zeros(0, dtype=bool)
        users = [self._user(k) for k in range(self.trained, len(self.chunks))]
        if users:
            places = test_places(np.concatenate(users), left_out, self.settings.seed)
            save(self.work, "test_places", "i8", places)
        self.journal.append({"devices": len(number), "training": training})

    def sort(self) -> None:
        """Chunks to runs."""
        number = load(self.work, "device_numbers", "i4")
        for k in range(len(self.chunks)):
            if not self._run_file(k).exists():
                sort_chunk(self._chunk(k), self._run_file(k), self._numbers(k, number))
            chunk_file(self.folder, k).unlink(missing_ok=True)
            self.report("sorting", (k + 1) / len(self.chunks))

    def merge(self) -> None:
        """Runs to the index' arrays."""
        runs = [Bundle(self._run_file(k)) for k in range(len(self.chunks))]
        train, test = runs[: self.trained], runs[self.trained :]
        sizes = device_sizes(train, self._fact("devices"))
        counts, most = sizes.rows, self.limits.bucket_bytes
        merge_runs(train, sizes, self.folder, "", most, lambda done: self.report("writing", done))
        save(self.folder, "device_offsets", "i8", np.append(0, np.cumsum(counts)))
        kind = activity_kind(int(counts.max()))
        save(self.folder, "activity", kind, counts[: self._fact("training")])
        if test:
            kept = int((load(self.work, "test_places", "i8") >= 0).sum())
            merge_runs(test, device_sizes(test, kept), self.folder, "test_", most, lambda _: None)

    def seal(self) -> None:
        """Remove what only the build needed and write the header."""
        devices, training = self._fact("devices"), self._fact("training")
        facts = {
            "natural": self.natural,
            "held_out": devices - training,
            "empty": sum(chunk.empty for chunk in self.chunks[: self.trained]),
            "intents": list(self._names("intents")),
            "tags": list(self._names("tags")),
        }
        for part in SCRATCH:
            shutil.rmtree(self.folder / part, ignore_errors=True)
        kinds = {
            path.stem: path.suffix[1:] for path in sorted(self.folder.iterdir())
            if path.suffix in ARRAYS
        }
        write_header(self.folder, kinds, facts)

    def _numbers(self, k: int, device_numbers: Array) -> Numbers:
        """How chunk k's own numbers read in the corpus."""
        rows = self._bases("rows")
        if k >= self.trained:
            first = rows[self.trained]
            device = load(self.work, "test_places", "i8", rows[k] - first, rows[k + 1] - first)
        elif self.natural:
            device = device_numbers[self._user(k)].astype(np.int64)
        else:
            own = load(self.work, "row_devices", "i4", rows[k], rows[k + 1])
            device = device_numbers[own].astype(np.int64)
        words = self._bases("words")
        return Numbers(
            device,
            load(self.work, "word_numbers", "i4", words[k], words[k + 1]),
            self._mapped("intents", self.chunks[k].intents),
            self._mapped("tags", self.chunks[k].tags),
        )

    def _user(self, k: int) -> NDArray[np.int32]:
        """(rows,) number of each row's user, -1 for none or where users are no devices."""
        user = self._chunk(k).load("user")
        if not self.natural:
            return np.full(len(user), -1, dtype=np.int32)
        base = self._bases("users")
        numbers = load(self.work, "user_numbers", "i4", base[k], base[k + 1])
        return np.append(numbers, np.int32(-1))[user]

    def _user_keys(self) -> NDArray[np.uint64]:
        """(users of training files,) held-out keys. Raises DataError for one without a word."""
        base, known = self._bases("users"), 0
        pieces, said = [], np.zeros(base[self.trained], dtype=bool)
        for k in range(self.trained):
            numbers = load(self.work, "user_numbers", "i4", base[k], base[k + 1])
            pieces.append(self._chunk(k).load("user_keys")[numbers >= known])
            known += len(pieces[-1])
            said[self._user(k)] = True
        missing = np.flatnonzero(~said[:known])
        if len(missing):
            raise self._silent(int(missing[0]))
        return np.concatenate([np.zeros(0, dtype=np.uint64), *pieces])

    def _silent(self, user: int) -> DataError:
        """The error of a user without words; the name is read from the file again."""
        base = self._bases("users")
        for k in range(self.trained):
            numbers = load(self.work, "user_numbers", "i4", base[k], base[k + 1])
            if len(found := np.flatnonzero(numbers == user)):
                break
        row = int(self._chunk(k).load("user_rows")[found[0]])
        path, unit = self.settings.paths[self.chunks[k].file], self.chunks[k].unit
        fields = next(fields for number, fields, _ in self.format(path) if number == row)
        return silent((fields or {})["user_id"], path, row, unit)

    def _all_labels(self) -> NDArray[np.int32]:
        """(training rows,) number of each row's intent, 0 without intents."""
        labels = [np.zeros(0, dtype=np.int32)]
        for k, chunk in enumerate(self.chunks[: self.trained]):
            own = np.zeros(chunk.rows, dtype=np.int32)
            if chunk.has_intents:
                own = self._mapped("intents", chunk.intents)[self._chunk(k).load("intent")]
            labels.append(own)
        return np.concatenate(labels)

    def _mapped(self, kind: str, own: list[str]) -> NDArray[np.int32]:
        names = self._names(kind)
        return np.array([names[name] for name in own], dtype=np.int32)

    def _names(self, kind: str) -> dict[str, int]:
        """Number of each intent or tag in the corpus, by first appearance."""
        names = dict.fromkeys(name for chunk in self.chunks for name in getattr(chunk, kind))
        return {name: number for number, name in enumerate(names)}

    def _bases(self, kind: str) -> list[int]:
        """(chunks + 1,) how many rows, words or users stand in the chunks before each."""
        counts = [getattr(chunk, kind) for chunk in self.chunks]
        return [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    def _fact(self, name: str) -> int:
        return next(int(note[name]) for note in self.journal.notes[::-1] if name in note)

    def _chunk(self, k: int) -> Bundle:
        return Bundle(chunk_file(self.folder, k))

    def _run_file(self, k: int) -> Path:
        return self.folder / "runs" / f"{k:06}"
