"""The population of a corpus: real examples of real users, or of devices that we assigned.

With user ids a device is a person (`users=natural`). Without, examples are dealt out to invented
devices (`users=assigned`, see `partition`), which makes a skewed population but no real unit of
privacy. Examples are gathered from flat arrays sorted by device, in memory or mapped from an index;
a population of an index is pickled as the index's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples, Schema
from sottovoce.simulations.corpus import Corpus, CorpusSettings
from sottovoce.simulations.jsonl_labels import label_numbers, label_sets
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels

RELEASE_AFTER = 256  # devices gathered, each of which maps a few pages into this process


@dataclass(frozen=True)
class View:
    """What does not change a corpus, only how it is called and shown."""

    name: str
    settings: CorpusSettings
    labels: str | None = None
    max_held_out_examples: int = 100


class CorpusPopulation(Population):
    """Devices of a corpus, under the public label sets `schema`.

    `index`: the folder of the corpus' index, None in memory.
    """

    def __init__(self, corpus: Corpus, view: View, schema: Schema | None = None) -> None:
        if schema is None:
            schema = label_sets(corpus.intents, corpus.tags, view.labels)
        self.name, self.schema = view.name, schema
        self.public_words = False
        self.words = corpus.words
        self.natural = corpus.natural
        self.activity, self.held_out = corpus.activity, corpus.held_out
        self.max_held_out_examples = view.max_held_out_examples
        self.index = corpus.folder
        self._corpus, self._view, self._gathered = corpus, view, 0
        self._intents = label_numbers(corpus.intents, schema.intents)
        self._tags = label_numbers(corpus.tags, schema.slots)

    def __reduce__(self) -> tuple[Callable[..., CorpusPopulation], tuple[Any, ...]]:
        corpus: Corpus | Path = self.index or self._corpus
        return _restored, (type(self), corpus, self._view, self.schema)

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
        available = self.activity[devices].astype(np.int64)
        if indices is None:
            return self._first(devices, available)
        counts = np.array([len(numbers) for numbers in indices], dtype=np.int64)
        numbers = np.concatenate([np.empty(0, dtype=np.int64), *indices])
        if np.any((numbers < 0) | (numbers >= np.repeat(available, counts))):
            raise IndexError("an example number is beyond its device's activity")
        return self._gather(devices, counts, numbers)

    def expect(self, devices: NDArray[np.int64]) -> None:
        """Have the examples of `devices` read from disk meanwhile, where they lie there."""
        self._corpus.expect(np.asarray(devices, dtype=np.int64))

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """The first examples (`max_held_out_examples` at most) of devices that never train."""
        sizes = self.held_out_activity(limit).astype(np.int64)
        devices = np.arange(len(self), len(self) + len(sizes), dtype=np.int64)
        return self._first(devices, np.minimum(sizes, self.max_held_out_examples))

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples that each held-out device has, evaluated or not."""
        count = self.held_out if limit is None else min(limit, self.held_out)
        bounds = self._corpus.train.device_offsets[len(self) : len(self) + count + 1]
        return np.diff(bounds).astype(np.uint32)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """(At most `limit`) examples of the test files, in random order, one device each.

        Those of held-out users are left out. None without test files.
        """
        test = self._corpus.test
        if test is None:
            return None
        count = len(test) if limit is None else min(limit, len(test))
        taken = test.take(np.arange(count, dtype=np.int64))
        return self._labelled(replace(taken, device_offsets=np.arange(count + 1, dtype=np.int64)))

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
        settings, train = self._view.settings, self._corpus.train
        unit, activity = "one device is one user of the data", "as in the data"
        if not self.natural:
            unit = "one device is an invented group of examples: no person's privacy is claimed"
            activity = (
                f"assigned by us: label-Dirichlet(alpha={settings.alpha:g}) x log-normal"
                f" (mu={settings.mu:g} sigma={settings.sigma:g}), scaled to the number of examples"
            )
        labels = self._view.labels
        labels_from = f"{labels}: public" if labels else "the data, and treated as public"
        return {
            "unit": unit,
            "devices": len(self),
            "held_out_devices": self.held_out,
            "activity": activity,
            "activity_is_public": not self.natural,
            "examples": int(self.activity.sum(dtype=np.int64)),
            "words": len(self.words),
            "words_from": "the data: private, never released by the population",
            "intents": len(self.schema.intents),
            "slots": len({tag[2:] for tag in self.schema.slots[1:]}),
            "source": ", ".join(map(str, settings.paths)),
            "test": ", ".join(map(str, settings.test_paths)) or None,
            "lines_without_words": self._corpus.empty,
            "labels_from": labels_from if train.intent is not None else "none",
            "seed": settings.seed,
        }

    def _first(self, devices: NDArray[np.int64], counts: NDArray[np.int64]) -> Examples:
        """The first `counts[k]` examples of each device, held-out devices included."""
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._gather(devices, counts, numbers)

    def _gather(
        self, devices: NDArray[np.int64], counts: NDArray[np.int64], numbers: NDArray[np.int64]
    ) -> Examples:
        train = self._corpus.train
        taken = train.take(np.repeat(train.device_offsets[devices], counts) + numbers)
        offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
        self._gathered += len(devices)
        if self._gathered >= RELEASE_AFTER:
            self._corpus.release()
            self._gathered = 0
        return self._labelled(replace(taken, device_offsets=offsets))

    def _labelled(self, examples: Examples) -> Examples:
        """The examples with their labels numbered as in the schema."""
        return replace(
            examples,
            intent=None if examples.intent is None else self._intents[examples.intent],
            slots=None if examples.slots is None else self._tags[examples.slots],
        )


def checked_settings(
    path: str | Path | Sequence[str | Path],
    test_path: str | Path | Sequence[str | Path] | None,
    columns: tuple[tuple[str, str], ...] | None,
    max_held_out_examples: int,
    **others: Any,
) -> CorpusSettings:
    """The settings of a corpus. Raises ConfigError for impossible ones."""
    paths, test_paths = _paths(path), _paths(test_path)
    if not paths:
        raise ConfigError("population.path is empty: set it to a JSONL file")
    settings = CorpusSettings(paths, test_paths, columns, **others)
    if settings.users not in ("auto", "natural", "assigned"):
        raise ConfigError(
            f"users={settings.users} does not exist: set population.users to auto, natural or"
            " assigned"
        )
    if not 0 <= settings.held_out_fraction < 1:
        raise ConfigError(
            f"held_out_fraction={settings.held_out_fraction} must be at least 0 and below 1:"
            " set population.held_out_fraction"
        )
    if max_held_out_examples < 1:
        raise ConfigError(
            f"max_held_out_examples={max_held_out_examples} must be at least 1:"
            " set population.max_held_out_examples"
        )
    return settings


def _paths(path: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    parts = path.split(",") if isinstance(path, str) else [path] if isinstance(path, Path) else path
    return tuple(Path(str(part).strip()) for part in parts if str(part).strip())


def _restored(
    kind: type[CorpusPopulation], corpus: Corpus | Path, view: View, schema: Schema
) -> CorpusPopulation:
    if isinstance(corpus, Path):
        from sottovoce.simulations.corpus_index import open_corpus

        corpus = open_corpus(corpus)
    population = kind.__new__(kind)
    CorpusPopulation.__init__(population, corpus, view, schema)
    return population
