"""The ledger: every private release of a run, in order, as a file that accountants can read alone.

Append-only and chained (`sottovoce.privacy.accounting.chain`). A mechanism appends its event
*before* its release leaves the process, and `save` makes that durable, so a crash can cost an event
that was never released but never hide one that was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting import chain
from sottovoce.privacy.accounting.composition import Tally
from sottovoce.privacy.accounting.events import (
    OBSERVERS,
    Event,
    Observer,
    Unit,
    event_from_json,
    event_to_json,
)


@dataclass(frozen=True)
class _Written:
    """What a file was left as: `events` of the ledger, in a file of this `stamp`."""

    path: Path
    stamp: tuple[int, int, int]
    events: int


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
        self._links: list[str] = []  # hash of each event, as far as needed so far
        self._root = ""
        self._written: _Written | None = None
        self._tally, self._tallied = Tally(), 0

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

    @property
    def tally(self) -> Tally:
        """The events added up; those appended since the last look are added now."""
        for event in self._events[self._tallied :]:
            self._tally.add(event)
        self._tallied = len(self._events)
        return self._tally

    @property
    def head(self) -> str:
        """Hash of the last event, and through the chain of everything in the ledger."""
        links = self._chain()
        return links[-1] if links else self._root

    @staticmethod
    def merge(
        ledgers: Sequence[Ledger], *, devices: Literal["disjoint", "overlapping"]
    ) -> Ledger:
        """One ledger for the runs of several gateways (`sottovoce.privacy.accounting.merging`)."""
        from sottovoce.privacy.accounting.merging import merged

        return merged(ledgers, devices)

    # -- the file ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as plain JSON values, each event with the hash of the one before."""
        head = self.head
        events = [self._linked(place) for place in range(len(self))]
        return {**self._facts(), "events": events, "head": head}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote; raises ValueError naming what is malformed or broken.

        Schema 1 had no chain: what it recorded is taken as it is.
        """
        schema = values.get("schema")
        if schema not in (1, chain.SCHEMA):
            raise ValueError(f"ledger schema {schema!r} is not {chain.SCHEMA}: update sottovoce")
        try:
            found = cls(
                (
                    event_from_json({k: v for k, v in fields.items() if k != "previous"})
                    for fields in values["events"]
                ),
                levels=values["levels"],
                deltas=values["deltas"],
                claims=values["claims"],
            )
            if schema == chain.SCHEMA:
                found._root = chain.digest(found._facts())
                found._links = chain.verified(found._root, values["events"], values["head"])
            elif "head" in values:
                raise ValueError("schema 1 has no head: its schema was changed")
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"ledger lacks or garbles {error}") from error
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, durably: whatever happens, a reader finds the old ledger or the new one.

        A file that this ledger continues gets the new events only. A file that continues this
        ledger (of a run that went on after a checkpoint) is left as it is: recorded releases are
        never forgotten. Raises RunError where the two went different ways.
        """
        target = Path(path).absolute()
        self._chain()
        known, self._written = self._written, None
        if known is None or known.path != target or known.stamp != _stamp(target):
            known = self._found(target)
        new = range(known.events if known else 0, len(self))
        if known is None:
            self._rewrite(target)
        elif new:
            self._append(target, new, known)
        count = max(known.events if known else 0, len(self))
        stamp = _stamp(target)
        self._written = _Written(target, stamp, count) if stamp else None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read what `save` wrote. Raises RunError, in one line, where it is absent or corrupt."""
        target = Path(path).absolute()
        try:
            stamp = _stamp(target)
            found, data = cls._read(target)
        except OSError as error:
            raise RunError(f"no ledger at {path}: {error.strerror or error}") from error
        except (ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path} is not a ledger: {reason}") from error
        found._written = found._as_written(target, stamp, data)
        return found

    @classmethod
    def _read(cls, path: Path) -> tuple[Ledger, bytes]:
        """The ledger and the bytes that tell it, completed where an append was torn."""
        stamp, data = _stamp(path), path.read_bytes()
        try:
            return cls.from_json(json.loads(data)), data
        except (ValueError, AttributeError):
            whole = chain.Draft.completed(path, data)
            if whole is None and stamp != _stamp(path):
                return cls._read(path)  # read while it was written
            if whole is None:
                raise
            return cls.from_json(json.loads(whole)), whole

    def _found(self, target: Path) -> _Written | None:
        """What `target` holds of this run; None where it must be written anew."""
        try:
            found, data = Ledger._read(target)
        except (OSError, ValueError, AttributeError):
            return None
        mine, theirs = self._chain(), found._chain()
        if found._root != self._root:
            return None
        shared = min(len(mine), len(theirs))
        if mine[:shared] != theirs[:shared]:
            raise RunError(
                f"{target} records other releases of this run than were repeated now: their "
                "epsilons add up; start a new run"
            )
        written = found._as_written(target, _stamp(target), data)
        if written is not None:
            chain.Draft.path_of(target).unlink(missing_ok=True)
        if written is None and len(theirs) > len(mine):
            found._rewrite(target)
            return found._as_written(target, _stamp(target), target.read_bytes())
        return written

    def _as_written(
        self, target: Path, stamp: tuple[int, int, int] | None, data: bytes
    ) -> _Written | None:
        """How `target` with these bytes can be continued; None where it must be written anew."""
        if stamp is None or stamp[0] != len(data) or not self._root:
            return None
        ends = data.endswith(chain.closing(self._links[-1] if self._links else self._root))
        return _Written(target, stamp, len(self)) if ends else None

    def _rewrite(self, target: Path) -> None:
        lines = [chain.canonical(self._linked(place)) for place in range(len(self))]
        chain.replace_file(target, chain.document(self._facts(), lines, self.head))

    def _append(self, target: Path, new: range, known: _Written) -> None:
        before = self._links[new.start - 1] if new.start else self._root
        at = known.stamp[0] - len(chain.closing(before))
        lines = [chain.canonical(self._linked(place)) for place in new]
        text = ",".join("\n" + line for line in lines)
        text = ("," if new.start else "") + text + chain.closing(self.head).decode()
        chain.Draft(at, known.stamp[0], text).apply(target)

    def _facts(self) -> dict[str, Any]:
        facts = {
            "schema": chain.SCHEMA,
            "levels": {str(level): devices for level, devices in sorted(self.levels.items())},
            "deltas": self.deltas,
            "claims": self.claims,
        }
        return dict(json.loads(json.dumps(facts, allow_nan=False)))

    def _chain(self) -> list[str]:
        """The hash of each event; only those of new events are computed."""
        root = chain.digest(self._facts())
        if root != self._root:
            self._root, self._links, self._written = root, [], None
        for place in range(len(self._links), len(self)):
            self._links.append(chain.digest(self._linked(place)))
        return self._links

    def _linked(self, place: int) -> dict[str, Any]:
        previous = self._links[place - 1] if place else self._root
        return {**event_to_json(self._events[place]), "previous": previous}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, time and identity of a file, by which a change of it by others is noticed."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
