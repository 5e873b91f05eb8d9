"""The devices of a gateway, in SQLite: one-time tokens, keys, and the levels they declared.

A token is stored as its SHA-256 and is used up in the same transaction that makes the device. A
device's key is stored as it is: the gateway needs it to check proofs, so the file is as secret as
the keys in it (mode 0600; docs/deploy.md says how to keep it on an encrypted volume).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sottovoce.client.errors import RunError
from sottovoce.server.gateway.orders import Member

SCHEMA_VERSION = 1
KEY_BYTES = 32
MAX_NAME = 100
SCHEMA = """
CREATE TABLE tokens (
    hash BLOB PRIMARY KEY, made REAL NOT NULL, expires REAL NOT NULL, used REAL, device INTEGER
) WITHOUT ROWID;
CREATE TABLE devices (
    device INTEGER PRIMARY KEY, key BLOB NOT NULL, name TEXT NOT NULL, enrolled REAL NOT NULL,
    revoked REAL, last_seen REAL
);
CREATE TABLE levels (
    run TEXT NOT NULL, device INTEGER NOT NULL, level INTEGER NOT NULL, declared REAL NOT NULL,
    PRIMARY KEY (run, device)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Enrolled:
    """A device as enrolment made it. `device`: below 2^63. `key`: 32 bytes, shown this once."""

    device: int
    key: bytes


@dataclass(frozen=True)
class DeviceRow:
    """A device for the operator's list; times in seconds since 1970."""

    device: int
    name: str
    enrolled: float
    revoked: float | None
    last_seen: float | None


class Registry:
    """The file `registry.sqlite` of a gateway's folder. Safe for many threads.

    Raises RunError where the file cannot be opened or is none of this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)
            self._connection = sqlite3.connect(
                path, check_same_thread=False, isolation_level=None, timeout=10
            )
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"{path} cannot be used as a gateway's registry ({error}): restore it from a "
                "backup, or take another folder and enrol the devices again"
            ) from error

    def close(self) -> None:
        """Write what is open and close the file."""
        with self._lock:
            self._connection.close()

    def make_tokens(self, number: int, lifetime_s: float) -> list[str]:
        """`number` one-time tokens, each good for `lifetime_s` from now."""
        now = time.time()
        made = [secrets.token_urlsafe(24) for _ in range(number)]
        with self._writing() as cursor:
            cursor.execute("DELETE FROM tokens WHERE used IS NULL AND expires < ?", (now,))
            cursor.executemany(
                "INSERT INTO tokens (hash, made, expires) VALUES (?, ?, ?)",
                [(_hash(token), now, now + lifetime_s) for token in made],
            )
        return made

    def enrol(self, token: str, name: str = "") -> Enrolled | None:
        """A new device for a token that is good; None for any other. Uses the token up."""
        now, key = time.time(), secrets.token_bytes(KEY_BYTES)
        with self._writing() as cursor:
            cursor.execute(
                "UPDATE tokens SET used = ? WHERE hash = ? AND used IS NULL AND expires >= ?",
                (now, _hash(token), now),
            )
            if cursor.rowcount != 1:
                return None
            device = self._new_number(cursor)
            cursor.execute(
                "INSERT INTO devices (device, key, name, enrolled) VALUES (?, ?, ?, ?)",
                (device, key, _printable(name), now),
            )
            cursor.execute("UPDATE tokens SET device = ? WHERE hash = ?", (device, _hash(token)))
        return Enrolled(device, key)

    def key(self, device: int) -> bytes | None:
        """The key of a device that is enrolled and not revoked."""
        rows = self._read("SELECT key FROM devices WHERE device = ? AND revoked IS NULL", device)
        return bytes(rows[0][0]) if rows else None

    def revoke(self, device: int) -> bool:
        """Shut a device out for good; whether it was in."""
        with self._writing() as cursor:
            cursor.execute(
                "UPDATE devices SET revoked = ? WHERE device = ? AND revoked IS NULL",
                (time.time(), device),
            )
            return cursor.rowcount == 1

    def revoked(self) -> set[int]:
        """Every device that was shut out."""
        rows = self._read("SELECT device FROM devices WHERE revoked IS NOT NULL")
        return {int(device) for (device,) in rows}

    def declare(self, run: str, device: int, level: int) -> int:
        """Note a device's level for a run, once; the level that holds."""
        with self._writing() as cursor:
            row = (run, device, level, time.time())
            cursor.execute("INSERT OR IGNORE INTO levels VALUES (?, ?, ?, ?)", row)
        held = self.declared(run, device)
        assert held is not None
        return held

    def declared(self, run: str, device: int) -> int | None:
        """The level that a device declared for a run."""
        rows = self._read("SELECT level FROM levels WHERE run = ? AND device = ?", run, device)
        return int(rows[0][0]) if rows else None

    def roster(self, run: str) -> list[Member]:
        """Devices that declared a level for `run` and are not revoked, by number."""
        rows = self._read(
            "SELECT device, level FROM levels JOIN devices USING (device) "
            "WHERE run = ? AND revoked IS NULL ORDER BY device",
            run,
        )
        return [Member(int(device), int(level)) for device, level in rows]

    def seen(self, at: Mapping[int, float]) -> None:
        """Note when devices were last heard of."""
        with self._writing() as cursor:
            cursor.executemany(
                "UPDATE devices SET last_seen = ? WHERE device = ?",
                [(when, device) for device, when in at.items()],
            )

    def devices(self) -> Iterable[DeviceRow]:
        """Every device that ever enrolled, by time."""
        rows = self._read(
            "SELECT device, name, enrolled, revoked, last_seen FROM devices ORDER BY enrolled"
        )
        return [DeviceRow(*row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many devices are enrolled and revoked, and how many tokens are still good."""
        row = self._read(
            "SELECT (SELECT COUNT(*) FROM devices WHERE revoked IS NULL), "
            "(SELECT COUNT(*) FROM devices WHERE revoked IS NOT NULL), "
            "(SELECT COUNT(*) FROM tokens WHERE used IS NULL AND expires >= ?)",
            time.time(),
        )[0]
        return {"enrolled": int(row[0]), "revoked": int(row[1]), "tokens": int(row[2])}

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with self._writing() as cursor:
                for statement in SCHEMA.split(";"):
                    cursor.execute(statement)
                cursor.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise RunError(
                f"{self.path} is of version {version}, this gateway reads {SCHEMA_VERSION}: use "
                "the sottovoce that wrote it"
            )

    @staticmethod
    def _new_number(cursor: sqlite3.Cursor) -> int:
        while True:
            device = secrets.randbits(63)
            taken = cursor.execute("SELECT 1 FROM devices WHERE device = ?", (device,)).fetchone()
            if device and taken is None:
                return device

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            found: list[tuple[Any, ...]] = self._connection.execute(query, values).fetchall()
        return found

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """One transaction, on disk when it ends."""
        with self._lock:
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it
                    cursor.execute("ROLLBACK")
                raise


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _printable(name: str) -> str:
    """A device's own name for itself, fit for an operator's terminal."""
    return "".join(letter for letter in name[:MAX_NAME] if letter.isprintable())
