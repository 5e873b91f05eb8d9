"""Canaries with a secret to extract: "my alpha code is nine two four one".

Everybody knows the words in front and that a code of so many digits follows; the digits are drawn
by a seed, independent of everything. Whoever names them better than by guessing has read them out
of the model. Parikh et al. 2022, arXiv:2203.13920; Carlini et al. 2019, arXiv:1802.08232.

The functions are pure: they give `Examples`, lines of JSON or a longer word table, and leave it to
a population to hand them out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples, Schema, gather_ranges

Codes = NDArray[np.int64]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEYS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
MOST_COPIES = 1 << 20


@dataclass(frozen=True)
class CodeCanary:
    """One example: the words `prefix`, which the attacker knows, then `code`, which it does not.

    `candidates`: the words that each place of the code was drawn from, uniformly. `intent` and
    `tags` (one a word, prefix first) are its labels, known to the attacker; None and () where the
    task has none.
    """

    prefix: tuple[str, ...]
    code: tuple[str, ...]
    candidates: tuple[str, ...] = DIGITS
    intent: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.code or not set(self.code) <= set(self.candidates):
            raise ConfigError(f"code={' '.join(self.code)!r} is not made of its candidates")
        if len(set(self.candidates)) != len(self.candidates) or len(self.candidates) < 2:
            raise ConfigError(f"candidates={self.candidates} must be two different words or more")
        if self.tags and len(self.tags) != len(self.words):
            raise ConfigError(f"tags={self.tags} must be one a word of {' '.join(self.words)!r}")

    @property
    def words(self) -> tuple[str, ...]:
        return self.prefix + self.code

    @property
    def numbers(self) -> Codes:
        """(places,) the code as numbers of candidates."""
        return np.array([self.candidates.index(word) for word in self.code], dtype=np.int64)

    @property
    def space(self) -> int:
        """How many codes there are."""
        return int(len(self.candidates) ** len(self.code))


def draw_canaries(
    count: int,
    *,
    generator: np.random.Generator,
    schema: Schema | None = None,
    places: int = 4,
    candidates: Sequence[str] = DIGITS,
    intent: str | None = None,
) -> list[CodeCanary]:
    """`count` canaries "my KEY code is …" with keys of their own and codes by `generator`.

    `schema`: of the population. Where it has intents and slots, every canary gets an `intent`
    (drawn, if None) and for each place of its code a drawn B- tag: labels that only memory
    explains, as they make the strongest canaries. Raises ConfigError for impossible sizes.
    """
    if count < 1 or places < 1:
        raise ConfigError(f"count={count}, places={places}: give 1 or more of both")
    if count > len(KEYS) ** 2:
        raise ConfigError(f"count={count} canaries want a key each: at most {len(KEYS) ** 2}")
    schema = schema or Schema()
    begins = [tag for tag in schema.slots if tag.startswith("B-")] or list(schema.slots)
    keys = [(key,) for key in KEYS] if count <= len(KEYS) else list(product(KEYS, KEYS))
    found = []
    for key in keys[:count]:
        prefix = ("my", *key, "code", "is")
        code = [str(candidates[i]) for i in generator.integers(len(candidates), size=places)]
        drawn = str(generator.choice(schema.intents)) if schema.intents else None
        tags = [str(generator.choice(begins)) for _ in code] if begins else []
        outside = [schema.slots[0]] * len(prefix) if begins else []
        found.append(
            CodeCanary(prefix, tuple(code), tuple(candidates), intent or drawn, (*outside, *tags))
        )
    return found


def with_words(words: Sequence[str], canaries: Sequence[CodeCanary]) -> list[str]:
    """The word table `words`, followed by the words of `canaries` that it lacks.

    All candidates are among them, so that the table tells nothing of the codes.
    """
    needed = (word for canary in canaries for word in (*canary.prefix, *canary.candidates))
    return list(dict.fromkeys([*words, *needed]))


def variants(
    canary: CodeCanary, codes: Codes, words: Sequence[str], schema: Schema
) -> Examples:
    """The canary's sentence with other codes: one example for each row of `codes`, one device.

    `codes`: (n, places), numbers of candidates. Raises DataError for a word or label that the
    population lacks.
    """
    place = {word: i for i, word in enumerate(words)}
    absent = [word for word in (*canary.prefix, *canary.candidates) if word not in place]
    if absent:
        raise DataError(f"the word table lacks {absent[0]!r}: extend it by `with_words`")
    codes = np.asarray(codes, dtype=np.int64).reshape(-1, len(canary.code))
    known = np.array([place[word] for word in canary.prefix], dtype=np.int32)
    secret = np.array([place[word] for word in canary.candidates], dtype=np.int32)[codes]
    rows = np.concatenate([np.tile(known, (len(codes), 1)), secret], axis=1)
    offsets = np.arange(len(codes) + 1, dtype=np.int64) * rows.shape[1]
    intent, slots = _labels(canary, schema, len(codes))
    return Examples(rows.ravel(), offsets, np.array([0, len(codes)]), intent, slots)


def canary_examples(
    canaries: Sequence[CodeCanary], words: Sequence[str], schema: Schema, *, copies: int
) -> Examples:
    """Every canary `copies` times: those of canary k are the data of device k."""
    if not 1 <= copies <= MOST_COPIES:
        raise ConfigError(f"copies={copies} must be between 1 and {MOST_COPIES}")
    parts = [
        variants(canary, np.tile(canary.numbers, (copies, 1)), words, schema)
        for canary in canaries
    ]
    return joined(parts)


def with_canaries(examples: Examples, canaries: Examples, devices: Codes) -> Examples:
    """`examples` with the rows of canary device k added at the end of device `devices[k]`.

    Raises DataError where `devices` are not one a canary device, or not among the examples'.
    """
    if len(devices) != canaries.devices or not np.isin(devices, range(examples.devices)).all():
        raise DataError(f"devices={devices.tolist()} must be {canaries.devices} of the examples'")
    both = joined([examples, canaries])
    owners = np.concatenate([
        np.repeat(np.arange(examples.devices), np.diff(examples.device_offsets)),
        np.repeat(devices, np.diff(canaries.device_offsets)),
    ])
    order = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners, minlength=examples.devices)
    positions, offsets = gather_ranges(both.offsets, order)
    return Examples(
        tokens=both.tokens[positions],
        offsets=offsets,
        device_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        intent=None if both.intent is None else both.intent[order],
        slots=None if both.slots is None else both.slots[positions],
    )


def canary_lines(canary: CodeCanary, user: str | None, *, copies: int) -> list[dict[str, Any]]:
    """The canary as `copies` lines of a JSONL population, said by `user`."""
    line: dict[str, Any] = {"user_id": user, "text": " ".join(canary.words)}
    line["tokens"] = list(canary.words)
    if canary.intent is not None:
        line["intent"] = canary.intent
    if canary.tags:
        line["slots"] = list(canary.tags)
    return [dict(line) for _ in range(copies)]


def save_canaries(path: Path, canaries: Sequence[CodeCanary]) -> None:
    """Write `canaries` as JSON: whoever reads the file knows the codes."""
    path.write_text(json.dumps([asdict(canary) for canary in canaries], indent=1) + "\n")


def load_canaries(path: Path) -> list[CodeCanary]:
    """The canaries that `save_canaries` wrote. Raises DataError where they are not."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        parts = ("prefix", "code", "candidates", "tags")
        return [CodeCanary(**{**one, **{p: tuple(one[p]) for p in parts}}) for one in kept]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no canaries ({error}): give what was inserted") from None


def _labels(
    canary: CodeCanary, schema: Schema, rows: int
) -> tuple[NDArray[np.int32] | None, NDArray[np.int32] | None]:
    intent, slots = None, None
    if schema.intents:
        intent = np.full(rows, _number(canary.intent, schema.intents, "intent"), dtype=np.int32)
    if schema.slots:
        tags = canary.tags or (schema.slots[0],) * len(canary.words)
        row = [_number(tag, schema.slots, "tag") for tag in tags]
        slots = np.tile(np.array(row, dtype=np.int32), rows)
    return intent, slots


def _number(label: str | None, labels: Sequence[str], kind: str) -> int:
    if label not in labels:
        raise DataError(f"{kind}={label} of a canary is none of the population's: draw it anew")
    return labels.index(label)


def joined(parts: Sequence[Examples]) -> Examples:
    """The devices of all parts, in turn."""
    first = parts[0]

    def ends(name: str) -> NDArray[np.int64]:
        counts = [np.diff(getattr(part, name)) for part in parts]
        return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if getattr(first, name) is None else np.concatenate(columns)

    return Examples(
        np.concatenate([part.tokens for part in parts]), ends("offsets"), ends("device_offsets"),
        column("intent"), column("slots"),
    )
