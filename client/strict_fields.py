"""Reading JSON that another machine wrote: every key known, every value within bounds.

`Fields` is handed an object and asked for its values one by one; what was not asked for in the end
is refused. Nothing is converted: a number in quotes is no number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sottovoce.client.errors import DataError

Value = TypeVar("Value")


def read_json(data: bytes, what: str, most: int) -> Any:
    """The JSON in at most `most` bytes; DataError naming `what`."""
    if len(data) > most:
        raise DataError(f"{what} has {len(data)} bytes: at most {most} are read")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is malformed ({str(error)[:80]})") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


class Fields:
    """The values of one JSON object, which is called `where` in errors (DataError)."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{where} must be an object")
        self.values, self.where = values, where
        self._asked = set[str]()

    def take(self, name: str) -> Any:
        """The value as it is; None where it is absent."""
        self._asked.add(name)
        return self.values.get(name)

    def maybe(self, name: str, read: Callable[[str], Value]) -> Value | None:
        """None where the value is null or absent, else what `read` makes of it."""
        return None if self.take(name) is None else read(name)

    def text(self, name: str, most: int = 200) -> str:
        """A string of at most `most` characters."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) > most:
            raise self._bad(name, f"a text of at most {most} characters")
        return value

    def one_of(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`."""
        value = self.take(name)
        if not isinstance(value, str) or value not in choices:
            raise self._bad(name, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self._bad(name, "true or false")
        return value

    def whole(self, name: str, least: int, most: int) -> int:
        """An integer between `least` and `most`, both included."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._bad(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        """A finite number between `least` and `most`, both included."""
        value = self.take(name)
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not math.isfinite(value) or not least <= value <= most:
            raise self._bad(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def texts(self, name: str, most: int, longest: int = 200) -> list[str]:
        """A list of at most `most` strings."""
        values = self.take(name)
        if not isinstance(values, list) or len(values) > most:
            raise self._bad(name, f"a list of at most {most} texts")
        for value in values:
            if not isinstance(value, str) or len(value) > longest:
                raise self._bad(name, f"a list of texts of at most {longest} characters")
        return values

    def part(self, name: str) -> Fields:
        """The object under `name`."""
        return Fields(self.take(name), f"{self.where}.{name}")

    def done(self) -> None:
        """Raise DataError where there is a value that nobody asked for."""
        unknown = sorted(self.values.keys() - self._asked)
        if unknown:
            raise DataError(
                f"{self.where} has an unknown entry {str(unknown[0])[:80]!r}: is the other side's "
                "version newer?"
            )

    def _bad(self, name: str, wanted: str) -> DataError:
        found = repr(self.values.get(name))
        return DataError(f"{self.where}.{name}={found[:60]} must be {wanted}")
