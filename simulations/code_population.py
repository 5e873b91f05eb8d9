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
    save_canaries,
    with_words,
)
from sottovoce.simulations.population import Population
from sottovoce.simulations.population_layers import AddedDevices

CODES_FILE = "code_canaries.json"
_PURPOSE = 0xC0DE5  # keeps these draws apart from others of the same seed

Ids = NDArray[np.int64]


class CodePopulation(AddedDevices):
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
        super().__init__(base, len(canaries), copies)
        self.canaries, self.copies = tuple(canaries), copies
        self.words = with_words(base.words, canaries) if words is None else words
        if self.canaries:
            self._said = canary_examples(self.canaries, self.words, self.schema, copies=1)

    @property
    def devices(self) -> slice:
        """Ids of the canaries' devices."""
        return slice(len(self.base), len(self.base) + len(self.canaries))

    @property
    def natural(self) -> CodePopulation:
        """The population without the canaries' devices; its words are still those of the run."""
        return CodePopulation(self.base, (), self.copies, self.words)

    def say(self, added: Ids, indices: Sequence[Ids]) -> Examples:
        """The sentence of each canary device, as often as it is asked for."""
        counts = np.array([len(asked) for asked in indices], dtype=np.int64)
        taken = self._said.take(np.repeat(added, counts))
        offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
        return Examples(taken.tokens, taken.offsets, offsets, taken.intent, taken.slots)

    def describe(self) -> dict[str, Any]:
        facts = self.base.describe()
        if not self.canaries:
            return facts
        return facts | {
            "devices": len(self),
            "code_canaries": f"{len(self.canaries)} of the devices say one invented code each,"
            f" {self.copies} times: for the audit",
        }

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
