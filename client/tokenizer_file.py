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


def load_tokenizer(path: Path, content: str) -> Any:
    """A `tokenizers.Tokenizer` that neither pads nor truncates.

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
    return tokenizer
