"""Laws of the vocabularies: public by default, rebuilt from JSON, one clear line on bad files."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples
from sottovoce.client.vocabulary import (
    FIRST,
    UNK,
    FileVocabulary,
    GrammarVocabulary,
    HashVocabulary,
    TrainingTextVocabulary,
    Vocabulary,
    make_vocabulary,
)

WORDS = ["play", "Some", "jazz", "play", "zzz"]


class _Source:
    """A population of two devices that say "a b a" and "a c"."""

    words: Sequence[str] = ("a", "b", "c", "unsaid")

    def __init__(self, public_words: bool) -> None:
        self.public_words = public_words

    def __len__(self) -> int:
        return 2

    def examples(self, devices: Any) -> Examples:
        assert devices.tolist() == [0, 1]
        offsets = np.array([0, 3, 5])
        return Examples(np.array([0, 1, 0, 0, 2], dtype=np.int32), offsets, np.array([0, 1, 2]))


def _tokenizer(path: Path, model: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": "1.0", "model": model}))
    return path


def _again(vocabulary: Vocabulary) -> Vocabulary:
    return Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))


def _every_kind(folder: Path) -> list[Vocabulary]:
    listed = folder / "words.txt"
    listed.write_text("play\nsome\n\nplay\n")
    model = {"type": "WordLevel", "vocab": {"some": 1, "play": 0}, "unk_token": "play"}
    return [
        GrammarVocabulary(["jazz", "play", "some"]),
        HashVocabulary(50),
        FileVocabulary(listed),
        FileVocabulary(_tokenizer(folder / "tokenizer.json", model)),
        TrainingTextVocabulary(["jazz", "play", "some"], np.array([1, 3, 2]), 2),
    ]


def test_a_vocabulary_survives_json_on_another_machine(tmp_path: Path) -> None:
    for vocabulary in _every_kind(tmp_path):
        values = json.loads(json.dumps(vocabulary.to_json()))
        (tmp_path / "words.txt").unlink(missing_ok=True)
        again = Vocabulary.from_json(values)
        assert type(again) is type(vocabulary)
        assert (again.size, again.description) == (vocabulary.size, vocabulary.description)
        assert np.array_equal(again.ids(WORDS).ids, vocabulary.ids(WORDS).ids)


def test_ids_are_ragged_and_below_the_size(tmp_path: Path) -> None:
    for vocabulary in _every_kind(tmp_path):
        pieces = vocabulary.ids(WORDS)
        assert pieces.ids.dtype == np.int32 and pieces.offsets.dtype == np.int64
        assert len(pieces.offsets) == len(WORDS) + 1
        assert np.diff(pieces.offsets).min() >= 1
        assert UNK <= pieces.ids.min() and pieces.ids.max() < vocabulary.size
        assert pieces.ids[0] == pieces.ids[3] >= FIRST
        assert len(vocabulary.ids([]).ids) == 0


def test_listed_words_fall_back_to_lower_case_and_then_to_unknown(tmp_path: Path) -> None:
    listed = _every_kind(tmp_path)[2]
    assert listed.ids(["play", "Some", "jazz"]).ids.tolist() == [FIRST, FIRST + 1, UNK]
    assert listed.size == FIRST + 2


def test_hash_buckets_are_stable_and_even() -> None:
    vocabulary = HashVocabulary(16)
    assert not vocabulary.has_unknown
    assert vocabulary.ids(["Play", "play", "jazz"]).ids.tolist() == [14, 14, 7]
    words = [f"word{number}" for number in range(16_000)]
    counts = np.bincount(vocabulary.ids(words).ids, minlength=20)
    assert counts[:FIRST].sum() == 0
    assert counts[FIRST:] == pytest.approx(1000, rel=0.15)
    assert len(vocabulary.ids(["\ud800"]).ids) == 1


def test_auto_takes_public_words_and_hashes_private_ones() -> None:
    assert make_vocabulary("auto", _Source(True)).source == "grammar"
    private = make_vocabulary("auto", _Source(False), buckets=7)
    assert (private.source, private.size, private.is_public) == ("hash", FIRST + 7, True)


def test_training_text_needs_the_explicit_choice_and_says_what_it_is() -> None:
    vocabulary = make_vocabulary("training_text", _Source(False), size=2)
    assert not vocabulary.is_public
    assert "release" in vocabulary.description
    assert vocabulary.ids(_Source.words).ids.tolist() == [FIRST, FIRST + 1, UNK, UNK]
    whole = make_vocabulary("training_text", _Source(False))
    assert whole.size == FIRST + 3  # what nobody said is not in it
    assert _again(whole).ids(_Source.words).ids.tolist() == [4, 5, 6, UNK]


@pytest.mark.parametrize(
    "source, named",
    [
        ("grammar", "source=hash or file"),
        ("file", "task.vocabulary.path"),
        ("guess", "choose auto, grammar, hash, file, training_text"),
    ],
)
def test_sources_that_do_not_fit_are_refused(source: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_vocabulary(source, _Source(False))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="buckets"):
        HashVocabulary(0)
    with pytest.raises(ConfigError, match="size"):
        make_vocabulary("training_text", _Source(False), size=0)


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("absent.txt", None, "cannot be read"),
        ("empty.txt", b"\n\n", "holds no words"),
        ("latin.txt", b"caf\xe9\n", "not UTF-8"),
        ("bad.json", b"{", "no Hugging Face tokenizer.json"),
        ("other.json", b'{"model": {"type": "WordLevel"}}', "no Hugging Face tokenizer.json"),
        ("list.json", b"[1]", "no Hugging Face tokenizer.json"),
    ],
)
def test_a_bad_vocabulary_file_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, named: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        FileVocabulary(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_malformed_json_is_refused() -> None:
    for values in ({}, {"source": "magic"}, {"source": "hash"}, {"source": "grammar", "words": 3}):
        with pytest.raises(DataError, match="malformed vocabulary"):
            Vocabulary.from_json(values)


PIECES = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 50,
    "vocab": {"[UNK]": 0, "play": 1, "##ing": 2, "jazz": 3},
}


def test_a_subword_tokenizer_without_its_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"sottovoce\[text\]"):
        FileVocabulary(_tokenizer(tmp_path / "tokenizer.json", PIECES))


def test_a_subword_tokenizer_splits_words_into_pieces(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional tokenizers library is absent")
    vocabulary = FileVocabulary(_tokenizer(tmp_path / "tokenizer.json", PIECES))
    pieces = vocabulary.ids(["playing", "jazz", "xyz", ""])
    assert pieces.ids.tolist() == [FIRST + 1, FIRST + 2, FIRST + 3, UNK, UNK]
    assert pieces.offsets.tolist() == [0, 2, 3, 4, 5]
    assert vocabulary.size == FIRST + 4
    assert _again(vocabulary).ids(["playing"]).ids.tolist() == [FIRST + 1, FIRST + 2]
    broken = _tokenizer(tmp_path / "broken.json", {"type": "BPE", "vocab": {"a": 0}})
    with pytest.raises(DataError, match="no Hugging Face tokenizer.json"):
        FileVocabulary(broken)
