"""A file of scores from any system: `id`, `member`, `score`, one candidate a row.

CSV or TSV with a header, JSON (a list of objects), or JSON lines. `member`: true/false, 1/0, yes/no
or in/out. `score`: a finite number, higher where the attacker believes in membership. Other columns
are left alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.client.errors import DataError
from sottovoce.privacy.audit.outcome import Scored

COLUMNS = ("id", "member", "score")
TRUE, FALSE = ("true", "1", "yes", "in"), ("false", "0", "no", "out")
FORMATS = (".csv", ".tsv", ".json", ".jsonl")

LARGEST = 1e300  # so that differences of scores are finite too

Row = tuple[str, dict[str, Any]]  # where it stands, what it holds


def read_scores(path: Path) -> Scored:
    """The candidates of `path`. Raises DataError naming file, row and remedy."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"scores={path} is none of {', '.join(FORMATS)}: rename or convert it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"scores={path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it") from error
    return _collect(path, _rows(path, text))


def _collect(path: Path, rows: Iterable[Row]) -> Scored:
    seen: dict[str, str] = {}
    sides: tuple[list[str], list[str]] = ([], [])
    scores: tuple[list[float], list[float]] = ([], [])
    for place, row in rows:
        name = _id(path, place, row)
        if name in seen:
            raise DataError(
                f"{path} {place}: id={name} was in {seen[name]} already: a candidate counts once, "
                "keep one of the two"
            )
        seen[name] = place
        member = _member(path, place, row)
        sides[member].append(name)
        scores[member].append(_score(path, place, row))
    outside, inside = scores
    for name, found in (("members", inside), ("non-members", outside)):
        if not found:
            raise DataError(
                f"{path} holds no {name}: score candidates of both kinds, the attacker must tell "
                "them apart"
            )
    return Scored(np.array(inside), np.array(outside), sides[1], sides[0])


def _rows(path: Path, text: str) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from _table_rows(path, text, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _object(path, f"line {number}", _parsed(path, line, number))
    else:
        listed = _parsed(path, text, 1)
        if not isinstance(listed, list):
            raise DataError(f'{path} is no list: write [{{"id": …, "member": …, "score": …}}, …]')
        for number, value in enumerate(listed, 1):
            yield f"entry {number}", _object(path, f"entry {number}", value)


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        names = [str(name).strip() for name in reader.fieldnames or ()]
        if missing := [column for column in COLUMNS if column not in names]:
            raise DataError(
                f"{path} line 1: no column {', '.join(missing)}: begin with a header that has "
                f"{', '.join(COLUMNS)}"
            )
        if twice := [column for column in COLUMNS if names.count(column) > 1]:
            raise DataError(
                f"{path} line 1: column {', '.join(twice)} is there twice: keep the one that counts"
            )
        reader.fieldnames = names
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path} line {line} is nested too deeply: write one flat list") from error
    except ValueError as error:
        at = line + getattr(error, "lineno", 1) - 1
        raise DataError(f"{path} line {at} is not JSON: {getattr(error, 'msg', error)}") from error


def _object(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path} {place} is no object: write id, member and score of a candidate")
    return value


def _id(path: Path, place: str, row: dict[str, Any]) -> str:
    value = row.get("id")
    if value is None or not str(value).strip():
        raise DataError(f"{path} {place}: id is missing: give every candidate its own")
    return str(value).strip()


def _member(path: Path, place: str, row: dict[str, Any]) -> bool:
    text = str(row.get("member", "")).strip().lower()
    if text not in TRUE + FALSE:
        raise DataError(
            f"{path} {place}: member={row.get('member')!r} is neither: write true or false"
        )
    return text in TRUE


def _score(path: Path, place: str, row: dict[str, Any]) -> float:
    value = row.get("score")
    try:
        if isinstance(value, bool) or value is None:
            raise ValueError
        score = float(value)
        if not abs(score) <= LARGEST:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{path} {place}: score={value!r} is no finite number: give the candidate one, a "
            "middling one where the attacker cannot tell"
        ) from None
    return score
