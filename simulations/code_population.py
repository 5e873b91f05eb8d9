"""A population with devices more that say code canaries, so that a run's audit can look for them.

    sottovoce simulate audit.codes=8 audit.code_copies=100

Each canary has a device of its own, after all others: it holds one sentence, `copies` times. The
devices are sampled, clipped and noised as any other, and are counted in the ledger as they are.
Nothing here is part of what an audit compares for membership: `natural` is without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.privacy.audit.code_canaries import (
    MOST_COPIES,
    CodeCanary,
    canary_examples,
    draw_canaries,
    joined,
    save_canaries,
    with_words,
)
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels

CODES_FILE = "code_canaries.json"
_PURPOSE = 0xC0DE5  # keeps these draws apart from others of the same seed

Ids = NDArray[np.int64]


class CodePopulation(Population):
    """`base`, and after its training devices one device for each of `canaries`.

    `copies`: examples that each of them holds. `words`: the word table, that of `base` and what the
    canaries' sentences add to it. Raises ConfigError for impossible sizes.
    """

    def __init__(
        self,
        base: Population,
        canaries: Sequence[CodeCanary],
        copies: int,
        words: Sequence[str] | None = None,
    ) -> None:
        if not 1 <= copies <= MOST_COPIES:
            raise ConfigError(f"audit.code_copies={copies} must be between 1 and {MOST_COPIES}")
        self.base, self.canaries, self.copies = base, tuple(canaries), copies
        self.words = with_words(base.words, canaries) if words is None else words
        self.name, self.schema, self.held_out = base.name, base.schema, base.held_out
        self.public_words = base.public_words
        said = np.full(len(self.canaries), copies, dtype=np.min_scalar_type(copies))
        self.activity = base.activity
        if self.canaries:
            self.activity = np.concatenate([base.activity, said])
            self._said = canary_examples(self.canaries, self.words, self.schema, copies=1)

    @property
    def devices(self) -> slice:
        """Ids of the canaries' devices."""
        return slice(len(self.base), len(self.base) + len(self.canaries))

    @property
    def natural(self) -> CodePopulation:
        """The population without the canaries' devices; its words are still those of the run."""
        return CodePopulation(self.base, (), self.copies, self.words)

    def examples(self, devices: Ids, indices: Sequence[Ids] | None = None) -> Examples:
        """Examples of training devices: all, or numbers `indices[k]` of `devices[k]`.

        Raises IndexError for an unknown device or example number.
        """
        devices = np.asarray(devices, dtype=np.int64)
        if len(devices) and not 0 <= devices.min() <= devices.max() < len(self):
            raise IndexError(f"a device is not among the {len(self)} training devices")
        added = devices >= len(self.base)
        if not added.any():
            return self.base.examples(devices, indices)
        natural, codes = np.flatnonzero(~added), np.flatnonzero(added)
        theirs = None if indices is None else [indices[k] for k in natural.tolist()]
        of_codes = None if indices is None else [indices[k] for k in codes.tolist()]
        both = joined([
            self.base.examples(devices[natural], theirs),
            self._sentences(devices[codes] - len(self.base), of_codes),
        ])
        return in_order(both, np.concatenate([natural, codes]))

    def held_out_devices(self, limit: int | None = None) -> Examples:
        return self.base.held_out_devices(limit)

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        return self.base.held_out_activity(limit)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        return self.base.held_out_examples(limit)

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        """Those of the base, and the canaries' devices, whose number and activity are settings."""
        known = self.base.expected_level_counts()
        if known is None or not self.canaries:
            return known
        counts = np.zeros(max(len(known), MAX_LEVEL + 1))
        counts[: len(known)] = known
        levels = activity_levels(self.activity[len(self.base) :])
        return counts + np.bincount(levels, minlength=len(counts))

    def describe(self) -> dict[str, Any]:
        facts = self.base.describe()
        if not self.canaries:
            return facts
        return facts | {
            "devices": len(self),
            "code_canaries": f"{len(self.canaries)} of the devices say one invented code each,"
            f" {self.copies} times: for the audit",
        }

    def _sentences(self, numbers: Ids, indices: Sequence[Ids] | None) -> Examples:
        """The sentence of each canary device, as often as it is asked for."""
        counts = np.full(len(numbers), self.copies, dtype=np.int64)
        if indices is not None:
            counts = np.array([len(asked) for asked in indices], dtype=np.int64)
            wanted = np.concatenate([np.empty(0, dtype=np.int64), *indices])
            if np.any((wanted < 0) | (wanted >= self.copies)):
                raise IndexError("an example number is beyond its device's activity")
        taken = self._said.take(np.repeat(numbers, counts))
        offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
        return Examples(taken.tokens, taken.offsets, offsets, taken.intent, taken.slots)


def in_order(examples: Examples, places: Ids) -> Examples:
    """`examples` with device k at `places[k]`: a permutation."""
    order = np.argsort(places, kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return examples
    sizes = np.diff(examples.device_offsets)
    starts = examples.device_offsets[:-1]
    rows = np.concatenate([np.arange(starts[k], starts[k] + sizes[k]) for k in order])
    taken = examples.take(rows.astype(np.int64))
    offsets = np.append(0, np.cumsum(sizes[order])).astype(np.int64)
    return Examples(taken.tokens, taken.offsets, offsets, taken.intent, taken.slots)


def with_codes(population: Population, settings: Mapping[str, Any] | None) -> Population:
    """`population` with the code canaries that the group `audit` asks for; as it is without any.

    The same settings give the same codes in every process. Raises ConfigError for impossible sizes.
    """
    count = 0 if settings is None else settings.get("codes", 0)
    if settings is None or not count:
        return population
    generator = np.random.default_rng([settings.get("seed") or 0, _PURPOSE])
    try:
        drawn = draw_canaries(count, generator=generator, schema=population.schema)
    except ConfigError as error:
        raise ConfigError(f"audit.codes={count}: {error}") from None
    return CodePopulation(population, drawn, settings["code_copies"])


def codes_in(population: Population) -> CodePopulation | None:
    """The layer of `population` that holds its code canaries, None where it has none."""
    layer: Population | None = population
    while layer is not None and not isinstance(layer, CodePopulation):
        layer = getattr(layer, "base", None)
    return layer if layer is not None and layer.canaries else None


def devices_of_the_source(population: Population) -> int:
    """How many devices are not an audit's own: the first ones."""
    base: Population | None = getattr(population, "base", None)
    return len(population) if base is None else devices_of_the_source(base)


def without_codes(population: Population) -> Population:
    """`population` without the devices of code canaries; words and other canaries stay."""
    codes = codes_in(population)
    if codes is None:
        return population
    if isinstance(population, CodePopulation):
        return population.natural
    found: Any = copy(population)
    found.base = without_codes(found.base)
    found.activity = np.delete(population.activity, codes.devices)
    return cast(Population, found)


def keep_codes(population: Population, folder: Path) -> None:
    """Write the codes of `population` to `folder`, readable by the owner alone, where it has any.

    Whoever reads the file (or the settings that drew them) knows the codes: the auditor may.
    """
    codes = codes_in(population)
    if codes is not None:
        path = folder / CODES_FILE
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        save_canaries(path, codes.canaries)
