"""The kernel that makes normals of words, at every level, beside scipy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from sottovoce.client import native
from sottovoce.client.errors import ConfigError
from sottovoce.privacy.mechanisms import noise_streams
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, TAIL_WORDS, NoiseStreams

ENDS = [-(2**31), -(2**31) + TAIL_WORDS - 1, 2**31 - TAIL_WORDS, 2**31 - 1]
INSIDE = [-(2**31) + TAIL_WORDS, 2**31 - TAIL_WORDS - 1, -1, 0, 1]


def converted(words: np.ndarray, deviation: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Normals of the words, and the places of tails."""
    own = words.astype(np.int32)
    return own.view(np.float32), noise_streams._to_normals(own, deviation)


def test_a_word_becomes_the_normal_of_its_middle(kernel_level: native.Library) -> None:
    random = np.random.default_rng(3).integers(-(2**31), 2**31, 100_003)
    words = np.concatenate([ENDS, INSIDE, random])
    normals, tails = converted(words)
    central = np.ones(len(words), dtype=bool)
    central[tails] = False
    expected = ndtri((words[central] + 2**31 + 0.5) / 2**32)
    np.testing.assert_allclose(normals[central], expected, rtol=5e-7, atol=0)
    assert np.all(np.abs(expected) < 3.7)


def test_tails_are_the_words_within_reach_of_an_end_and_keep_their_sign(
    kernel_level: native.Library,
) -> None:
    words = np.concatenate([INSIDE, ENDS, np.zeros(300, dtype=np.int64), ENDS])
    normals, tails = converted(words, deviation=0.25)
    assert tails.tolist() == [5, 6, 7, 8, 309, 310, 311, 312]
    assert normals[tails].tolist() == [-1, -1, 1, 1] * 2


@pytest.mark.parametrize("count", [0, 1, 3, 16, 17, 63, 64, 65, 1000])
def test_any_number_of_words_is_converted_and_nothing_behind_them(
    kernel_level: native.Library, count: int
) -> None:
    words = np.random.default_rng(count).integers(-(2**30), 2**30, count + 5).astype(np.int32)
    own = words.copy()
    noise_streams._to_normals(own[:count], 2.0)
    np.testing.assert_allclose(
        own[:count].view(np.float32),
        2 * ndtri((words[:count].astype(np.int64) + 2**31 + 0.5) / 2**32), rtol=5e-7,
    )
    assert np.array_equal(own[count:], words[count:])


def test_streams_are_those_of_torch_up_to_rounding(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [bytes([k]) * KEY_BYTES for k in range(3)]
    counts = [100_000, 7, 50_000]
    fast = NoiseStreams(keys)
    found = [fast.flat(counts, 0.3), fast.flat(counts, 0.3)]
    monkeypatch.setattr(noise_streams, "kernels", lambda: None)
    slow = NoiseStreams(keys)
    for each in found:  # the second draw shows that as much of a stream was used up
        torch.testing.assert_close(each, slow.flat(counts, 0.3), rtol=2e-4, atol=1e-7)


def test_the_environment_names_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "off")
    assert native.kernels() is None and native.level() == "off"
    native.kernels.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(ConfigError, match="SOTTOVOCE_KERNELS=sse9 is none of: off, generic"):
        native.kernels()
    native.kernels.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "generic")
    assert native.level() in ("generic", "off")
    monkeypatch.delenv(native.VARIABLE)
    native.kernels.cache_clear()
