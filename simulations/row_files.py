"""Files of examples as a stream of rows that can be taken up again where it was left.

A row is a JSON object or what a table's row is as one. `mark` is where the next row begins, in the
format's own count: bytes of (unzipped) JSONL, rows of a table.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, cast

from sottovoce.client.errors import DataError
from sottovoce.client.rows import Fault as Fault
from sottovoce.client.rows import parse
from sottovoce.client.rows import shown as shown

Row = tuple[int, dict[str, Any] | None, int]  # number from 1, None for a blank one, mark after it


class RowFile(Protocol):
    """The rows of a file behind the first `number`, which end at `mark`."""

    unit: ClassVar[str]  # what a row is called

    def __iter__(self) -> Iterator[Row]: ...

    @property
    def read_bytes(self) -> int:
        """About how much of the file has been read."""


class RowFormat(Protocol):
    """Opens a file at a row: a class of row files, or one with its settings bound."""

    def __call__(self, path: Path, mark: int = 0, number: int = 0) -> RowFile: ...


class JsonLines:
    """One JSON object a line, plain or gzipped (told by the first bytes, not by the name).

    Iterating raises DataError, one line that names the file, the line and the remedy.
    """

    unit: ClassVar[str] = "line"

    def __init__(self, path: Path, mark: int = 0, number: int = 0) -> None:
        self.path, self._mark, self._number = path, mark, number
        self._raw: BinaryIO | None = None

    @property
    def read_bytes(self) -> int:
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    def __iter__(self) -> Iterator[Row]:
        number, mark = self._number, self._mark
        for line in self._lines():
            number, mark = number + 1, mark + len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                row = None if not line or line.isspace() else parse(line)
            except Fault as fault:
                raise fault.at(self.path, self.unit, number) from None
            yield number, row, mark

    def _lines(self) -> Iterator[bytes]:
        path = self.path
        try:
            with path.open("rb") as raw:
                self._raw = raw
                zipped = raw.read(2) == b"\x1f\x8b"
                if path.suffix == ".gz" and not zipped:
                    raise DataError(
                        f"{path} is not a gzip file: fetch it again, or name it without .gz"
                    )
                raw.seek(0)
                with closing(gzip.GzipFile(fileobj=raw) if zipped else raw) as lines:
                    lines.seek(self._mark)
                    yield from cast(BinaryIO, lines)
        except FileNotFoundError:
            raise absent(path) from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is a broken gzip file ({error}): fetch it again") from None
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): give a JSONL file"
            ) from None


def absent(path: Path) -> DataError:
    """The error of a file that is not there."""
    return DataError(
        f"{path} does not exist: set population.path to a JSONL file, or SOTTOVOCE_DATA to the "
        "folder of the ready data sets"
    )
