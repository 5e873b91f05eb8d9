"""From files of examples to flat arrays, with errors that name the file, the line and the remedy.

A row has `user_id` (string or null), `text`, and for language understanding `tokens`, `intent`,
`slots` (BIO tags, one per token). A row without `tokens` has its `text` split by `split_words`.
Nothing of a row is kept but numbers; the word table is one list.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.client.rows import WORD as WORD
from sottovoce.client.rows import Fault, check_intent, check_slots, shown, words_of
from sottovoce.client.rows import split_words as split_words
from sottovoce.simulations.row_files import JsonLines, RowFormat


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


class Reader:
    """Reads files of one format into `Rows`; words, users and labels are numbered across them.

    `words`, `users`, `intents` and `tags` map a name to its number, in order of appearance.
    `first_rows`: where each user first stood, (file, number of the row). `has_intents` and
    `has_slots`: whether the rows have labels, None before the first one. `unit`: what a row is
    called.
    """

    def __init__(self, format: RowFormat = JsonLines) -> None:
        self.format, self.unit = format, "line"
        self.words: dict[str, int] = defaultdict(count().__next__)  # a new word is numbered
        self.intents: dict[str, int] = {}
        self.tags: dict[str, int] = {"O": 0}
        self.users: dict[str, int] = {}
        self.first_rows: list[tuple[Path, int]] = []
        self.has_intents: bool | None = None
        self.has_slots: bool | None = None
        self._clear()

    def _clear(self) -> None:
        self.tokens, self._slots = array("i"), array("i")
        self.lengths, self._intent, self.user = array("i"), array("i"), array("i")
        self.without_user: str | None = None
        self.added, self.empty = 0, 0

    def read(self, paths: Sequence[Path]) -> Rows:
        """All examples of the files. Raises DataError, one line, at the first fault."""
        self._clear()
        for path in paths:
            self._read_file(path)
        return self.rows()

    def rows(self) -> Rows:
        """What was added."""
        return Rows(
            tokens=np.array(self.tokens, dtype=np.int32),
            offsets=np.append(0, np.cumsum(np.array(self.lengths, dtype=np.int64))),
            intent=np.array(self._intent, dtype=np.int32) if self.has_intents else None,
            slots=np.array(self._slots, dtype=np.int32) if self.has_slots else None,
            user=np.array(self.user, dtype=np.int32),
            without_user=self.without_user,
            empty=self.empty,
        )

    def _read_file(self, path: Path) -> None:
        before, number = len(self.lengths), 0
        file = self.format(path)
        self.unit = file.unit
        for number, row, _ in file:
            if row is not None:
                self.add(row, path, number)
        check_content(path, number, len(self.lengths) > before or bool(self.users))

    def add(self, row: dict[str, Any], path: Path, number: int) -> None:
        """Take in one row. Raises DataError where it is malformed."""
        try:
            self._add(row, path, number)
        except Fault as fault:
            raise fault.at(path, self.unit, number) from None

    def _add(self, row: dict[str, Any], path: Path, number: int) -> None:
        words = words_of(row)
        self.added += 1
        user = self._user_number(row, path, number)
        intent = self._intent_number(row)
        slots = self._slot_numbers(row, len(words))
        if not words:
            self.empty += 1
            return
        numbers = self.words
        self.tokens.fromlist([numbers[word] for word in words])
        self._slots.fromlist(slots)
        self.lengths.append(len(words))
        self._intent.append(intent)
        self.user.append(user)

    def _user_number(self, row: dict[str, Any], path: Path, number: int) -> int:
        user = row.get("user_id")
        if user is None:
            if self.without_user is None:
                self.without_user = place(path, number, self.unit)
            return -1
        if not isinstance(user, str):
            raise Fault(f"user_id is {shown(user)}, not a string: put it in quotes, or null")
        found = self.users.get(user)
        if found is None:
            found = self.users[user] = len(self.users)
            self.first_rows.append((path, number))
        return found

    def _intent_number(self, row: dict[str, Any]) -> int:
        intent = row.get("intent")
        if self.has_intents is None:
            self.has_intents = intent is not None
        if (intent is not None) != self.has_intents:
            raise Fault(_only_some("intent", self.has_intents))
        if intent is None:
            return -1
        check_intent(intent)
        return self.intents.setdefault(intent, len(self.intents))

    def _slot_numbers(self, row: dict[str, Any], words: int) -> list[int]:
        tags = row.get("slots")
        if self.has_slots is None:
            self.has_slots = tags is not None
        if (tags is not None) != self.has_slots:
            raise Fault(_only_some("slots", self.has_slots))
        if tags is None:
            return []
        check_slots(tags, words)
        return [self.tags.setdefault(tag, len(self.tags)) for tag in tags]


def place(path: Path, number: int, unit: str) -> str:
    """Where a row stands, in words."""
    return f"{path} {unit} {number}"


def check_content(path: Path, rows: int, examples: bool) -> None:
    """Raise DataError for a file without rows, or without a word where none is known yet."""
    if not rows:
        raise DataError(f"{path} is empty: give a file with one JSON object a line, or a table")
    if not examples:
        raise DataError(f"{path} has no example with a word in it: fill 'text' or 'tokens'")


def _only_some(field: str, before: bool) -> str:
    found = "is missing here but not" if before else "is given here but not"
    return f"'{field}' {found} on the lines before: give it on every line or on none"
