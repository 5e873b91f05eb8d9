"""The label sets of a population read from JSONL: given by a file, or found in the data.

A model's outputs are its labels, so label names are released with it. A labels file makes them
public by declaration: `{"intents": ["..."], "slots": ["O", "B-...", "I-..."]}`. Without one the
names found in the training and test files are treated as public, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Schema


def label_sets(
    found_intents: Iterable[str], found_tags: Iterable[str], labels: str | Path | None
) -> Schema:
    """The label sets, from the labels file or from the data."""
    intents, tags = tuple(sorted(found_intents)), tuple(sorted(set(found_tags) - {"O"}))
    if labels is not None:
        given = _read_labels(Path(labels))
        _check_known(labels, "intents", intents, given["intents"])
        _check_known(labels, "slots", tags, given["slots"])
        intents, tags = given["intents"], tuple(tag for tag in given["slots"] if tag != "O")
    return Schema(intents=intents, slots=("O", *tags) if tags else ())


def _read_labels(path: Path) -> dict[str, tuple[str, ...]]:
    remedy = 'write {"intents": ["..."], "slots": ["O", "B-..."]}'
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): set population.labels"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(given, dict):
        raise DataError(f"{path} is not a JSON object: {remedy}")
    sets = {name: given.get(name, []) for name in ("intents", "slots")}
    for name, values in sets.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{path}: {name} is not a list of strings: {remedy}")
        if len(set(values)) < len(values):
            raise DataError(f"{path}: {name} names a label twice: {remedy}")
    return {name: tuple(values) for name, values in sets.items()}


def _check_known(
    path: str | Path, name: str, found: tuple[str, ...], given: tuple[str, ...]
) -> None:
    for label in found:
        if label not in given:
            raise DataError(f"{path}: the data has '{label}', {name} has not: add it there")


def label_numbers(found: Iterable[str], labels: tuple[str, ...]) -> NDArray[np.int32]:
    """Number in `labels` of each label as the reader numbered it."""
    place = {label: number for number, label in enumerate(labels)}
    return np.array([place.get(label, 0) for label in found], dtype=np.int32)
