"""What happens after each round: the ledger, the metrics, a checkpoint, the bar; in that order.

The ledger goes to disk first, so that nothing is ever released that it does not know of.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sottovoce.server.checkpoints import RunState, save_checkpoint, write_atomic
from sottovoce.server.coordinator import Record
from sottovoce.server.progress import Progress
from sottovoce.server.run_record import read_metrics


@dataclass
class LedgerFile:
    """ledger.json, rewritten in one step after every round."""

    folder: Path

    def on_round(self, state: RunState, record: Record) -> None:
        state.ledger.save(self.folder / "ledger.json")


@dataclass
class RequestLog:
    """requests.log beside the checkpoints: the number of each round, before its first message.

    From then on fleets may have answered: whoever sees their sums has seen a release that the
    ledger gets only with the round. Where a repeated round is not the same release once more, a
    resume books what was asked for and lost (`NoisedSum.book_lost`).
    """

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "requests.log"

    def on_request(self, number: int) -> None:
        self._write(number)

    def booked(self, number: int) -> None:
        """Note that the ledger on disk has one lost request of a round."""
        self._write(-number)

    def after(self, last_round: int) -> list[int]:
        """Rounds after `last_round` that were asked for, one entry for each time."""
        return sorted(number for number in self._numbers() if number > last_round)

    def booked_after(self, last_round: int) -> Counter[int]:
        """How often rounds after `last_round` are in the ledger on disk as lost."""
        return Counter(-number for number in self._numbers() if number < -last_round)

    def _numbers(self) -> list[int]:
        """All entries. A last line without its end was torn by a crash: its round was not asked."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [int(line) for line in text[: text.rfind("\n") + 1].split()]

    def _write(self, number: int) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        if torn:
            kept = "".join(f"{known}\n" for known in self._numbers())
            write_atomic(self.path, kept.encode())
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """A run that has ended asks for nothing again."""
        self.path.unlink(missing_ok=True)


@dataclass
class MetricsFile:
    """metrics.jsonl, one object a round."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def on_round(self, state: RunState, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def keep_until(self, last_round: int) -> None:
        """Drop the records of rounds after `last_round`, which a resumed run will do again."""
        records = read_metrics(self.path) if self.path.exists() else []
        kept = [record for record in records if record["round"] <= last_round]
        write_atomic(self.path, "".join(map(_line, kept)).encode())


@dataclass
class Checkpoints:
    """A checkpoint every `every` rounds."""

    folder: Path
    every: int
    keep: int

    def on_round(self, state: RunState, record: Record) -> None:
        if state.round % self.every == 0:
            save_checkpoint(self.folder, state, self.keep)


@dataclass
class Bar:
    """The progress bar."""

    progress: Progress

    def on_round(self, state: RunState, record: Record) -> None:
        if state.round:
            self.progress.update(record)


def _line(record: Record) -> str:
    """A record as strict JSON: figures that are not finite become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
