"""From JSONL files to flat arrays, with errors that name the file, the line and the remedy.

One JSON object a line, plain or gzipped: `user_id` (string or null), `text`, and for language
understanding `tokens`, `intent`, `slots` (BIO tags, one per token). A line without `tokens` has its
`text` split by `split_words`. Nothing of a line is kept but numbers; the word table is one list.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Lower-cased words, with their inner apostrophes, and single punctuation marks.

    `"Don't go, now."` -> `["don't", "go", ",", "now", "."]`.
    """
    return WORD.findall(text.lower())


@dataclass(frozen=True)
class Rows:
    """The examples of some files in file order, those without a word left out.

    `tokens`: (total tokens,) int32 into `Reader.words`. `offsets`: (rows + 1,) int64. `intent`:
    (rows,) and `slots`: (total tokens,) int32 into `Reader.intents` and `.tags`, or None. `user`:
    (rows,) int32 into `Reader.users`, -1 for null. `without_user`: "FILE line N" of the first line
    without a user, or None. `empty`: lines left out.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    intent: NDArray[np.int32] | None
    slots: NDArray[np.int32] | None
    user: NDArray[np.int32]
    without_user: str | None
    empty: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


class _Fault(Exception):
    """What is wrong with a line and what to do; the caller knows the file and the number."""


class Reader:
    """Reads files into `Rows`; words, users and labels are numbered across all of them.

    `users` maps an id to (number, "FILE line N" where it first stood).
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = defaultdict(count().__next__)  # a new word is numbered
        self.intents: dict[str, int] = {}
        self.tags: dict[str, int] = {"O": 0}
        self.users: dict[str, tuple[int, str]] = {}
        self._has_intents: bool | None = None
        self._has_slots: bool | None = None

    def read(self, paths: Sequence[Path]) -> Rows:
        """All examples of the files. Raises DataError, one line, at the first fault."""
        self._tokens, self._slots = array("i"), array("i")
        self._lengths, self._intent, self._user = array("i"), array("i"), array("i")
        self._without_user: str | None = None
        self._empty = 0
        for path in paths:
            self._read_file(path)
        slots = np.array(self._slots, dtype=np.int32) if self._has_slots else None
        return Rows(
            tokens=np.array(self._tokens, dtype=np.int32),
            offsets=np.append(0, np.cumsum(np.array(self._lengths, dtype=np.int64))),
            intent=np.array(self._intent, dtype=np.int32) if self._has_intents else None,
            slots=slots,
            user=np.array(self._user, dtype=np.int32),
            without_user=self._without_user,
            empty=self._empty,
        )

    def _read_file(self, path: Path) -> None:
        before, number = len(self._lengths), 0
        for number, line in enumerate(_lines(path), start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                if line.strip():
                    self._add(_parse(line), path, number)
            except _Fault as fault:
                raise DataError(f"{path} line {number}: {fault}") from None
        if number == 0:
            raise DataError(f"{path} is empty: give a file with one JSON object a line")
        if len(self._lengths) == before and not self.users:
            raise DataError(f"{path} has no example with a word in it: fill 'text' or 'tokens'")

    def _add(self, row: dict[str, Any], path: Path, number: int) -> None:
        words = _words(row)
        user = self._user_number(row, path, number)
        intent = self._intent_number(row)
        slots = self._slot_numbers(row, len(words))
        if not words:
            self._empty += 1
            return
        self._tokens.extend(map(self.words.__getitem__, words))
        self._slots.extend(slots)
        self._lengths.append(len(words))
        self._intent.append(intent)
        self._user.append(user)

    def _user_number(self, row: dict[str, Any], path: Path, number: int) -> int:
        user = row.get("user_id")
        if user is None:
            if self._without_user is None:
                self._without_user = f"{path} line {number}"
            return -1
        if not isinstance(user, str):
            raise _Fault(f"user_id is {_shown(user)}, not a string: put it in quotes, or null")
        if user not in self.users:
            self.users[user] = (len(self.users), f"{path} line {number}")
        return self.users[user][0]

    def _intent_number(self, row: dict[str, Any]) -> int:
        intent = row.get("intent")
        if self._has_intents is None:
            self._has_intents = intent is not None
        if (intent is not None) != self._has_intents:
            raise _Fault(_only_some("intent", self._has_intents))
        if intent is None:
            return -1
        if not isinstance(intent, str):
            raise _Fault(f"intent is {_shown(intent)}, not a string: put it in quotes")
        return self.intents.setdefault(intent, len(self.intents))

    def _slot_numbers(self, row: dict[str, Any], words: int) -> list[int]:
        tags = row.get("slots")
        if self._has_slots is None:
            self._has_slots = tags is not None
        if (tags is not None) != self._has_slots:
            raise _Fault(_only_some("slots", self._has_slots))
        if tags is None:
            return []
        _check_strings("slots", tags)
        if len(tags) != words:
            raise _Fault(f"{words} tokens but {len(tags)} slots: give one BIO tag per token")
        _check_bio(tags)
        return [self.tags.setdefault(tag, len(self.tags)) for tag in tags]


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines, unzipped where it is zipped (told by its first bytes, not its name)."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if path.suffix == ".gz" and not zipped:
            raise DataError(f"{path} is not a gzip file: fetch it again, or name it without .gz")
        with gzip.open(path) if zipped else path.open("rb") as lines:
            yield from lines
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: set population.path to a JSONL file, or SOTTOVOCE_DATA to the "
            "folder of the ready data sets"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a JSONL file") from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 at byte {error.start}: convert the file to UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "deep"
        raise _Fault(f"not valid JSON ({where}): fix or remove the line") from None
    if not isinstance(row, dict):
        raise _Fault(f"{_shown(row)} is not a JSON object: write one {{...}} a line")
    return row


def _words(row: dict[str, Any]) -> list[str]:
    tokens, text = row.get("tokens"), row.get("text")
    if tokens is not None:
        _check_strings("tokens", tokens)
        words: list[str] = tokens
        return words
    if text is None:
        raise _Fault("neither 'text' nor 'tokens': give one of them")
    if not isinstance(text, str):
        raise _Fault(f"text is {_shown(text)}, not a string: put it in quotes")
    return split_words(text)


def _check_strings(name: str, values: Any) -> None:
    if not isinstance(values, list):
        raise _Fault(f"{name} is {_shown(values)}, not a list of strings: write [\"...\"]")
    for value in values:
        if not isinstance(value, str):
            raise _Fault(f"{name} holds {_shown(value)}, not a string: put it in quotes")


def _check_bio(tags: list[str]) -> None:
    before = "O"
    for place, tag in enumerate(tags, start=1):
        if tag != "O":
            if tag[:2] not in ("B-", "I-") or len(tag) < 3:
                raise _Fault(f"slot {place} is '{tag}': a tag is O, B-name or I-name")
            if tag[0] == "I" and before[2:] != tag[2:]:
                name = tag[2:]
                raise _Fault(
                    f"slot {place} is '{tag}' after '{before}': an I-{name} follows B-{name} or"
                    f" I-{name}, so write B-{name}"
                )
        before = tag


def _only_some(field: str, before: bool) -> str:
    found = "is missing here but not" if before else "is given here but not"
    return f"'{field}' {found} on the lines before: give it on every line or on none"


def _shown(value: Any) -> str:
    """A value short enough for one line; containers by their kind only."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:40]
