"""Rows of Parquet and Arrow files (IPC files, feather, IPC streams), a batch at a time.

A row reads as the JSON object with the same fields, so that the same rows give the same population
in either form. Needs pyarrow (`pip install "sottovoce[parquet]"`), which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.simulations.row_files import Row, RowFormat, absent

FIELDS = ("user_id", "text", "tokens", "intent", "slots")
BATCH_ROWS = 4096
READ_BYTES = 1 << 20


class TableRows:
    """The rows of a Parquet or Arrow file; `columns`: name of each field's column.

    A column that is not there counts as null in every row, but for one that was renamed. Integer
    user ids are read as text. Iterating raises DataError, one line, for a file that is no table.
    """

    unit: ClassVar[str] = "row"

    def __init__(
        self, path: Path, mark: int = 0, number: int = 0, *, columns: Mapping[str, str]
    ) -> None:
        self.path, self._mark, self._columns = path, mark, columns
        self._read, self._rows = mark, 0

    @property
    def read_bytes(self) -> int:
        return int(self.path.stat().st_size * self._read / max(1, self._rows, self._read))

    def __iter__(self) -> Iterator[Row]:
        arrow = _pyarrow()
        try:
            for batch in _batches(self.path, self._mark, self._names, self._count):
                yield from self._batch(batch)
        except FileNotFoundError:
            raise absent(self.path) from None
        except (arrow.ArrowException, OSError) as error:
            line = " ".join(str(error).split())[:120]
            raise DataError(
                f"{self.path} cannot be read as a Parquet or Arrow file ({line}): give one, or set"
                " population=jsonl"
            ) from None

    def _batch(self, batch: Any) -> Iterator[Row]:
        """The rows of a record batch."""
        fields = {column: field for field, column in self._columns.items()}
        values = {fields[name]: _listed(fields[name], batch.column(name))
                  for name in batch.schema.names}
        for row in range(batch.num_rows):
            self._read += 1
            yield self._read, {field: column[row] for field, column in values.items()}, self._read

    def _count(self, rows: int) -> None:
        self._rows = rows

    def _names(self, there: list[str]) -> list[str]:
        """The columns to read. Raises ConfigError where they cannot make an example."""
        for field, column in self._columns.items():
            if column != field and column not in there:
                raise ConfigError(
                    f"{self.path} has no column '{column}', it has {', '.join(there)}: set"
                    f" population.columns.{field}"
                )
        names = [column for column in self._columns.values() if column in there]
        if not {self._columns["text"], self._columns["tokens"]} & set(names):
            raise ConfigError(
                f"{self.path} has neither '{self._columns['text']}' nor"
                f" '{self._columns['tokens']}', it has {', '.join(there)}: set"
                " population.columns.text"
            )
        return names


def table_format(columns: Mapping[str, str]) -> RowFormat:
    """Opens tables whose fields have these columns. Raises ConfigError without pyarrow."""
    _pyarrow()
    names = list(columns.values())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two fields have the column '{twice}': set population.columns")
    return partial(TableRows, columns=columns)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            "population=parquet needs pyarrow: pip install 'sottovoce[parquet]'"
        ) from None
    return pyarrow


def _batches(path: Path, skip: int, names: Any, count: Any) -> Iterator[Any]:
    """Record batches of the columns `names(all columns)`, without the first `skip` rows.

    `count` is told the rows of the file where they are known beforehand.
    """
    with path.open("rb") as file:
        magic = file.read(6)
    open_table = _parquet if magic[:4] == b"PAR1" else _ipc_file if magic == b"ARROW1" else _stream
    for batch in open_table(path, skip, names, count):
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _parquet(path: Path, skip: int, names: Any, count: Any) -> Iterator[Any]:
    """Whole row groups are skipped unread; of the others a few pages are in memory at once."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        count(file.metadata.num_rows)
        chosen = names(file.schema_arrow.names)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=chosen)
            yield from _behind(batches, skip)
            skip = 0


def _ipc_file(path: Path, skip: int, names: Any, count: Any) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
        chosen = names(file.schema.names)
        batches = (file.get_batch(k).select(chosen) for k in range(file.num_record_batches))
        yield from _behind(batches, skip)


def _stream(path: Path, skip: int, names: Any, count: Any) -> Iterator[Any]:
    import pyarrow

    with path.open("rb") as source, pyarrow.ipc.open_stream(source) as stream:
        chosen = names(stream.schema.names)
        yield from _behind((batch.select(chosen) for batch in stream), skip)


def _behind(batches: Iterator[Any], skip: int) -> Iterator[Any]:
    """The batches without their first `skip` rows."""
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(0, skip - batch.num_rows)


def _listed(field: str, column: Any) -> list[Any]:
    """A column's values as JSON would have them."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    values: list[Any] = column.to_pylist()
    if field == "user_id" and pyarrow.types.is_integer(kind):
        return [None if value is None else str(value) for value in values]
    return values
