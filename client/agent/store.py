"""A device's examples: kept on the device, in SQLite, until the retention window has passed.

    DeviceStore(path).add([{"text": "play some jazz", "intent": "PlayMusic"}])

is all that an app needs; it may add while the agent trains. A store is a folder, readable by its
owner alone:

    examples.sqlite   the examples, with their words, labels and times
    journal.sqlite    what the device took part in (`sottovoce.client.agent.journal`)
    policy.toml       what its owner allows (`sottovoce.client.agent.policy`)
    identity/         number, key and certificates of the device
    spool/  cache/    updates on their way, and the model

Ids only grow and are never given twice, so "all examples up to this id" stays what it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sottovoce.client.agent.database import Database, Kind
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.stored_rows import EARLIEST, Row, checked_rows
from sottovoce.client.errors import DataError, RunError

KIND = Kind(
    name="a device's examples",
    application=0x5356_4531,
    schema="""
        CREATE TABLE examples (
            id INTEGER PRIMARY KEY AUTOINCREMENT, tokens TEXT NOT NULL, intent TEXT, slots TEXT,
            time REAL
        );
        CREATE INDEX examples_by_time ON examples (time)
    """,
    remedy="restore it from a backup, or delete the files examples.sqlite*: the journal is another",
)

FOLDERS = ("identity", "spool", "cache")
"""Folders of a store. What lies in the last two is made anew where it is missing."""

DAY_S = 86_400.0
_AT_ONCE = 1000  # rows of one transaction: others get their turn, and no more is in memory


@dataclass(frozen=True)
class StoredExample:
    """One utterance. `tokens`: its words. `intent`, `slots` (a BIO tag each): None where absent."""

    id: int
    tokens: tuple[str, ...]
    intent: str | None
    slots: tuple[str, ...] | None


class DeviceStore:
    """The store in `folder`, which is made unless `create` is False.

    Raises DataError for a folder that holds something else and for a damaged or foreign file,
    RunError where it cannot be read or written.
    """

    def __init__(self, folder: Path | str, *, create: bool = True) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder, create)
        _make_private(self.folder)
        for name in FOLDERS:
            _make_private(self.folder / name)
        self._database = Database(self.folder / "examples.sqlite", KIND)

    def add(self, examples: Iterable[Mapping[str, Any]]) -> int:
        """Store rows with `text` or `tokens`, and `intent`, `slots`, `time` (s since 1970) or none.

        The number stored: rows without a word are left out. `time`: now where it is not given.
        Written in pieces of 1,000 rows. Raises DataError with the row's number at the first
        malformed row; the pieces before are stored, the row's own is not.
        """
        rows, seen, stored = iter(examples), 0, 0
        while piece := list(islice(rows, _AT_ONCE)):
            stored += self.add_checked(checked_rows(piece, seen))
            seen += len(piece)
        return stored

    def add_checked(self, rows: list[Row]) -> int:
        """Store rows made by `checked_row`, all or none."""
        with self._database.writing() as connection:
            connection.executemany(
                "INSERT INTO examples (tokens, intent, slots, time) VALUES (?, ?, ?, ?)", rows
            )
        return len(rows)

    def count(self, up_to: int | None = None) -> int:
        """Number of examples, or of those with ids up to `up_to`."""
        with self._database.reading() as connection:
            (found,) = connection.execute(
                "SELECT count(*) FROM examples WHERE id <= ?", (_bound(up_to),)
            ).fetchone()
        return int(found)

    def last_id(self) -> int:
        """The largest id that was ever given, 0 in a new store."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT seq FROM sqlite_sequence WHERE name = 'examples'"
            ).fetchone()
        return 0 if row is None else int(row[0])

    def rows(self, up_to: int | None = None) -> list[StoredExample]:
        """Examples with ids up to `up_to`, by id."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT id, tokens, intent, slots FROM examples WHERE id <= ? ORDER BY id",
                (_bound(up_to),),
            ).fetchall()
        return [
            StoredExample(
                number,
                tuple(json.loads(tokens)),
                intent,
                None if slots is None else tuple(json.loads(slots)),
            )
            for number, tokens, intent, slots in found
        ]

    def span(self) -> tuple[float, float] | None:
        """Times of the oldest and the newest example, None where no example has one."""
        with self._database.reading() as connection:
            oldest, newest = connection.execute(
                "SELECT min(time), max(time) FROM examples"
            ).fetchone()
        return None if oldest is None else (oldest, newest)

    def purge(self, now: float, retention_days: float | None = None) -> int:
        """Delete examples older than the retention window, without a trace in the files.

        `retention_days`: by default the one of the store's policy. Examples that came while the
        clock was not set are dated `now`. The number deleted: 0 where there is no window, and
        while the clock stands before `EARLIEST`.
        """
        days = Policy.load(self.folder).retention_days if retention_days is None else retention_days
        if now < EARLIEST:
            return 0
        with self._database.writing() as connection:
            connection.execute("UPDATE examples SET time = ? WHERE time IS NULL", (now,))
            deleted = 0 if days is None else connection.execute(
                "DELETE FROM examples WHERE time < ?", (now - days * DAY_S,)
            ).rowcount
        if days is not None:
            self._database.overwrite_log()
        return deleted

    def forget(self) -> int:
        """Delete every example, update and residual; the journal stays. The examples deleted.

        Raises RunError while an agent holds the store.
        """
        with self.held():
            for name in ("spool", "cache"):  # first: on a full disk, deletion needs some room
                _empty(self.folder / name)
            with self._database.writing() as connection:
                deleted = connection.execute("DELETE FROM examples").rowcount
            self._database.overwrite_log()
        return deleted

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this lasts no other agent can use the store; apps may add to it.

        The system lets go of it when the process ends, however it ends. Raises RunError where the
        store is held already.
        """
        path = self.folder / "agent.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunError(
                f"{path} cannot be opened ({error.strerror}): the store must belong to the user "
                "who runs this"
            ) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.folder} is in use by another agent: stop that one, or give another "
                    "--store"
                ) from None
            yield
        finally:
            os.close(lock)

    def close(self) -> None:
        self._database.close()


def _bound(up_to: int | None) -> int:
    return 2**63 - 1 if up_to is None else up_to


# -- the folder ------------------------------------------------------------------------------------

_OWN = {*FOLDERS, "policy.toml", "journal.begun", "agent.lock", "lost+found"}


def _check_folder(folder: Path, create: bool) -> None:
    """Raise DataError for a folder that is no store and should be, or that is somebody else's."""
    if (folder / "examples.sqlite").exists():
        return
    if not create:
        raise DataError(
            f"{folder} is no device store: `sottovoce device add FILE --store {folder}` makes one"
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: a store is a folder, give another --store")
    strangers = [path.name for path in folder.iterdir()] if folder.exists() else []
    strangers = sorted(n for n in strangers if n not in _OWN and not n.startswith("journal.sqlite"))
    if strangers:
        raise DataError(
            f"{folder} holds other things ({strangers[0]}): give a new or an empty --store"
        )


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be made private ({error.strerror}): the store must belong to the "
            "user who runs this"
        ) from None


def _empty(folder: Path) -> None:
    try:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be deleted ({error.strerror}): the store must belong to the "
            "user who runs this"
        ) from None
