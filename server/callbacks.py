"""What happens after each round: the ledger, the metrics, a checkpoint, the bar; in that order.

The ledger goes to disk first, so that nothing is ever released that it does not know of.
"""

from __future__ import annotations

import json
import math
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
