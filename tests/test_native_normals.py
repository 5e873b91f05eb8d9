"""Streams of normals by the kernel, at every level, beside the library's cipher and scipy."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy.special import ndtri

from sottovoce.client import native
from sottovoce.client.errors import ConfigError
from sottovoce.privacy.mechanisms import noise_streams
from sottovoce.privacy.mechanisms.noise_streams import (
    KEY_BYTES,
    SUPERBLOCK,
    TAIL_WORDS,
    NoiseStreams,
)

KEYS = [bytes(range(k, k + KEY_BYTES)) for k in range(3)]


def normals_of(key: bytes, count: int) -> np.ndarray:
    """The first draw of a stream, in float64 from the library's ChaCha20."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(wanted: int) -> np.ndarray:
        drawn = cipher.update(bytes(4 * SUPERBLOCK * -(-wanted // SUPERBLOCK)))
        blocks = np.frombuffer(drawn, "<u4")
        return blocks.reshape(-1, 16, 16).transpose(0, 2, 1).reshape(-1)[:wanted].astype(np.int64)

    drawn = words(count)
    signed = np.where(drawn < 2**31, drawn, drawn - 2**32)
    found = ndtri((signed + 2**31 + 0.5) / 2**32)
    tails = np.flatnonzero((signed >= 2**31 - TAIL_WORDS) | (signed < -(2**31) + TAIL_WORDS))
    low, high = words(2 * len(tails)).reshape(-1, 2).T
    uniform = ((high << 20) + (low >> 12) + 0.5) * 2.0**-52
    found[tails] = np.copysign(-ndtri(uniform * TAIL_WORDS / 2**32), signed[tails])
    return found


def test_a_stream_is_that_of_the_librarys_cipher(kernel_level: native.Library) -> None:
    for key in KEYS:
        found = NoiseStreams([key]).flat([300_007]).numpy()
        np.testing.assert_allclose(found, normals_of(key, 300_007), rtol=1e-6, atol=0)
        assert np.abs(found).max() > 3.7  # tails were among them


@pytest.mark.parametrize("count", [0, 1, 3, 16, 63, 64, 65, 255, 256, 257, 1000])
def test_any_number_may_be_drawn_and_nothing_is_written_behind_them(
    kernel_level: native.Library, count: int
) -> None:
    room = np.full(count + 9, 7, dtype=np.float32)
    key, place = np.frombuffer(KEYS[0], dtype="<u4"), np.zeros(1, dtype=np.int64)
    sizes = np.array([count])
    assert kernel_level.kernels_streams(
        key.ctypes.data, place.ctypes.data, sizes.ctypes.data, 1, 2.0, room.ctypes.data
    ) == 0
    np.testing.assert_allclose(room[:count], 2 * normals_of(KEYS[0], count), rtol=1e-6)
    assert np.all(room[count:] == 7)


def test_streams_are_those_of_torch_up_to_rounding(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [100_000, 7, 50_000]
    fast = NoiseStreams(KEYS)
    found = [fast.flat(counts, 0.3), fast.flat(counts, 0.3)]
    monkeypatch.setattr(noise_streams, "kernels", lambda: None)
    slow = NoiseStreams(KEYS)
    for each in found:  # the second draw shows that as much of a stream was used up
        torch.testing.assert_close(each, slow.flat(counts, 0.3), rtol=2e-4, atol=1e-7)
    assert slow._places.tolist() == fast._places.tolist()


def test_words_are_those_of_the_ciphers_published_test_vector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RFC 8439, A.1, vector 1: key, nonce and counter zero."""
    monkeypatch.setattr(noise_streams, "kernels", lambda: None)
    words = NoiseStreams([bytes(KEY_BYTES)])._words(0, SUPERBLOCK)[::16]
    assert words[:4].astype("<i4").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_a_stream_ends_before_its_counter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = NoiseStreams(KEYS)
    streams._places[1] = (1 << 28) - 3  # with room for the tails of all five
    streams.flat([5, 5])
    with pytest.raises(ValueError, match="use a key for each round"):
        streams.flat([5, 5])


@pytest.mark.parametrize(
    "counts, first", [([1, 1, 1, 1], 0), ([1, 1], 2), ([1], -1), ([-1], 0), ([1 << 31], 0)]
)
def test_streams_that_are_not_there_and_impossible_draws_are_refused(
    kernel_level: native.Library, counts: list[int], first: int
) -> None:
    streams = NoiseStreams(KEYS)
    with pytest.raises(ValueError, match="are not all among|a draw gives"):
        streams.flat(counts, first=first)
    assert not streams._places.any()


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and shutil.which("cc")), reason="no C compiler on Linux"
)
def test_the_kernels_are_there_where_there_is_a_compiler() -> None:
    """Or a kernel that does not compile would only skip its tests: `make test` builds them anew."""
    assert native._library() is not None


def test_kernels_older_than_their_sources_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = next(Path(native.__file__).parent.glob("_kernels*.so"), None)
    if built is None:
        pytest.skip("the kernels were not built")
    library, source = tmp_path / built.name, tmp_path / "kernels.c"
    shutil.copy(built, library)
    source.touch()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    os.utime(library, (1000, 1000))
    os.utime(source, (2000, 2000))
    assert native._library() is None
    os.utime(source, (1000, 1000))
    assert native._library() is not None


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
    assert native.level() in ("off", *native.LEVELS)
