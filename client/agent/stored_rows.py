"""Rows as an app gives them, checked and turned into what the store keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sottovoce.client.errors import DataError
from sottovoce.client.rows import Fault, check_intent, check_slots, shown, words_of

EARLIEST = 1_767_225_600.0
"""The beginning of 2026: a clock before it is not set yet, and neither dates nor deletes anything.

A small board without a battery starts in 1970 until it finds a time server."""

Row = tuple[str, str | None, str | None, float | None]
"""A row as it is stored: tokens, intent, slots, time."""


def checked_row(row: Mapping[str, Any], now: float) -> Row | None:
    """A row as it is stored, None where it has no word. Raises Fault where it is malformed."""
    words = words_of(dict(row))
    intent, slots = row.get("intent"), row.get("slots")
    if intent is not None:
        check_intent(intent)
        if not intent.isprintable():
            raise Fault("intent has characters that cannot be printed: take them out")
    if slots is not None:
        check_slots(slots, len(words))
    at = _time(row.get("time"), now)
    if not words:
        return None
    return _text(words), intent, None if slots is None else _text(slots), at


def _time(given: Any, now: float) -> float | None:
    if given is None:
        return now if now >= EARLIEST else None
    if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < 1e11:
        return float(given)
    raise Fault(f"time is {shown(given)}, not a number of seconds since 1970: write it as one")


def checked_rows(rows: list[Mapping[str, Any]], before: int) -> list[Row]:
    """Rows as they are stored, those without a word left out.

    DataError with the number of the first malformed one, counted from `before` + 1.
    """
    now, found = time.time(), list[Row]()
    for number, row in enumerate(rows, start=before + 1):
        try:
            checked = checked_row(row, now)
        except Fault as fault:
            raise DataError(f"example {number}: {fault}") from None
        if checked is not None:
            found.append(checked)
    return found


def _text(words: Iterable[str]) -> str:
    return json.dumps(list(words), separators=(",", ":"))
