"""Reading the vocabulary file that a user brings; used by `FileVocabulary` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sottovoce.client.errors import ConfigError, DataError


def read_text(path: Path) -> str:
    """The file's text; raises DataError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8: convert it, or set task.vocabulary.path") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): set task.vocabulary.path"
        ) from None


def tokenizer_model(path: Path, content: str) -> dict[str, Any] | None:
    """The `model` part of a tokenizer.json; None for a word list (any other suffix)."""
    if path.suffix != ".json":
        return None
    try:
        model = json.loads(content)["model"]
    except (ValueError, KeyError, TypeError):
        model = None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise DataError(
            f"{path} is no Hugging Face tokenizer.json: give one, or a word list named .txt"
        )
    return model


class Subwords:
    """A tokenizer that splits words into pieces, as it would in running text.

    `size`: above its highest id. `unknown`: the piece that stands for what it cannot spell, or
    None. `before`, `after`: the pieces that it puts around a text ([CLS] … [SEP]).
    """

    def __init__(self, path: Path, content: str) -> None:
        self._tokenizer = load_tokenizer(path, content)
        self.size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self.unknown = _unknown(self._tokenizer, json.loads(content)["model"])
        self.before, self.after = _frame(self._tokenizer)
        self._space = " " if _marks_spaces(self._tokenizer) else ""

    @property
    def entries(self) -> list[str]:
        """Its pieces, by id."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def pieces(self, word: str) -> list[int]:
        """The tokenizer's ids of one word; none where nothing is left of it."""
        ids: list[int] = self._tokenizer.encode(self._space + word, add_special_tokens=False).ids
        return ids


def load_tokenizer(path: Path, content: str) -> Any:
    """A `tokenizers.Tokenizer` that neither pads nor truncates nor sees special tokens in a text.

    Raises ConfigError naming the pip extra where the library is absent.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            f"{path} needs the tokenizers library: pip install 'sottovoce[text]', or give a word"
            " list"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is no Hugging Face tokenizer.json ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # a person who says "[SEP]" has said a word
    return tokenizer


def _unknown(tokenizer: Any, model: dict[str, Any]) -> int | None:
    name = model.get("unk_token")
    found = model.get("unk_id") if name is None else tokenizer.token_to_id(name)
    return None if found is None else int(found)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def _marks_spaces(tokenizer: Any) -> bool:
    """Whether a word within a text differs from the same word alone: GPT-2's pieces hold the space
    before them."""
    alone, spaced, text = (
        tokenizer.encode(words, add_special_tokens=False).ids for words in ("a", " a", "a a")
    )
    return bool(text == alone + spaced and spaced != alone)
