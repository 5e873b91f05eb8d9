"""A population with canaries in it: examples that an audit looks for afterwards.

Nothing is stored: who is a candidate, what each one holds and whether it is in follow from the
seed, which `config.yaml` keeps. Held-out devices and examples are those of the population beneath.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.client.vocabulary import Vocabulary
from sottovoce.simulations.canary_slots import Slots, choose_slots
from sottovoce.simulations.canary_texts import (
    mislabelled,
    shuffled,
    unique_tokens,
    unused_words,
)
from sottovoce.simulations.code_population import devices_of_the_source
from sottovoce.simulations.population import Population
from sottovoce.simulations.population_layers import PopulationLayer

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Held:
    """What a device with candidates holds: numbers of the population's, or a candidate's place.

    `numbers`: (examples,) of the population beneath, any where a candidate stands. `candidate`:
    (examples,) place of the candidate that stands there, -1 where none does.
    """

    numbers: Ints
    candidate: Ints


class CanaryPopulation(PopulationLayer):
    """`base` with the candidates whose coin fell so, in the place of the examples at `slots`.

    `texts`: the candidates' examples, in the order of the slots; None where they are those at the
    slots. `words`: that texts need beyond those of `base`. A device that gave up examples has as
    many fewer, and one more for each candidate that is in. A candidate without an example at its
    slot comes after its device's.
    """

    def __init__(
        self,
        base: Population,
        slots: Slots,
        kind: str,
        texts: Examples | None,
        words: Sequence[str] = (),
    ) -> None:
        super().__init__(base)
        self.slots, self.kind, self._texts = slots, kind, texts
        self.words = [*base.words, *words] if words else base.words
        self.activity = np.array(base.activity)
        after = slots.numbers >= base.activity[slots.devices]
        np.add.at(self.activity, slots.devices[after & slots.coins], 1)
        np.subtract.at(self.activity, slots.devices[~after & ~slots.coins], 1)
        self._held = {int(d): self._holding(int(d)) for d in np.unique(slots.devices)}

    def examples(
        self, devices: Ints, indices: Sequence[Ints] | None = None
    ) -> Examples:
        """Training examples, canaries in their places. IndexError for an unknown number."""
        devices = np.asarray(devices, dtype=np.int64)
        touched = np.flatnonzero(np.isin(devices, self.slots.devices)).tolist()
        if not touched:
            return self.base.examples(devices, indices)
        if indices is None:
            indices = [np.arange(n, dtype=np.int64) for n in self.activity[devices]]
        numbers, place = list(indices), [np.full(len(n), -1, np.int64) for n in indices]
        for k in touched:
            held, own = self._held[int(devices[k])], np.asarray(indices[k], np.int64)
            if len(own) and not 0 <= own.min() <= own.max() < len(held.numbers):
                raise IndexError("an example number is beyond its device's activity")
            numbers[k], place[k] = held.numbers[own], held.candidate[own]
        found = self.base.examples(devices, numbers)
        return found if self._texts is None else _spliced(
            found, self._texts, np.concatenate(place)
        )

    def candidates(self) -> Examples:
        """Every candidate, in or out, in the order of the slots, as one device's examples."""
        return _at(self.base, self.slots) if self._texts is None else self._texts

    def others(self, devices: Ints) -> Examples:
        """Examples of training devices without any candidate, nor what one took the place of."""
        kept = [np.arange(n, dtype=np.int64) for n in self.base.activity[devices]]
        for k, device in enumerate(devices.tolist()):
            if device in self._held:
                given = self.slots.numbers[self.slots.devices == device]
                kept[k] = np.setdiff1d(kept[k], given)
        return self.base.examples(devices, kept)

    def describe(self) -> dict[str, Any]:
        """What the report says: the population's own facts, and what was inserted.

        How many candidates are in is not said.
        """
        said = f"{len(self.slots)} {self.kind} candidates, each in by a fair coin"
        return {**self.base.describe(), "canaries": said}

    def _holding(self, device: int) -> _Held:
        mine = np.flatnonzero(self.slots.devices == device)
        size, places = int(self.base.activity[device]), self.slots.numbers[mine]
        numbers = np.arange(max(size, int(places.max()) + 1), dtype=np.int64)
        candidate = np.full(len(numbers), -1, dtype=np.int64)
        candidate[places] = mine
        absent = places[~self.slots.coins[mine]]
        return _Held(np.delete(numbers, absent) % size, np.delete(candidate, absent))


def with_canaries(
    population: Population, vocabulary: Vocabulary, config: DictConfig
) -> tuple[Population, Vocabulary]:
    """The population with the canaries that `config.audit` asks for, and its vocabulary.

    Raises ConfigError where it has no room for them, or they cannot be made.
    """
    settings = config.get("audit")
    if settings is None or settings.canaries == "none":
        return population, vocabulary
    if settings.seed is None:
        raise ConfigError("audit.seed is missing: set it, as `sottovoce simulate` does")
    natural = devices_of_the_source(population)  # those that an audit adds give nothing up
    slots = choose_slots(
        population.activity[:natural], settings.number, settings.seed,
        append=settings.canaries != "natural",
    )
    texts: Examples | None = None
    words: list[str] = []
    kind = settings.canaries
    if kind == "unique_token":
        words, vocabulary = unused_words(vocabulary, population.words, len(slots))
        places = np.arange(len(words), dtype=np.int32) + len(population.words)
        texts = unique_tokens(_at(population, slots), population.schema, slots.seed, places)
    elif kind == "mislabelled" and config.task.name == "next_word":
        texts = shuffled(_at(population, slots), slots.seed)
    elif kind == "mislabelled":
        texts = mislabelled(_at(population, slots), population.schema, slots.seed)
    return CanaryPopulation(population, slots, kind, texts, words), vocabulary


def canaries_in(population: Population) -> CanaryPopulation | None:
    """The population with example canaries that `population` is, or None."""
    return population if isinstance(population, CanaryPopulation) else None


def _at(population: Population, slots: Slots) -> Examples:
    """The examples at the slots, as one device's; after a device's last its first, and so on."""
    devices, starts = np.unique(slots.devices, return_index=True)
    numbers = slots.numbers % population.activity[slots.devices].astype(np.int64)
    found = population.examples(devices, np.split(numbers, starts[1:]))
    return replace(found, device_offsets=np.array([0, len(slots)], dtype=np.int64))


def _spliced(examples: Examples, texts: Examples, place: Ints) -> Examples:
    """The examples, row k replaced by row `place[k]` of the texts where that is 0 or more."""
    if (place < 0).all():
        return examples
    both = Examples(
        tokens=np.concatenate([examples.tokens, texts.tokens]),
        offsets=np.concatenate([examples.offsets, texts.offsets[1:] + examples.offsets[-1]]),
        device_offsets=np.array([0, len(examples) + len(texts)], dtype=np.int64),
        intent=_joined(examples.intent, texts.intent),
        slots=_joined(examples.slots, texts.slots),
    )
    rows = np.where(place < 0, np.arange(len(examples)), len(examples) + place)
    return replace(both.take(rows), device_offsets=examples.device_offsets)


def _joined(
    first: NDArray[np.int32] | None, second: NDArray[np.int32] | None
) -> NDArray[np.int32] | None:
    return None if first is None or second is None else np.concatenate([first, second])
