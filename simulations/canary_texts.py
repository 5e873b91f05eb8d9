"""What canaries hold: a function of the seed and of the examples that they take the place of.

Natural ones are those examples; they tell little, as what is like other data needs no memory.
Mislabelled ones have a wrong intent and a wrong tag for every word (for next_word: the words of all
candidates, shuffled). Unique tokens are words that nobody else uses, under labels drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples, Schema
from sottovoce.client.vocabulary import UNK, FileVocabulary, GrammarVocabulary, Vocabulary
from sottovoce.simulations.hashing import draws, integers_below, stream

KINDS = ("natural", "mislabelled", "unique_token")
_TRIES = 64  # invented words for each one that is wanted, before giving up


def mislabelled(originals: Examples, schema: Schema, seed: int) -> Examples:
    """The originals with no label right. ConfigError where there are no two labels."""
    if originals.intent is None or len(schema.intents) < 2:
        raise ConfigError(
            "audit.canaries=mislabelled needs two intents at least: choose unique_token"
        )
    intent = _another(originals.intent, len(schema.intents), seed, "wrong intents")
    slots = originals.slots
    if slots is not None and len(schema.slots) > 1:
        slots = _another(slots, len(schema.slots), seed, "wrong tags")
    return replace(originals, intent=intent, slots=slots)


def shuffled(originals: Examples, seed: int) -> Examples:
    """Texts as long as the originals, of all their words in random order."""
    keys = draws(stream(seed, "shuffled words"), np.arange(len(originals.tokens)))
    return replace(originals, tokens=originals.tokens[np.argsort(keys, kind="stable")])


def unique_tokens(
    originals: Examples, schema: Schema, seed: int, words: NDArray[np.int32]
) -> Examples:
    """Texts of two `words` each, no two texts alike, with random labels.

    `words`: places in the word table. Where there are as many as texts, each has one to itself.
    """
    count = len(originals)
    first = np.arange(count) % len(words)
    second = (first + np.arange(count) // len(words)) % len(words)
    tokens = np.stack([words[first], words[second]], axis=1).ravel().astype(np.int32)
    intent = slots = None
    if originals.intent is not None:
        intent = _any(count, len(schema.intents), seed, "random intents")
    if originals.slots is not None:
        slots = _any(len(tokens), len(schema.slots), seed, "random tags")
    return replace(
        originals, tokens=tokens, offsets=np.arange(0, 2 * count + 1, 2, dtype=np.int64),
        intent=intent, slots=slots,
    )


def unused_words(
    vocabulary: Vocabulary, words: Sequence[str], wanted: int
) -> tuple[list[str], Vocabulary]:
    """Words whose ids nobody's words have, `wanted` at most, and the vocabulary that knows them.

    A grammar's vocabulary grows by them. ConfigError where pairs of them are too few.
    """
    if isinstance(vocabulary, GrammarVocabulary):
        known = {word.lower() for word in words}
        new = [word for word in map(_invented, range(wanted + len(known))) if word not in known]
        return new[:wanted], GrammarVocabulary([*words, *new[:wanted]])
    used = {UNK, *vocabulary.ids(words).ids.tolist()}
    found: list[str] = []
    for word in _proposed(vocabulary, wanted):
        pieces = vocabulary.pieces(word)
        if len(pieces) == 1 and pieces[0] not in used:
            used.add(pieces[0])
            found.append(word)
        if len(found) == wanted:
            break
    if len(found) ** 2 < wanted:
        raise ConfigError(
            f"audit.canaries=unique_token finds only {len(found)} words that nobody uses in the "
            f"vocabulary ({vocabulary.description}): raise task.vocabulary.buckets, or choose "
            "mislabelled"
        )
    return found, vocabulary


def _proposed(vocabulary: Vocabulary, wanted: int) -> Sequence[str]:
    """Words that may be nobody's: a file's own, or invented ones."""
    if isinstance(vocabulary, FileVocabulary):
        return vocabulary.entries
    return [_invented(place) for place in range(_TRIES * wanted)]


def _invented(place: int) -> str:
    return f"canary{place}"


def _another(labels: NDArray[np.int32], classes: int, seed: int, purpose: str) -> NDArray[np.int32]:
    """For each label another one, uniformly."""
    step, _ = integers_below(draws(stream(seed, purpose), np.arange(len(labels))), classes - 1)
    return ((labels + 1 + step) % classes).astype(np.int32)


def _any(count: int, classes: int, seed: int, purpose: str) -> NDArray[np.int32]:
    found, _ = integers_below(draws(stream(seed, purpose), np.arange(count)), max(1, classes))
    return found.astype(np.int32)
