"""One row of example text: parsed, checked and split into words, with faults that name the remedy.

The rules are the same on a device and in a simulated population: `tokens`, or else `text`, which
`split_words` splits; `intent` a string; `slots` BIO tags, one per token.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sottovoce.client.errors import DataError

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_decode = json.JSONDecoder().decode


class Fault(Exception):
    """What is wrong with a row and what to do; `at` says where."""

    def at(self, path: Path | str, unit: str, number: int) -> DataError:
        return DataError(f"{path} {unit} {number}: {self}")


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of one line."""
    try:
        row = _decode(line.decode())
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8 at byte {error.start}: convert the file to UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "deep"
        raise Fault(f"not valid JSON ({where}): fix or remove the line") from None
    if not isinstance(row, dict):
        raise Fault(f"{shown(row)} is not a JSON object: write one {{...}} a line")
    return row


def shown(value: Any) -> str:
    """A value short enough for one line; containers by their kind only."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, default=str)[:40]


def split_words(text: str) -> list[str]:
    """Lower-cased words, with their inner apostrophes, and single punctuation marks.

    `"Don't go, now."` -> `["don't", "go", ",", "now", "."]`.
    """
    lowered = text.lower()
    if lowered.replace(" ", "").isalnum():  # most requests: the same words, several times faster
        return lowered.split()
    return WORD.findall(lowered)


def words_of(row: dict[str, Any]) -> list[str]:
    """The words of a row, from `tokens` or `text`; none where it has an empty text."""
    tokens, text = row.get("tokens"), row.get("text")
    if tokens is not None:
        check_strings("tokens", tokens)
        words: list[str] = tokens
        return words
    if text is None:
        raise Fault("neither 'text' nor 'tokens': give one of them")
    if not isinstance(text, str):
        raise Fault(f"text is {shown(text)}, not a string: put it in quotes")
    return split_words(text)


def check_intent(intent: Any) -> None:
    """Raise Fault unless `intent` is a string."""
    if not isinstance(intent, str):
        raise Fault(f"intent is {shown(intent)}, not a string: put it in quotes")


def check_slots(tags: Any, words: int) -> None:
    """Raise Fault unless `tags` are BIO tags, one for each of the row's words."""
    check_strings("slots", tags)
    if len(tags) != words:
        raise Fault(f"{words} tokens but {len(tags)} slots: give one BIO tag per token")
    _check_bio(tags)


def check_strings(name: str, values: Any) -> None:
    """Raise Fault unless `values` is a list of strings."""
    if not isinstance(values, list):
        raise Fault(f"{name} is {shown(values)}, not a list of strings: write [\"...\"]")
    for value in values:
        if not isinstance(value, str):
            raise Fault(f"{name} holds {shown(value)}, not a string: put it in quotes")


def _check_bio(tags: list[str]) -> None:
    before = "O"
    for place, tag in enumerate(tags, start=1):
        if tag != "O":
            if tag[:2] not in ("B-", "I-") or len(tag) < 3:
                raise Fault(f"slot {place} is '{tag}': a tag is O, B-name or I-name")
            if tag[0] == "I" and before[2:] != tag[2:]:
                name = tag[2:]
                raise Fault(
                    f"slot {place} is '{tag}' after '{before}': an I-{name} follows B-{name} or"
                    f" I-{name}, so write B-{name}"
                )
        before = tag
