"""A corpus read into memory: for files that fit, and the definition of what an index must hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import Examples
from sottovoce.simulations.corpus import Corpus, CorpusSettings, activity_kind
from sottovoce.simulations.corpus_devices import (
    assigned,
    assigned_keys,
    is_natural,
    numbered,
    silent,
    test_places,
    user_keys,
)
from sottovoce.simulations.jsonl_reader import Reader, Rows
from sottovoce.simulations.row_files import RowFormat


def read_corpus(settings: CorpusSettings, format: RowFormat) -> Corpus:
    """The corpus of some files. Raises DataError, one line, for a malformed one."""
    reader = Reader(format)
    rows = reader.read(settings.paths)
    people = len(reader.users)
    test = reader.read(settings.test_paths) if settings.test_paths else None
    natural = is_natural(settings.users, rows.without_user, bool((rows.user >= 0).any()))
    if natural:
        _check_silent(rows, reader, people)
        device = rows.user.astype(np.int64)
        keys = user_keys(list(reader.users)[:people], settings.seed)
    else:
        labels = rows.intent if rows.intent is not None else np.zeros(len(rows), np.int32)
        device = assigned(settings, labels)
        keys = assigned_keys(settings.devices, settings.seed)
    number, training = numbered(keys, settings.held_out_fraction)
    sizes = np.bincount(number[device], minlength=len(keys))
    store = _examples(rows).take(np.argsort(number[device], kind="stable"))
    tested = None
    if test is not None:
        left_out = number >= training if natural else np.zeros(0, dtype=bool)
        places = test_places(test.user, left_out, settings.seed)
        tested = _examples(test).take(np.argsort(places, kind="stable")[int((places < 0).sum()) :])
    return Corpus(
        train=replace(store, device_offsets=np.append(0, np.cumsum(sizes))),
        test=tested,
        activity=sizes[:training].astype(activity_kind(int(sizes.max()))),
        held_out=len(keys) - training,
        words=list(reader.words),
        intents=tuple(reader.intents),
        tags=tuple(reader.tags),
        natural=natural,
        empty=rows.empty,
    )


def _examples(rows: Rows) -> Examples:
    whole: NDArray[np.int64] = np.array([0, len(rows)], dtype=np.int64)
    return Examples(rows.tokens, rows.offsets, whole, rows.intent, rows.slots)


def _check_silent(rows: Rows, reader: Reader, people: int) -> None:
    """Raise DataError for a user without a word."""
    without = np.flatnonzero(np.bincount(rows.user, minlength=people) == 0)
    if len(without):
        first = int(without[0])
        raise silent(list(reader.users)[first], *reader.first_rows[first], reader.unit)
