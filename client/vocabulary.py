"""Vocabularies: public maps from words to the ids that a model embeds.

A vocabulary read from private text is itself a release, so the sources are public ones: a
grammar's own words, hash buckets, or a file that the user brings. A vocabulary of the training
text exists behind an explicit choice and says what it is. Ids 0 to 3 are <pad>, <unk>, <bos>,
<eos> in all of them. `to_json` holds all that `Vocabulary.from_json` needs, on any machine.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples
from sottovoce.client.tokenizer_file import Subwords, read_text, tokenizer_model

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
FIRST = len(SPECIALS)
COUNTED_AT_ONCE = 10_000  # devices whose words are counted in one go


@dataclass(frozen=True)
class Pieces:
    """Ids of each word of a word table, ragged: those of word w are `ids[offsets[w]:offsets[w+1]]`.

    `ids`: (pieces,) int32. `offsets`: (words + 1,) int64; every word has one piece at least.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]


class WordSource(Protocol):
    """What `make_vocabulary` reads of a population."""

    @property
    def words(self) -> Sequence[str]: ...

    @property
    def public_words(self) -> bool: ...

    def __len__(self) -> int: ...

    def examples(self, devices: NDArray[np.int64]) -> Examples: ...


class Vocabulary(ABC):
    """`size` ids, specials included. `has_unknown`: whether a word can map to <unk>.

    `is_public`: whether the map was made without private text; `description` says how, in words
    for the report.
    """

    source: ClassVar[str]
    has_unknown: ClassVar[bool] = True
    is_public: ClassVar[bool] = True
    size: int
    description: str

    @abstractmethod
    def pieces(self, word: str) -> list[int]:
        """The ids of one word, one at least."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs, as JSON values."""

    def ids(self, words: Sequence[str]) -> Pieces:
        """The ids of every word of a table."""
        pieces = [self.pieces(word) for word in words]
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return Pieces(np.array([i for p in pieces for i in p], dtype=np.int32), offsets)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary that `to_json` wrote. Raises DataError when it is malformed."""
        try:
            return SOURCES[values["source"]]._restore(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"malformed vocabulary ({error!r}): take model.json from the run folder"
            ) from None

    @classmethod
    @abstractmethod
    def _restore(cls, values: Mapping[str, Any]) -> Vocabulary: ...


class GrammarVocabulary(Vocabulary):
    """The words of a public grammar, one id each."""

    source = "grammar"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._number = _numbered(self._words)
        self.size = FIRST + len(self._number)
        self.description = f"{len(self._number)} words of the grammar, public"

    def pieces(self, word: str) -> list[int]:
        return [_look_up(self._number, word)]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "words": self._words}

    @classmethod
    def _restore(cls, values: Mapping[str, Any]) -> GrammarVocabulary:
        return cls(values["words"])


class HashVocabulary(Vocabulary):
    """Every word, lower-cased, falls into one of `buckets` by BLAKE2b: no list, no unknown word.

    Words that share a bucket are one to the model: more buckets, fewer such pairs.
    """

    source = "hash"
    has_unknown = False

    def __init__(self, buckets: int) -> None:
        if buckets < 1:
            raise ConfigError(f"buckets={buckets}: set task.vocabulary.buckets to 1 or more")
        self.buckets = buckets
        self.size = FIRST + buckets
        self.description = f"{buckets} hash buckets of lower-cased words, a public function"

    def pieces(self, word: str) -> list[int]:
        text = word.lower().encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return [FIRST + int.from_bytes(digest, "little") % self.buckets]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "buckets": self.buckets}

    @classmethod
    def _restore(cls, values: Mapping[str, Any]) -> HashVocabulary:
        return cls(values["buckets"])


class FileVocabulary(Vocabulary):
    """A vocabulary that the user brings: a word list, or a Hugging Face `tokenizer.json`.

    A word list has one word a line. Of a tokenizer the word-level model is read directly; others
    (BPE, WordPiece, Unigram) split words into several pieces by the `tokenizers` library; they are
    the `subwords`, and an id is the tokenizer's own plus 4. `content` is the file's text where it
    is at hand already. Raises DataError naming the file.
    """

    source = "file"

    def __init__(self, path: str | Path, content: str | None = None) -> None:
        self.path = Path(path)
        self._content = read_text(self.path) if content is None else content
        self._number: dict[str, int] = {}
        self.subwords: Subwords | None = None
        tokenizer = tokenizer_model(self.path, self._content)
        if tokenizer is None:
            self._number = _numbered([line.strip() for line in self._content.splitlines()])
        elif tokenizer.get("type") == "WordLevel":
            self._number = _numbered(sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__))
        else:
            self.subwords = Subwords(self.path, self._content)
        pieces = self.subwords.size if self.subwords else len(self._number)
        if not pieces:
            raise DataError(f"{self.path} holds no words: give one word a line")
        self.size = FIRST + pieces
        self.description = f"{pieces} entries of {self.path.name}, public as the user declares"

    @property
    def entries(self) -> list[str]:
        """The words of the file, or the tokenizer's pieces."""
        return list(self._number) if self.subwords is None else self.subwords.entries

    def pieces(self, word: str) -> list[int]:
        if self.subwords is None:
            return [_look_up(self._number, word)]
        unknown = self.subwords.unknown
        found = self.subwords.pieces(word)
        return [UNK if piece == unknown else FIRST + piece for piece in found] or [UNK]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "path": self.path.name, "content": self._content}

    @classmethod
    def _restore(cls, values: Mapping[str, Any]) -> FileVocabulary:
        return cls(values["path"], values["content"])


class TrainingTextVocabulary(Vocabulary):
    """The `size` most frequent words of the training text: a release that no epsilon covers.

    `counts`: (words,) occurrences of each. *Guarantee*: none; who holds the model knows these words
    were said. *Assumes*: the user chose it (`task.vocabulary.source=training_text`).
    """

    source = "training_text"
    is_public = False

    def __init__(self, words: Sequence[str], counts: NDArray[np.integer[Any]], size: int) -> None:
        if size < 1:
            raise ConfigError(f"size={size}: a vocabulary needs one word at least")
        spoken = [place for place in range(len(words)) if counts[place] > 0]
        spoken.sort(key=lambda place: (-int(counts[place]), words[place]))
        self._words = [words[place] for place in spoken[:size]]
        self._number = _numbered(self._words)
        self.size = FIRST + len(self._number)
        self.description = (
            f"the {len(self._number)} most frequent words of the training text: a release of"
            " private words that epsilon does not cover"
        )

    def pieces(self, word: str) -> list[int]:
        return [self._number.get(word, UNK)]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "words": self._words}

    @classmethod
    def _restore(cls, values: Mapping[str, Any]) -> TrainingTextVocabulary:
        words = values["words"]
        return cls(words, np.arange(len(words), 0, -1), len(words) or 1)


SOURCES: dict[str, type[Vocabulary]] = {
    kind.source: kind
    for kind in (GrammarVocabulary, HashVocabulary, FileVocabulary, TrainingTextVocabulary)
}


def make_vocabulary(
    source: str,
    population: WordSource,
    *,
    buckets: int = 4096,
    path: str | None = None,
    size: int = 10_000,
) -> Vocabulary:
    """The vocabulary that `task.vocabulary` asks for.

    `auto` takes the grammar's words where they are public, hash buckets otherwise. Raises
    ConfigError when source and population do not fit.
    """
    if source == "auto":
        source = "grammar" if population.public_words else "hash"
    if source == "grammar":
        if not population.public_words:
            raise ConfigError(
                "task.vocabulary.source=grammar needs a generated population: set"
                " task.vocabulary.source=hash or file"
            )
        return GrammarVocabulary(population.words)
    if source == "hash":
        return HashVocabulary(buckets)
    if source == "file":
        if path is None:
            raise ConfigError("task.vocabulary.source=file needs task.vocabulary.path")
        return FileVocabulary(path)
    if source == "training_text":
        return TrainingTextVocabulary(population.words, _word_counts(population), size)
    raise ConfigError(
        f"task.vocabulary.source={source} does not exist: choose auto, {', '.join(SOURCES)}"
    )


def _word_counts(population: WordSource) -> NDArray[np.int64]:
    """(words,) how often training devices say each word."""
    counts = np.zeros(len(population.words), dtype=np.int64)
    for start in range(0, len(population), COUNTED_AT_ONCE):
        stop = min(start + COUNTED_AT_ONCE, len(population))
        devices = np.arange(start, stop, dtype=np.int64)
        counts += np.bincount(population.examples(devices).tokens, minlength=len(counts))
    return counts


def _numbered(words: Sequence[str]) -> dict[str, int]:
    """Ids of the distinct, non-blank words in order."""
    return {word: FIRST + place for place, word in enumerate(dict.fromkeys(filter(None, words)))}


def _look_up(number: Mapping[str, int], word: str) -> int:
    """The word's id, else that of its lower-cased form, else <unk>."""
    return number.get(word, number.get(word.lower(), UNK))
