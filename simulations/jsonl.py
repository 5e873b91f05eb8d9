"""The population of real data: JSONL files, one device per user or devices assigned.

With user ids a device is a person (`users=natural`). Without, examples are dealt out to invented
devices (`users=assigned`, see `partition`), which makes a skewed population but no real unit of
privacy. All examples lie in memory as flat int32 arrays, sorted by device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples
from sottovoce.simulations.activity import LogNormalActivity
from sottovoce.simulations.hashing import draws, stream
from sottovoce.simulations.jsonl_labels import label_numbers, label_sets
from sottovoce.simulations.jsonl_reader import Reader, Rows
from sottovoce.simulations.partition import assign_devices
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels


@dataclass
class JsonlConfig:
    """Settings of a population read from JSONL (`population=jsonl population.path=FILE`)."""

    name: str = "jsonl"
    path: str = "???"  # mandatory; several files are separated by commas
    test_path: str | None = None
    users: str = "auto"
    devices: int = 500  # assigned devices only, held-out ones included
    max_examples_per_round: int = 32
    seed: int = 0
    alpha: float = 1.0
    mu: float = 2.3
    sigma: float = 1.3
    held_out_fraction: float = 0.1
    max_held_out_examples: int = 100  # evaluated examples of one held-out device
    labels: str | None = None


class JsonlPopulation(Population):
    """Devices from JSONL files.

    `path`: a file, several separated by commas, or a list. `test_path`: likewise, held-out
    examples. `users`: `natural` (one device per `user_id`), `assigned` (`devices` of them, label-
    Dirichlet `alpha` x log-normal activity `mu`, `sigma`), `auto` (natural where every line has a
    user). `held_out_fraction` of the devices never train; at most `max_held_out_examples` of each
    are evaluated. `labels`: a JSON file with the public label sets `intents` and `slots`; without
    it they are read from the data and treated as public. Raises DataError, ConfigError.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        test_path: str | Path | Sequence[str | Path] | None = None,
        *,
        name: str = "jsonl",
        users: str = "auto",
        devices: int = 500,
        alpha: float = 1.0,
        mu: float = 2.3,
        sigma: float = 1.3,
        held_out_fraction: float = 0.1,
        max_held_out_examples: int = 100,
        labels: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        _check(users, held_out_fraction, max_held_out_examples)
        paths, test_paths = _paths(path), _paths(test_path)
        if not paths:
            raise ConfigError("population.path is empty: set it to a JSONL file")
        reader = Reader()
        rows = reader.read(paths)
        people = dict(reader.users)
        test = reader.read(test_paths) if test_paths else None
        self.name = name
        self.public_words = False
        self.words = list(reader.words)
        self.schema = label_sets(reader, labels)
        self.natural = _is_natural(users, rows)
        self.max_held_out_examples = max_held_out_examples
        if self.natural:
            device = _natural_devices(rows, people)
            keys = np.array([stream(seed, f"held-out user {user}") for user in people])
        else:
            model = LogNormalActivity(mu, sigma)
            by_label = rows.intent if rows.intent is not None else np.zeros(len(rows), np.int32)
            device = assign_devices(by_label, devices, alpha=alpha, model=model, seed=seed)
            keys = draws(stream(seed, "held-out devices"), np.arange(devices))
        number, training = _numbered(keys, held_out_fraction)
        place = np.argsort(number[device], kind="stable")
        sizes = np.bincount(number[device], minlength=len(keys))
        self._store = replace(
            self._labelled(rows, reader).take(place), device_offsets=np.append(0, np.cumsum(sizes))
        )
        kind = np.uint16 if sizes.max() < 1 << 16 else np.uint32
        self.activity = sizes[:training].astype(kind)
        self.held_out = len(keys) - training
        self._test: Examples | None = None
        if test is not None:
            left_out = number[: len(people)] >= training if self.natural else np.zeros(0, bool)
            self._test = self._tested(test, reader, left_out, seed)
        self._facts = _facts(paths, test_paths, rows, labels) | {"seed": seed}
        if not self.natural:
            self._facts["activity"] = (
                f"assigned by us: label-Dirichlet(alpha={alpha:g}) x log-normal"
                f" (mu={mu:g} sigma={sigma:g}), scaled to the number of examples"
            )

    def examples(
        self,
        devices: NDArray[np.int64],
        indices: Sequence[NDArray[np.int64]] | None = None,
    ) -> Examples:
        """Examples of training devices: all, or numbers `indices[k]` of `devices[k]`.

        Raises IndexError for an unknown device or example number.
        """
        devices = np.asarray(devices, dtype=np.int64)
        if len(devices) and not 0 <= devices.min() <= devices.max() < len(self):
            raise IndexError(f"a device is not among the {len(self)} training devices")
        if indices is None:
            return self._gather(devices, self.activity[devices].astype(np.int64))
        counts = np.array([len(numbers) for numbers in indices], dtype=np.int64)
        numbers = np.concatenate([np.empty(0, dtype=np.int64), *indices])
        if np.any((numbers < 0) | (numbers >= np.repeat(self.activity[devices], counts))):
            raise IndexError("an example number is beyond its device's activity")
        rows = np.repeat(self._store.device_offsets[devices], counts) + numbers
        return self._rows(rows, counts)

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """The first examples (`max_held_out_examples` at most) of devices that never train."""
        count = self.held_out if limit is None else min(limit, self.held_out)
        devices = np.arange(len(self), len(self) + count, dtype=np.int64)
        sizes = np.diff(self._store.device_offsets)[devices]
        return self._gather(devices, np.minimum(sizes, self.max_held_out_examples))

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """(At most `limit`) examples of the test files, in random order, one device each.

        Those of held-out users are left out. None without test files.
        """
        if self._test is None or limit is None or limit >= len(self._test):
            return self._test
        cut = self._test.take(np.arange(limit, dtype=np.int64))
        return replace(cut, device_offsets=np.arange(limit + 1, dtype=np.int64))

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        """(levels,) devices per activity level where we assigned them, None for natural users.

        The sizes of assigned devices follow from the activity model, the seed and the number of
        examples, which is taken as public; natural activity is known from private data only.
        """
        if self.natural:
            return None
        levels = activity_levels(self.activity)
        return np.bincount(levels, minlength=MAX_LEVEL + 1).astype(np.float64)

    def describe(self) -> dict[str, Any]:
        """What the report says of this population."""
        unit = "one device is one user of the data"
        if not self.natural:
            unit = "one device is an invented group of examples: no person's privacy is claimed"
        return {
            "unit": unit,
            "devices": len(self),
            "held_out_devices": self.held_out,
            "activity": "as in the data",
            "activity_is_public": not self.natural,
            "examples": int(self.activity.sum(dtype=np.int64)),
            "words": len(self.words),
            "words_from": "the data: private, never released by the population",
            "intents": len(self.schema.intents),
            "slots": len({tag[2:] for tag in self.schema.slots[1:]}),
            **self._facts,
        }

    def _gather(self, devices: NDArray[np.int64], counts: NDArray[np.int64]) -> Examples:
        """The first `counts[k]` examples of each device, held-out devices included."""
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._rows(np.repeat(self._store.device_offsets[devices], counts) + within, counts)

    def _rows(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> Examples:
        offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
        return replace(self._store.take(rows), device_offsets=offsets)

    def _labelled(self, rows: Rows, reader: Reader) -> Examples:
        """The rows with their labels numbered as in the schema."""
        intents = label_numbers(reader.intents, self.schema.intents)
        tags = label_numbers(reader.tags, self.schema.slots)
        return Examples(
            tokens=rows.tokens,
            offsets=rows.offsets,
            device_offsets=np.arange(len(rows) + 1, dtype=np.int64),
            intent=None if rows.intent is None else intents[rows.intent],
            slots=None if rows.slots is None else tags[rows.slots],
        )

    def _tested(
        self, test: Rows, reader: Reader, left_out: NDArray[np.bool_], seed: int
    ) -> Examples:
        known = np.flatnonzero((test.user >= 0) & (test.user < len(left_out)))
        kept = np.ones(len(test), dtype=bool)
        kept[known] = ~left_out[test.user[known]]
        order = np.argsort(draws(stream(seed, "test order"), np.arange(len(test))))
        rows = order[kept[order]]
        examples = self._labelled(test, reader).take(rows)
        return replace(examples, device_offsets=np.arange(len(rows) + 1, dtype=np.int64))


def _paths(path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if path is None:
        return []
    parts = path.split(",") if isinstance(path, str) else [path] if isinstance(path, Path) else path
    return [Path(str(part).strip()) for part in parts if str(part).strip()]


def _is_natural(users: str, rows: Rows) -> bool:
    if users == "natural" and rows.without_user:
        raise DataError(
            f"{rows.without_user}: no user_id, which users=natural needs: give every line one, or"
            " set population.users=assigned"
        )
    if users == "auto" and rows.without_user and (rows.user >= 0).any():
        raise DataError(
            f"{rows.without_user}: no user_id where other lines have one: give every line one, or"
            " set population.users=assigned"
        )
    return users == "natural" or (users == "auto" and rows.without_user is None)


def _natural_devices(rows: Rows, people: dict[str, tuple[int, str]]) -> NDArray[np.int64]:
    """(rows,) device of each row. Raises DataError for a user without a word."""
    silent = np.flatnonzero(np.bincount(rows.user, minlength=len(people)) == 0)
    if len(silent):
        user, (_, where) = list(people.items())[silent[0]]
        raise DataError(
            f"{where}: device '{user}' has no examples, all its lines are without words: fill"
            " 'text' or remove the user"
        )
    return rows.user.astype(np.int64)


def _numbered(keys: NDArray[np.uint64], fraction: float) -> tuple[NDArray[np.int64], int]:
    """(devices,) number of each device, the training devices first, and how many those are."""
    devices = len(keys)
    out = min(max(round(fraction * devices), 1), devices - 1) if fraction > 0 else 0
    held_out = np.zeros(devices, dtype=bool)
    held_out[np.argsort(keys, kind="stable")[:out]] = True
    number = np.empty(devices, dtype=np.int64)
    number[np.argsort(held_out, kind="stable")] = np.arange(devices)
    return number, devices - out


def _facts(
    paths: list[Path], test_paths: list[Path], rows: Rows, labels: str | Path | None
) -> dict[str, Any]:
    from_data = "the data, and treated as public" if labels is None else f"{labels}: public"
    return {
        "source": ", ".join(map(str, paths)),
        "test": ", ".join(map(str, test_paths)) or None,
        "lines_without_words": rows.empty,
        "labels_from": from_data if rows.intent is not None else "none",
    }


def _check(users: str, held_out_fraction: float, most: int) -> None:
    if users not in ("auto", "natural", "assigned"):
        raise ConfigError(
            f"users={users} does not exist: set population.users to auto, natural or assigned"
        )
    if not 0 <= held_out_fraction < 1:
        raise ConfigError(
            f"held_out_fraction={held_out_fraction} must be at least 0 and below 1:"
            " set population.held_out_fraction"
        )
    if most < 1:
        raise ConfigError(
            f"max_held_out_examples={most} must be at least 1:"
            " set population.max_held_out_examples"
        )
