"""A corpus on disk: a folder of flat arrays and a header, mapped into memory.

Opening reads the header and both ends of every array, whatever their size. Processes that open the
same index share its pages. No user id is kept in it, but every word is: it is as private as the
files that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Examples
from sottovoce.simulations.corpus import Corpus
from sottovoce.simulations.flat_arrays import Array, Mapped, array_file, sync_folder

HEADER = "index.json"
FORMAT = "sottovoce corpus index"
VERSION = 1
END_BYTES = 1 << 16  # at both ends of an array, under the header's checksum
WORDS_AT_ONCE = 1 << 14


class WordTable(Sequence[str]):
    """Words as one text and (words + 1,) offsets into it, decoded when they are asked for."""

    def __init__(self, text: Array, offsets: Array) -> None:
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"word {place} is not among the {len(self)} words")
        place = int(place) % len(self)
        return _decoded(self._text[self._offsets[place] : self._offsets[place + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), WORDS_AT_ONCE):
            bounds = self._offsets[start : start + WORDS_AT_ONCE + 1]
            text = self._text[bounds[0] : bounds[-1]].tobytes()
            ends = (bounds - bounds[0]).tolist()
            for first, last in zip(ends, ends[1:], strict=False):
                yield _decoded(text[first:last])


def encoded(word: str) -> bytes:
    """A word's bytes in a word table; JSON can spell text that plain UTF-8 cannot."""
    return word.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def write_header(folder: Path, kinds: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Seal a folder of arrays (name -> kind) as an index; `facts`: see `open_corpus`."""
    arrays = {
        name: {"kind": kind, "bytes": (path := array_file(folder, name, kind)).stat().st_size,
               "ends": _ends(path)}
        for name, kind in kinds.items()
    }
    header = {"format": FORMAT, "version": VERSION, **facts, "arrays": arrays}
    header["checksum"] = _checksum(header)
    draft = folder / f"{HEADER}.draft"
    draft.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.rename(folder / HEADER)
    sync_folder(folder)


def open_corpus(folder: Path) -> Corpus:
    """The corpus of an index. Raises DataError where it is damaged or of another version."""
    header = _header(folder)
    arrays = {name: _checked(folder, name, facts) for name, facts in header["arrays"].items()}

    def examples(prefix: str) -> Examples:
        def get(name: str) -> Array | None:
            found = arrays.get(prefix + name)
            return None if found is None else found.array

        offsets = arrays[f"{prefix}offsets"].array
        whole = np.array([0, len(offsets) - 1], dtype=np.int64)
        bounds = get("device_offsets")
        return Examples(
            arrays[f"{prefix}tokens"].array,
            offsets,
            whole if bounds is None else bounds,
            get("intent"),
            get("slots"),
        )

    def release() -> None:
        for name in ("device_offsets", "tokens", "offsets", "intent", "slots"):
            if name in arrays:
                arrays[name].release()

    def expect(devices: Array) -> None:
        arrays["device_offsets"].expect(devices, devices + 2)
        bounds = arrays["device_offsets"].array
        first, last = bounds[devices], bounds[devices + 1]
        arrays["offsets"].expect(first, last + 1)
        offsets = arrays["offsets"].array
        for name, starts, stops in (
            ("intent", first, last), ("tokens", offsets[first], offsets[last]),
            ("slots", offsets[first], offsets[last]),
        ):
            if name in arrays:
                arrays[name].expect(starts, stops)

    return Corpus(
        train=examples(""),
        test=examples("test_") if "test_tokens" in arrays else None,
        activity=arrays["activity"].array,
        held_out=header["held_out"],
        words=WordTable(arrays["word_text"].array, arrays["word_offsets"].array),
        intents=tuple(header["intents"]),
        tags=tuple(header["tags"]),
        natural=header["natural"],
        empty=header["empty"],
        folder=folder.absolute(),
        release=release,
        expect=expect,
    )


def _header(folder: Path) -> dict[str, Any]:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        found = header.pop("checksum")
    except OSError as error:
        raise _damaged(folder, f"{HEADER} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _damaged(folder, f"{HEADER} is no header") from None
    if found != _checksum(header):
        raise _damaged(folder, f"{HEADER} was changed")
    if header["format"] != FORMAT or header["version"] != VERSION:
        raise _damaged(folder, f"it has version {header['version']}, this program {VERSION}")
    fields: dict[str, Any] = header
    return fields


def _checked(folder: Path, name: str, facts: Mapping[str, Any]) -> Mapped:
    path = array_file(folder, name, facts["kind"])
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise _damaged(folder, f"{path.name} has {size} bytes, not {facts['bytes']}")
        if _ends(path) != facts["ends"]:
            raise _damaged(folder, f"{path.name} was changed")
        return Mapped(folder, name, facts["kind"])
    except OSError as error:
        raise _damaged(folder, f"{path.name} cannot be read ({error.strerror})") from None


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(
        f"the index {folder} cannot be used: {what}: delete that folder, and the next run makes it"
        " again"
    )


def _ends(path: Path) -> int:
    """Checksum of the first and last bytes of a file."""
    with path.open("rb") as file:
        first = file.read(END_BYTES)
        file.seek(max(0, path.stat().st_size - END_BYTES))
        return zlib.crc32(file.read(END_BYTES), zlib.crc32(first))


def _checksum(header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
