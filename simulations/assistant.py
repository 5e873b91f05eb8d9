"""The generated population: people who talk to a voice assistant, as many as you like.

A device is a person with habits: which intents it uses (a Dirichlet draw over intents), which
phrasings, and whom it calls, which rooms, songs and playlists it has (a few favourites of each
kind). Example j of device d is a pure function of (seed, d, j) through counter-based hashes:
nothing is stored, and a device sampled again says the same. A cohort is expanded by numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples, gather_ranges
from sottovoce.simulations.activity import activity_model
from sottovoce.simulations.grammar import assistant_grammar
from sottovoce.simulations.hashing import Bits, draws, integers_below, stream, uniforms
from sottovoce.simulations.population import Population

FAVOURITES = 4  # a device's own values of each slot, and its own phrasings of each intent
WATCHED_DEVICES = 2000  # training devices whose further examples are held out
WATCHED_EXAMPLES = 5  # held-out examples of each


@dataclass
class AssistantConfig:
    """Settings of the generated population (`population=assistant`)."""

    name: str = "assistant"
    devices: int = 1_000_000
    held_out_devices: int = 2_000
    max_examples_per_round: int = 32
    seed: int = 0
    preset: str = "assistant"
    mu: float | None = None
    sigma: float | None = None
    max_activity: int = 10_000
    intent_concentration: float = 0.5  # Dirichlet parameter of a device's intents
    habit_rate: float = 0.6  # share of choices that fall on the device's own favourites
    mishearing_rate: float = 0.01  # share of confusable words heard as another
    max_held_out_examples: int = 20  # evaluated examples of one held-out device


class AssistantPopulation(Population):
    """`devices` training devices, ids 0.., and `held_out_devices` with the ids after them."""

    def __init__(
        self,
        devices: int = 1_000_000,
        held_out_devices: int = 2_000,
        seed: int = 0,
        *,
        preset: str = "assistant",
        mu: float | None = None,
        sigma: float | None = None,
        max_activity: int = 10_000,
        intent_concentration: float = 0.5,
        habit_rate: float = 0.6,
        mishearing_rate: float = 0.01,
        max_held_out_examples: int = 20,
    ) -> None:
        """Raise ConfigError for an impossible setting. 10 million devices take about 0.3 s."""
        _check(devices, held_out_devices, intent_concentration, max_held_out_examples)
        _check_rate("habit_rate", habit_rate)
        _check_rate("mishearing_rate", mishearing_rate)
        self.name = "assistant"
        self.grammar = assistant_grammar()
        self.words = self.grammar.words
        self.schema = self.grammar.schema
        self.public_words = True
        self.seed = seed
        self.held_out = held_out_devices
        self.habit_rate = habit_rate
        self.mishearing_rate = mishearing_rate
        self.intent_concentration = intent_concentration
        self.max_held_out_examples = max_held_out_examples
        self.preset = preset
        self.model = activity_model(preset, mu, sigma, max_activity)
        self.activity = self.model.of(0, devices, seed)
        share = (np.arange(1 << 16) + 0.5) / (1 << 16)
        self._gammas = gammaincinv(intent_concentration, share)  # quantiles, picked by 16 bits

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
            return self._first_examples(devices, available)
        counts = np.array([len(numbers) for numbers in indices], dtype=np.int64)
        numbers = np.concatenate([np.empty(0, dtype=np.int64), *indices])
        if np.any((numbers < 0) | (numbers >= np.repeat(available, counts))):
            raise IndexError("an example number is beyond its device's activity")
        return self.generate(devices, counts, numbers)

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """The first examples (`max_held_out_examples` at most) of devices that never train."""
        activity = self.held_out_activity(limit).astype(np.int64)
        devices = np.arange(len(self), len(self) + len(activity), dtype=np.int64)
        return self._first_examples(devices, np.minimum(activity, self.max_held_out_examples))

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples of each held-out device, by the same model as the training ones'."""
        count = self.held_out if limit is None else min(limit, self.held_out)
        return self.model.of(len(self), count, self.seed)

    def held_out_examples(self, limit: int | None = None) -> Examples:
        """(At most `limit`) examples beyond their activity, of training devices chosen by hash."""
        devices = self.watched()
        further = np.arange(WATCHED_EXAMPLES, dtype=np.int64)
        numbers = (self.activity[devices].astype(np.int64)[:, None] + further).ravel()[:limit]
        counts = np.bincount(np.arange(len(numbers)) // WATCHED_EXAMPLES)
        return self.generate(devices[: len(counts)], counts, numbers)

    def watched(self) -> NDArray[np.int64]:
        """Training devices, chosen by hash, of which further examples are held out; sorted."""
        if len(self) <= WATCHED_DEVICES:
            return np.arange(len(self), dtype=np.int64)
        chosen = draws(stream(self.seed, "watched"), np.arange(WATCHED_DEVICES))
        return np.unique(integers_below(chosen, len(self))[0])

    def expected_level_counts(self) -> NDArray[np.float64]:
        """(levels,) expected training devices per activity level, from the public model."""
        return self.model.expected_level_counts(len(self))

    def describe(self) -> dict[str, Any]:
        """What the report says of this population."""
        return {
            "source": "generated requests to a voice assistant (Sottovoce's own grammar)",
            "unit": "one device is one simulated person",
            "devices": len(self),
            "held_out_devices": self.held_out,
            "activity": f"log-normal, mu={self.model.mu:g} sigma={self.model.sigma:g}"
            f" (preset {self.preset}), n >= 1, at most {self.model.max_activity}",
            "activity_is_public": True,
            "examples": int(self.activity.sum(dtype=np.int64)),
            "words": len(self.words),
            "words_from": "the grammar: public",
            "intents": len(self.schema.intents),
            "slots": len({tag[2:] for tag in self.schema.slots[1:]}),
            "labels_from": "the grammar: public",
            "habits": f"intents Dirichlet({self.intent_concentration:g}),"
            f" {self.habit_rate:.0%} of choices from {FAVOURITES} favourites",
            "seed": self.seed,
            "licence": "Apache-2.0",
        }

    def _first_examples(
        self, devices: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> Examples:
        starts = np.cumsum(counts) - counts
        numbers = np.arange(counts.sum()) - np.repeat(starts, counts)
        return self.generate(devices, counts, numbers)

    def generate(
        self,
        devices: NDArray[np.int64],
        counts: NDArray[np.int64],
        numbers: NDArray[np.int64],
        trend: NDArray[np.float64] | None = None,
    ) -> Examples:
        """Examples `numbers`, `counts[k]` of them of `devices[k]`, whatever the activity.

        `trend`: (devices, intents) by which the intents' preferences are multiplied, if at all.
        """
        habits = draws(stream(self.seed, "habits"), devices)
        owner = np.repeat(np.arange(len(devices)), counts)
        said = draws(draws(stream(self.seed, "requests"), devices)[owner], numbers)
        intent = self._intents(habits, owner, said, trend)
        element_lists, element_offsets = self._elements(intent, habits[owner], said)
        phrase = self._phrases(element_lists, element_offsets, habits[owner], said)
        positions, token_offsets = gather_ranges(self.grammar.phrase_offsets, phrase)
        offsets = token_offsets[element_offsets]
        return Examples(
            tokens=self._heard(self.grammar.phrase_tokens[positions], offsets, said),
            offsets=offsets,
            device_offsets=np.append(0, np.cumsum(counts)).astype(np.int64),
            intent=intent.astype(np.int32),
            slots=self.grammar.phrase_slots[positions],
        )

    def _intents(
        self,
        habits: Bits,
        owner: NDArray[np.int64],
        said: Bits,
        trend: NDArray[np.float64] | None,
    ) -> NDArray[np.int64]:
        """(examples,) intent of each, from its device's Dirichlet preferences."""
        intents = len(self.schema.intents)
        words = draws(draws(habits, 0)[:, None], np.arange(-(-intents // 4)))
        picks = words.astype("<u8").view("<u2")[:, :intents]
        gammas = self._gammas[picks]
        ceilings = np.cumsum(gammas if trend is None else gammas * trend, axis=1)
        ceilings /= ceilings[:, -1:]
        ceilings += np.arange(len(habits))[:, None]
        place = np.searchsorted(ceilings.ravel(), owner + uniforms(draws(said, 0)), side="right")
        chosen: NDArray[np.int64] = np.clip(place - owner * intents, 0, intents - 1)
        return chosen

    def _elements(
        self, intent: NDArray[np.int64], habits: Bits, said: Bits
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lists that make up each example, flat, and their (examples + 1,) offsets."""
        bits = self._by_habit(draws(said, 1), habits, intent)
        template, bits = _member(self.grammar.intent_offsets, intent, bits)
        variant, _ = _member(self.grammar.template_offsets, template, bits)
        positions, offsets = gather_ranges(self.grammar.variant_offsets, variant)
        return self.grammar.elements[positions], offsets

    def _phrases(
        self,
        lists: NDArray[np.int64],
        offsets: NDArray[np.int64],
        habits: Bits,
        said: Bits,
    ) -> NDArray[np.int64]:
        """(elements,) the phrase said for each element."""
        row = np.repeat(np.arange(len(said)), np.diff(offsets))
        place = np.arange(len(lists)) - offsets[row]
        kinds = lists + len(self.schema.intents)
        bits = self._by_habit(draws(said[row], place + 2), habits[row], kinds)
        pattern, bits = _member(self.grammar.list_offsets, lists, bits)
        return _member(self.grammar.pattern_offsets, pattern, bits)[0]

    def _by_habit(self, fresh: Bits, habits: Bits, kinds: NDArray[np.int64]) -> Bits:
        """`fresh` draws, a share of them replaced by one of the device's own for that kind.

        The low bits of a fresh draw decide; the upper 32, which choose, stay independent of them.
        """
        habitual = (fresh & np.uint64(0xFFFF)) < np.uint64(round(self.habit_rate * 0x10000))
        favourite = (fresh >> np.uint64(16)) % np.uint64(FAVOURITES)
        own = draws(habits, kinds * FAVOURITES + favourite.astype(np.int64) + 1)
        return np.where(habitual, own, fresh)

    def _heard(
        self, tokens: NDArray[np.int32], offsets: NDArray[np.int64], said: Bits
    ) -> NDArray[np.int32]:
        """The tokens with a few confusable words misheard."""
        confusable = np.flatnonzero(self.grammar.heard_as[tokens] != tokens)
        row = np.searchsorted(offsets, confusable, side="right") - 1
        bits = draws(said[row], confusable - offsets[row] + (1 << 20))
        misheard = confusable[uniforms(bits) < self.mishearing_rate]
        tokens[misheard] = self.grammar.heard_as[tokens[misheard]]
        return tokens


def _member(
    offsets: NDArray[np.int64], of: NDArray[np.int64], bits: Bits
) -> tuple[NDArray[np.int64], Bits]:
    """A uniform member of each range `of`, and the bits left."""
    starts = offsets[of]
    place, rest = integers_below(bits, offsets[of + 1] - starts)
    return starts + place, rest


def _check(devices: int, held_out: int, concentration: float, most: int) -> None:
    if devices < 1:
        raise ConfigError(f"devices={devices}: set population.devices to 1 or more")
    if held_out < 0:
        raise ConfigError(f"held_out_devices={held_out}: set population.held_out_devices >= 0")
    if not 0.02 <= concentration <= 1e6:
        raise ConfigError(
            f"intent_concentration={concentration} must lie between 0.02 and 1e6:"
            " set population.intent_concentration"
        )
    if most < 1:
        raise ConfigError(
            f"max_held_out_examples={most} must be at least 1:"
            " set population.max_held_out_examples"
        )


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ConfigError(f"{name}={rate} must lie between 0 and 1: set population.{name}")
