"""The assistant grammar, compiled to flat arrays that numpy can expand.

A request is made in four uniform choices: a template of the intent, a variant of the template (its
optional parts in or out), and for each element of the variant a pattern and a phrase. An element is
a *list*: literal words, a choice of words, or the values of a slot. All levels are ranges of the
next one, so that thousands of requests are expanded by offset arithmetic alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import Schema
from sottovoce.simulations import grammar_templates
from sottovoce.simulations.grammar_fillers import PARTS, SLOTS

MOST_MERGED = 16  # neighbouring word choices become one list while it stays this short


@dataclass(frozen=True)
class Grammar:
    """Ranges all the way down: intent -> template -> variant -> list -> pattern -> phrase -> token.

    `*_offsets`: (n + 1,) int64 into the next level. `elements`: lists of each variant, flat.
    `phrase_tokens`, `phrase_slots`: int32 indices into `words` and `schema.slots`. `heard_as`:
    (words,) what a speech recogniser may hear instead, the word itself for most.
    """

    words: tuple[str, ...]
    schema: Schema
    intent_offsets: NDArray[np.int64]
    template_offsets: NDArray[np.int64]
    variant_offsets: NDArray[np.int64]
    elements: NDArray[np.int64]
    list_offsets: NDArray[np.int64]
    pattern_offsets: NDArray[np.int64]
    phrase_offsets: NDArray[np.int64]
    phrase_tokens: NDArray[np.int32]
    phrase_slots: NDArray[np.int32]
    heard_as: NDArray[np.int32]


@dataclass(frozen=True)
class Reference:
    """`{name}` in a pattern: a slot, or one of the parts that slot values are made of."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`(a|b)`, or with `optional` `[a]`."""

    options: tuple[tuple[Node, ...], ...]
    optional: bool


Node = str | Reference | Choice
Words = tuple[str, ...]  # alternative phrases, words separated by spaces


def parse(pattern: str) -> tuple[Node, ...]:
    """The tree of a pattern; white space is kept, because `{first}'s` is one word."""
    marks = re.findall(r"\{\w+\}|[()\[\]|~]|[^()\[\]|{}~]+", pattern)
    options = _parse_options(iter(marks), "")
    return options[0]


def _parse_options(marks: Iterable[str], end: str) -> tuple[tuple[Node, ...], ...]:
    options: list[list[Node]] = [[]]
    for mark in marks:
        if mark == end:
            return tuple(map(tuple, options))
        if mark == "|":
            options.append([])
        elif mark in "([":
            closing = ")" if mark == "(" else "]"
            options[-1].append(Choice(_parse_options(marks, closing), optional=mark == "["))
        elif mark == "~":
            options[-1].append(Reference("~"))
        elif mark[0] == "{":
            options[-1].append(Reference(mark[1:-1]))
        else:
            options[-1].append(mark)
    if end:
        raise ValueError(f"a '{end}' is missing in a pattern of the grammar")
    return tuple(map(tuple, options))


def phrases(nodes: Sequence[Node]) -> list[str]:
    """Every phrase that a pattern without slots stands for."""
    return [" ".join(text.split()) for text in _texts(nodes)]


def _texts(nodes: Sequence[Node]) -> list[str]:
    texts = [""]
    for node in nodes:
        if isinstance(node, str):
            options = [node]
        elif isinstance(node, Reference):
            options = PARTS[node.name].split()
        else:
            options = list(chain.from_iterable(map(_texts, node.options)))
        texts = [before + after for before in texts for after in options]
    return texts


def variants(nodes: Sequence[Node]) -> list[list[Words | Reference]]:
    """Every way through a template: optional parts in or out, choices between slots made.

    What remains to be chosen is inside the elements, each alternative words or a slot.
    """
    ways: list[list[Words | Reference]] = [[]]
    for node in nodes:
        options: list[list[Words | Reference]]
        if isinstance(node, Reference):
            options = [[node]]
        elif isinstance(node, str) or (not node.optional and _only_words(node)):
            options = [[tuple(_texts([node]))]]
        else:
            options = list(chain.from_iterable(map(variants, node.options)))
            options += [[]] if node.optional else []
        ways = [before + after for before, after in product(ways, options)]
    return [_merged(way) for way in ways]


def _only_words(node: Node) -> bool:
    if isinstance(node, Choice):
        return not node.optional and all(map(_only_words, chain.from_iterable(node.options)))
    return isinstance(node, str)


def _merged(way: Sequence[Words | Reference]) -> list[Words | Reference]:
    """The same elements with neighbouring words joined and blanks dropped."""
    merged: list[Words | Reference] = []
    for element in way:
        before = merged[-1] if merged else None
        if (
            isinstance(element, tuple)
            and isinstance(before, tuple)
            and len(element) * len(before) <= MOST_MERGED
        ):
            merged[-1] = tuple(a + b for a, b in product(before, element))
        else:
            merged.append(element)
    return [e for e in merged if isinstance(e, Reference) or any(map(str.strip, e))]


def _untagged() -> dict[str, tuple[Sequence[str], ...]]:
    """The patterns of the lists that carry no slot: openings by kind, ends and hesitations."""
    void = list(chain.from_iterable(phrases(parse(v)) for v in grammar_templates.VOID))
    false_start = [f"{words} {turn}" for words in void for turn in grammar_templates.TURN]
    declined = [f"{dont} {words}" for words in void for dont in grammar_templates.DONT]
    return {
        "!": (*(grammar_templates.COMMAND,) * 15, false_start),
        "?": (*(grammar_templates.QUESTION,) * 15, false_start),
        ".": (*(grammar_templates.STATEMENT,) * 15, false_start),
        "end": (*(grammar_templates.THANKS,) * 19, declined),
        "~": (grammar_templates.HESITATION,),
    }


UNTAGGED = _untagged()


class _Compiler:
    """Collects lists and words in order of appearance; `lists` maps an element to its number."""

    def __init__(self) -> None:
        self.lists: dict[Words | Reference, int] = {}
        self.patterns_of_list: list[int] = []
        self.phrases_of_pattern: list[int] = []
        self.phrases: list[tuple[list[str], list[str]]] = []

    def list_number(self, element: Words | Reference) -> int:
        if element not in self.lists:
            self.lists[element] = len(self.lists)
            patterns, slot = self._patterns(element)
            self.patterns_of_list.append(len(patterns))
            for pattern in patterns:
                self.phrases_of_pattern.append(len(pattern))
                self.phrases += [_tagged(phrase.split(), slot) for phrase in pattern]
        return self.lists[element]

    @staticmethod
    def _patterns(element: Words | Reference) -> tuple[list[Sequence[str]], str | None]:
        if isinstance(element, tuple):
            return [element], None
        if element.name in UNTAGGED:
            return list(UNTAGGED[element.name]), None
        return [phrases(parse(pattern)) for pattern in SLOTS[element.name]], element.name


def _tagged(words: list[str], slot: str | None) -> tuple[list[str], list[str]]:
    if slot is None:
        return words, ["O"] * len(words)
    return words, [f"{'I' if place else 'B'}-{slot}" for place in range(len(words))]


@cache
def assistant_grammar() -> Grammar:
    """The grammar of this project, compiled once per process."""
    compiler = _Compiler()
    templates, ways, elements = [], [], []
    intents = tuple(sorted(grammar_templates.TEMPLATES))
    for intent in intents:
        templates.append(len(grammar_templates.TEMPLATES[intent]))
        for template in grammar_templates.TEMPLATES[intent]:
            lists = [[compiler.list_number(e) for e in way] for way in _polite_variants(template)]
            ways.append(len(lists))
            elements += lists
    tokens = list(chain.from_iterable(words for words, _ in compiler.phrases))
    tags = list(chain.from_iterable(tags for _, tags in compiler.phrases))
    heard_as = grammar_templates.HEARD_AS
    words = tuple(sorted({*tokens, *heard_as.values()}))
    number = {word: place for place, word in enumerate(words)}
    slots = ("O", *sorted(set(tags) - {"O"}))
    return Grammar(
        words=words,
        schema=Schema(intents=intents, slots=slots),
        intent_offsets=_offsets(templates),
        template_offsets=_offsets(ways),
        variant_offsets=_offsets(map(len, elements)),
        elements=np.array(list(chain.from_iterable(elements)), dtype=np.int64),
        list_offsets=_offsets(compiler.patterns_of_list),
        pattern_offsets=_offsets(compiler.phrases_of_pattern),
        phrase_offsets=_offsets(len(phrase) for phrase, _ in compiler.phrases),
        phrase_tokens=np.array([number[word] for word in tokens], dtype=np.int32),
        phrase_slots=np.array([slots.index(tag) for tag in tags], dtype=np.int32),
        heard_as=np.array([number[heard_as.get(word, word)] for word in words], dtype=np.int32),
    )


def _polite_variants(template: str) -> list[list[Words | Reference]]:
    """The template's variants between an opening of its kind and an end."""
    kind = template[-1] if template[-1] in "?." else "!"
    ways = variants(parse(template.rstrip("?. ")))
    return [[Reference(kind), *way, Reference("end")] for way in ways]


def _offsets(sizes: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)
