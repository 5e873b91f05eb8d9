"""The ledger: every private release of a run, in order, as a file that accountants can read alone.

Append-only. A mechanism appends its event *before* its release leaves the process, and `save` makes
that durable, so a crash can cost an event that was never released but never hide one that was.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sottovoce.client.errors import RunError
from sottovoce.privacy.events import (
    EVENT_SCHEMA,
    OBSERVERS,
    Event,
    Observer,
    Unit,
    event_from_json,
    event_to_json,
)


class Ledger:
    """The events of one run and the public facts needed to state what they amount to.

    `events`: what was released, in order. `levels`: public (or noised) number of devices at each
    activity level. `deltas`: the delta claimed for each unit. `claims`: free facts for the report,
    JSON values only (noise source, projection, ...).

    Two ledgers are equal when events and facts are. `from_json(to_json(ledger)) == ledger`.
    """

    def __init__(
        self,
        events: Iterable[Event] = (),
        *,
        levels: Mapping[int, int] | None = None,
        deltas: Mapping[str, float] | None = None,
        claims: Mapping[str, Any] | None = None,
    ) -> None:
        self._events: list[Event] = list(events)
        self.levels = {int(level): int(devices) for level, devices in (levels or {}).items()}
        self.deltas = {str(unit): float(delta) for unit, delta in (deltas or {}).items()}
        self.claims = dict(claims or {})

    def append(self, event: Event) -> None:
        """Add one event. There is no way to take one back."""
        self._events.append(event)

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        raise TypeError("a Ledger grows: it cannot be a key")

    def __repr__(self) -> str:
        return f"Ledger({len(self)} events, units={list(self.units)})"

    @property
    def units(self) -> tuple[Unit, ...]:
        """Units that some event protects or exposes, device first."""
        found = {event.unit for event in self._events}
        return tuple(unit for unit in ("device", "example") if unit in found)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Observers that some event names, from the one who sees least."""
        found = {event.observer for event in self._events}
        return tuple(observer for observer in OBSERVERS if observer in found)

    # -- the file ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as plain JSON values."""
        return {
            "schema": EVENT_SCHEMA,
            "levels": {str(level): devices for level, devices in sorted(self.levels.items())},
            "deltas": self.deltas,
            "claims": self.claims,
            "events": [event_to_json(event) for event in self._events],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote; raises ValueError naming what is malformed."""
        schema = values.get("schema")
        if schema != EVENT_SCHEMA:
            raise ValueError(f"ledger schema {schema!r} is not {EVENT_SCHEMA}: update sottovoce")
        try:
            return cls(
                (event_from_json(fields) for fields in values["events"]),
                levels=values["levels"],
                deltas=values["deltas"],
                claims=values["claims"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"ledger lacks or garbles {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, durably and at once: a reader sees the old ledger or the new one."""
        target = Path(path)
        text = json.dumps(self.to_json(), allow_nan=False)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what `save` wrote. Raises RunError, in one line, where it is absent or corrupt."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise RunError(f"no ledger at {path}: {error.strerror or error}") from error
        except (ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path} is not a ledger: {reason}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can sync a folder at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
