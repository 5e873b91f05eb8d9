"""A device's SQLite files: opened safely, written in one piece, failures as one clear line.

Write-ahead log and `synchronous=FULL`: what a finished `writing` block wrote is still there after
kill -9 and after a power cut, and an unfinished one left nothing. FULL costs one fsync a block,
which is nothing beside a round, and NORMAL could lose the last blocks to a power cut: a forgotten
participation would be epsilon that nobody counted. `secure_delete` overwrites what is deleted.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sottovoce.client.errors import DataError, RunError, SottovoceError

PATIENCE_S = 30.0
"""How long a writer waits for another one."""


@dataclass(frozen=True)
class Kind:
    """What a file is for. `application`: SQLite's application_id. `schema`: SQL of version 1.

    `remedy`: what to do with a damaged one.
    """

    name: str
    application: int
    schema: str
    remedy: str


VERSION = 1


class Database:
    """One connection, used by one thread at a time; any number of processes may have their own.

    Raises DataError for a file that is damaged, of another kind or of a newer version; RunError
    where it cannot be read or written, the disk being full among others.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path, self.kind = path, kind
        self._lock = threading.RLock()
        with self._explained():
            _make_private(path)
            self._connection = sqlite3.connect(
                path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare()
        except SottovoceError:
            self._connection.close()
            raise

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A block that is written as a whole, or not at all; on the disk when it ends."""
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A block that reads."""
        with self._lock, self._explained():
            yield self._connection

    def overwrite_log(self) -> bool:
        """Fold the log into the file and cut it, so that nothing deleted stays in it.

        False where another program was reading: the next call may succeed.
        """
        with self.reading() as connection:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def check(self) -> None:
        """Read every page; DataError where one is damaged."""
        with self.reading() as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(str(found).splitlines()[-1])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA temp_store=MEMORY")
        if not self._made():
            with self.writing():  # two that start at once: the second finds it made
                if not self._made():
                    self._make()
        self._keep_a_log()

    def _keep_a_log(self) -> None:
        """Write-ahead log from now on; SQLite does not wait for others here by itself."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def _made(self) -> bool:
        """Whether the file is what it should be; False where it is empty."""
        application = self._pragma("application_id")
        if application == self.kind.application:
            version = self._pragma("user_version")
            if version > VERSION:
                raise DataError(
                    f"{self.path} has version {version} and this program knows {VERSION}: "
                    "install the newer sottovoce that wrote it"
                )
            return True
        with self.reading() as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application or tables:
            raise DataError(
                f"{self.path} is a database of another program, not {self.kind.name}: "
                "give another --store"
            )
        return False

    def _make(self) -> None:
        for statement in self.kind.schema.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id={self.kind.application}")
        self._connection.execute(f"PRAGMA user_version={VERSION}")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explanation(error) from None
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be opened ({error.strerror}): the store must belong to the "
                "user who runs this"
            ) from None

    def _explanation(self, error: sqlite3.Error) -> SottovoceError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code == sqlite3.SQLITE_FULL:
            why = "the disk is full", "free some space; what was stored before is all there"
        elif code == sqlite3.SQLITE_IOERR:
            why = str(error), "check the disk and its free space"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            why = f"another program has held it for {PATIENCE_S:.0f} s", "try again"
        else:
            why = str(error), "the store must belong to the user who runs this"
        return RunError(f"{self.path} cannot be used ({why[0]}): {why[1]}")

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path} is damaged ({how}): {self.kind.remedy}")


def _make_private(path: Path) -> None:
    """An empty file where there is none; readable by its owner alone.

    A file that is there is not opened: to close it would drop this process' locks on it.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
