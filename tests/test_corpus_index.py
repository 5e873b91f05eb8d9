"""Laws of the corpus index: the population in memory, example for example, come what may."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import fcntl
import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_populations import MALFORMED

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples
from sottovoce.simulations import corpus_build, flat_arrays
from sottovoce.simulations.corpus_index import HEADER, WordTable
from sottovoce.simulations.corpus_numbers import name_hashes, number_names
from sottovoce.simulations.corpus_population import CorpusPopulation
from sottovoce.simulations.corpus_progress import IndexProgress
from sottovoce.simulations.corpus_scan import BuildLimits
from sottovoce.simulations.flat_arrays import Bundle, load, write_bundle
from sottovoce.simulations.jsonl import JsonlPopulation
from sottovoce.simulations.parquet import ParquetPopulation
from sottovoce.simulations.populations import make_population

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")

TINY = BuildLimits(chunk_tokens=40, chunk_rows=9, sorted_records=7, bucket_bytes=300)
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks, and no waiting for the disk."""
    monkeypatch.setattr(corpus_build, "BuildLimits", lambda: TINY)
    monkeypatch.setattr(flat_arrays.os, "fsync", lambda handle: None)


def _jsonl(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def _people(users: int = 12, seed: int = 0) -> list[Row]:
    """User k says k + 1 things, in random order."""
    said = [(k, j) for k in range(users) for j in range(k + 1)]
    np.random.default_rng(seed).shuffle(said)
    return [{"user_id": f"u{k}", "text": f"Thing {j} of {k}, please!"} for k, j in said]


def _requests(count: int = 60) -> list[Row]:
    return [
        {
            "user_id": None,
            "tokens": ["Play", "song", str(k % 7), "now"],
            "slots": ["O", "B-song", "I-song", "O" if k % 2 else "B-time"],
            "intent": ["play", "add", "stop"][k % 3],
        }
        for k in range(count)
    ]


def _content(population: CorpusPopulation) -> list[Any]:
    """Everything that a population can be asked for."""
    found = [population.schema, list(population.words), population.held_out, len(population),
             population.activity.dtype, population.activity.tolist(),
             population.held_out_activity().tolist(), population.describe()]
    for examples in (
        population.examples(np.arange(len(population))),
        population.held_out_devices(),
        population.held_out_devices(1),
        population.held_out_examples(),
        population.held_out_examples(3),
    ):
        found.append(None if examples is None else _lists(examples))
    return found


def _lists(examples: Examples) -> list[Any]:
    values = [getattr(examples, field.name) for field in dataclasses.fields(examples)]
    return [None if value is None else (value.dtype, value.tolist()) for value in values]


# --- the same population --------------------------------------------------------------------------

WORD = st.sampled_from(["a", "Ä", "don't", "b", "c", ".", "\ud800", "日本", "x" * 40])


@st.composite
def _corpora(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Training and test rows, with or without users, intents, slots and words."""
    users, labelled = draw(st.booleans()), draw(st.booleans())
    names = [f"user {k}" for k in range(draw(st.integers(1, 8)))]

    def rows(count: int) -> list[Row]:
        found = []
        for k in range(count):
            tokens = draw(st.lists(WORD, min_size=k < 8, max_size=6))
            row: Row = {"tokens": tokens}
            if users:
                row["user_id"] = names[k] if k < len(names) else draw(st.sampled_from(names))
            if labelled:
                row["intent"] = draw(st.sampled_from("uvw"))
                row["slots"] = [draw(st.sampled_from(["O", "B-x", "B-y"])) for _ in tokens]
            found.append(row)
        return found

    return rows(draw(st.integers(8, 40))), rows(draw(st.integers(0, 20)))


@settings(max_examples=25, deadline=None)
@given(corpus=_corpora(), natural=st.booleans(), seed=st.integers(0, 3), zipped=st.booleans())
def test_an_index_holds_the_population_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: tuple[list[Row], list[Row]],
    natural: bool,
    seed: int,
    zipped: bool,
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    train = _jsonl(folder / ("a.jsonl.gz" if zipped else "a.jsonl"), corpus[0])
    test = _jsonl(folder / "t.jsonl", corpus[1]) if any(r["tokens"] for r in corpus[1]) else None
    values: dict[str, Any] = {"seed": seed, "devices": 5, "held_out_fraction": 0.3}
    values["users"] = "auto" if natural else "assigned"
    memory = JsonlPopulation(train, test, index=None, **values)
    indexed = JsonlPopulation(train, test, index=folder / "index", **values)
    assert memory.index is None and indexed.index is not None
    assert _content(indexed) == _content(memory)


@pytest.mark.parametrize("limits", [BuildLimits(), BuildLimits(1, 1, 1, 1), TINY])
def test_limits_change_no_byte_of_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: BuildLimits
) -> None:
    files = f"{_jsonl(tmp_path / 'a.jsonl', _people(9))},{_jsonl(tmp_path / 'b.gz', _people(5))}"
    one = JsonlPopulation(files, index=tmp_path / "one")
    monkeypatch.setattr(corpus_build, "BuildLimits", lambda: limits)
    other = JsonlPopulation(files, index=tmp_path / "other")
    assert _bytes(one) == _bytes(other)


def _bytes(population: CorpusPopulation) -> dict[str, bytes]:
    assert population.index is not None
    return {path.name: path.read_bytes() for path in population.index.iterdir()}


def test_labels_from_a_file_rule_an_index_too(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _requests())
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"intents": ["stop", "play", "add"],
                                  "slots": ["B-song", "I-song", "B-time"]}))
    pair = [JsonlPopulation(train, devices=6, labels=labels, index=index)
            for index in (None, tmp_path)]
    assert pair[0].schema.intents == ("stop", "play", "add")
    assert _content(pair[0]) == _content(pair[1])


def test_example_numbers_pick_the_same_from_an_index(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    pair = [JsonlPopulation(train, index=index) for index in (None, tmp_path)]
    busiest = int(np.argmax(pair[0].activity))
    devices, numbers = np.array([busiest, 0]), [np.array([3, 1]), np.array([0])]
    chosen = [_lists(population.examples(devices, numbers)) for population in pair]
    assert chosen[0] == chosen[1]
    with pytest.raises(IndexError, match="beyond"):
        pair[1].examples(devices, [np.array([99]), np.array([0])])


# --- reading ahead --------------------------------------------------------------------------------

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12)


@settings(deadline=None)
@given(ranges=RANGES)
def test_ranges_that_meet_are_asked_for_once_and_nothing_beside_them(
    ranges: list[tuple[int, int]]
) -> None:
    firsts = np.array([first for first, _ in ranges], dtype=np.int64)
    ends = firsts + np.array([size + 1 for _, size in ranges], dtype=np.int64)
    merged = list(flat_arrays._merged(np.stack([firsts, ends])))
    covered = [page for first, end in merged for page in range(first, end)]
    assert covered == sorted({p for f, e in zip(firsts, ends, strict=True) for p in range(f, e)})
    assert all(end < first for (_, end), (first, _) in zip(merged, merged[1:], strict=False))


def test_what_devices_are_asked_for_is_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", [row | {"user_id": f"u{k % 9}"}
                                          for k, row in enumerate(_requests(80))])
    population = JsonlPopulation(train, index=tmp_path)
    seen: dict[int, set[int]] = {}
    really = flat_arrays.Mapped.expect

    def expect(mapped: flat_arrays.Mapped, starts: np.ndarray, stops: np.ndarray) -> None:
        places = seen.setdefault(mapped.array.ctypes.data, set())
        places.update(p for a, b in zip(starts, stops, strict=True) for p in range(a, b))
        really(mapped, starts, stops)

    monkeypatch.setattr(flat_arrays.Mapped, "expect", expect)
    whole, devices = population._corpus.train, np.array([5, 2])
    before = _lists(population.examples(devices))
    population.expect(devices)
    bounds = [whole.device_offsets[[k, k + 1]] for k in devices]
    rows = {row for first, last in bounds for row in range(first, last)}
    words = {at for row in rows for at in range(whole.offsets[row], whole.offsets[row + 1])}
    assert seen[whole.tokens.ctypes.data] == seen[whole.slots.ctypes.data] == words
    assert seen[whole.intent.ctypes.data] == rows
    assert seen[whole.offsets.ctypes.data] >= rows | {row + 1 for row in rows}
    assert _lists(population.examples(devices)) == before


@pytest.mark.parametrize("devices", [[], [0], list(range(10))])
def test_any_devices_may_be_expected(tmp_path: Path, devices: list[int]) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    for index in (None, tmp_path):
        JsonlPopulation(train, index=index).expect(np.array(devices, dtype=np.int64))


@pytest.mark.parametrize("lines, named", MALFORMED)
def test_a_malformed_file_gives_the_same_line_as_in_memory(
    tmp_path: Path, lines: list[Any], named: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    ))
    said = []
    for index in (None, tmp_path / "index"):
        with pytest.raises(DataError, match=named) as error:
            JsonlPopulation(path, index=index)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert [p.suffix for p in (tmp_path / "index").iterdir()] == [".lock"]


def test_a_fault_far_into_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    rows: list[Row] = [*_people(), {"user_id": "mute", "text": " "}, *_people(3), {"text": 7}]
    for last in (len(rows), len(rows) - 1):
        said = []
        for index in (None, tmp_path / "index"):
            with pytest.raises(DataError) as error:
                JsonlPopulation(_jsonl(tmp_path / "a.jsonl", rows[:last]), index=index)
            said.append(str(error.value))
        assert said[0] == said[1]
    assert "line 79: device 'mute'" in said[0]


# --- numbering without a dictionary ---------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(chunks=st.lists(st.lists(st.text(max_size=2), unique=True), max_size=6),
       most=st.sampled_from([1, 5, 1000]))
def test_names_are_numbered_by_first_appearance(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[str]], most: int
) -> None:
    folder = tmp_path_factory.mktemp("names")
    numbers: dict[str, int] = {}
    parts, expected = [], []
    for place, names in enumerate(chunks):
        expected += [numbers.setdefault(name, len(numbers)) for name in names]
        write_bundle(folder / str(place), {"word_hashes": name_hashes(names)})
        parts.append((Bundle(folder / str(place)), len(names)))
    assert number_names(parts, "word", folder, most) == len(numbers)
    assert load(folder, "word_numbers", "i4").tolist() == expected


def test_a_word_table_is_a_list_of_words() -> None:
    words = ["", "a", "\ud800é", "日本"] * 9000
    coded = [word.encode("utf-8", "surrogatepass") for word in words]
    table = WordTable(np.frombuffer(b"".join(coded), dtype=np.uint8),
                      np.append(0, np.cumsum([len(word) for word in coded])))
    assert list(table) == words and len(table) == len(words)
    assert (table[2], table[-1], table[1:4]) == (words[2], words[-1], words[1:4])
    with pytest.raises(IndexError):
        table[len(words)]


# --- builds that are killed -----------------------------------------------------------------------


class Killed(BaseException):
    """Ends a build like a kill: nothing of it is caught on the way."""


def test_a_build_killed_at_any_write_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people(4))
    test = _jsonl(tmp_path / "t.jsonl.gz", _people(4, seed=1))
    whole = _bytes(JsonlPopulation(train, test, index=tmp_path / "whole"))
    left, calls, kills = 0, 0, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == left:
            raise Killed

    monkeypatch.setattr(flat_arrays.os, "fsync", fsync)
    for left in range(1, 1000):
        calls = 0
        try:
            JsonlPopulation(train, test, index=tmp_path / f"killed at {left}")
            break
        except Killed:
            kills += 1
        again = JsonlPopulation(train, test, index=tmp_path / f"killed at {left}")
        assert _bytes(again) == whole
    assert kills > 30


def test_a_build_that_is_killed_again_and_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people(6))
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:  # more than a chunk's, fewer than a build's
            raise Killed

    monkeypatch.setattr(flat_arrays.os, "fsync", fsync)
    kills = 0
    while True:
        calls = 0
        try:
            population = JsonlPopulation(train, index=tmp_path / "index")
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert kills > 3
    assert _content(population) == _content(JsonlPopulation(train, index=None))


def test_a_real_kill_leaves_finished_chunks_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_build, "BuildLimits", lambda: BuildLimits(chunk_rows=300))
    train = _jsonl(tmp_path / "a.jsonl", _people(60))
    program = textwrap.dedent(
        """
        import sys, time
        from sottovoce.simulations import corpus_build, corpus_scan
        from sottovoce.simulations.jsonl import JsonlPopulation
        corpus_build.BuildLimits = lambda: corpus_scan.BuildLimits(chunk_rows=100)
        write = corpus_scan.Journal.append
        def slowly(journal, note):
            write(journal, note)
            print(flush=True)
            time.sleep(60 if len(journal.notes) == 3 else 0)
        corpus_scan.Journal.append = slowly
        JsonlPopulation(sys.argv[1], index=sys.argv[2])
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(train), str(tmp_path / "index")],
                             stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [journal] = (tmp_path / "index").glob("*.partial/journal.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('{"chunk": {"file": 0, "num')  # as a crash of the whole machine may leave it
    population = JsonlPopulation(train, index=tmp_path / "index")
    assert _content(population) == _content(JsonlPopulation(train, index=None))
    assert not list((tmp_path / "index").glob("*.partial"))


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people(6))
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(flat_arrays.os, "fsync", fsync)
    with pytest.raises(DataError, match="No space left.*set population.index") as error:
        JsonlPopulation(train, index=tmp_path / "index")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "index").glob("*.partial/chunks/*"))
    again = JsonlPopulation(train, index=tmp_path / "index")
    assert _content(again) == _content(JsonlPopulation(train, index=None))


def test_a_file_that_changes_under_the_reader_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people(6))

    def fsync(handle: int) -> None:
        with train.open("a") as file:
            file.write(json.dumps(_people(1)[0]) + "\n")

    monkeypatch.setattr(flat_arrays.os, "fsync", fsync)
    with pytest.raises(DataError, match="changed while it was read"):
        JsonlPopulation(train, index=tmp_path / "index")


# --- one index for many ---------------------------------------------------------------------------


def test_an_index_is_built_once_for_the_same_files_and_settings(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())

    def index(**values: Any) -> Path | None:
        return JsonlPopulation(train, index=tmp_path / "index", **values).index

    first = index()
    assert first is not None
    made = (first / HEADER).stat().st_mtime_ns
    assert index(max_held_out_examples=3, name="mine") == first == index()
    assert (first / HEADER).stat().st_mtime_ns == made
    assert len({first, index(seed=1), index(held_out_fraction=0.2), index(users="natural")}) == 4
    assert index(users="natural", devices=7) == index(users="natural")
    _jsonl(train, _people(seed=5))
    assert index() != first


def test_an_index_is_for_its_owner_alone(tmp_path: Path) -> None:
    index = JsonlPopulation(_jsonl(tmp_path / "a.jsonl", _people()), index=tmp_path).index
    assert index is not None and index.stat().st_mode & 0o777 == 0o700


def test_large_files_go_to_the_cache_folder_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert JsonlPopulation(train).index is None
    monkeypatch.setattr(corpus_build, "LARGE", train.stat().st_size - 1)
    index = JsonlPopulation(train).index
    assert index is not None and index.parent == tmp_path / "cache" / "sottovoce" / "index"
    assert JsonlPopulation(train, index=None).index is None
    with pytest.raises(ConfigError, match="population.index is empty"):
        JsonlPopulation(train, index="")


def test_who_comes_second_waits_and_a_lock_left_behind_holds_nobody(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    index = JsonlPopulation(train, index=tmp_path / "one").index
    assert index is not None
    lock = tmp_path / "two" / f"{index.name}.lock"
    lock.parent.mkdir()
    lock.write_text("process 999999999 on nowhere\n")  # as a kill leaves it
    found: list[CorpusPopulation] = []
    second = threading.Thread(
        target=lambda: found.append(JsonlPopulation(train, index=tmp_path / "two"))
    )
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second.start()
        time.sleep(0.3)
        assert not found and second.is_alive()
    second.join(timeout=30)
    assert _bytes(found[0]).keys() and lock.read_text().startswith(f"process {os.getpid()} on ")


def test_an_indexed_population_travels_as_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_build, "BuildLimits", BuildLimits)
    rows = [{"user_id": f"u{k % 50}", "text": f"word{k} and {k}"} for k in range(3000)]
    train = _jsonl(tmp_path / "a.jsonl", rows)
    indexed = JsonlPopulation(train, index=tmp_path / "index", name="mine")
    memory = JsonlPopulation(train, index=None, name="mine")
    assert len(pickle.dumps(indexed)) < 2000 < len(pickle.dumps(memory)) // 10
    for population in (indexed, memory):
        again = pickle.loads(pickle.dumps(population))
        assert type(again) is JsonlPopulation and again.index == population.index
        assert _content(again) == _content(memory)


def test_an_index_is_mapped_and_forgets_what_it_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    population = JsonlPopulation(train, index=tmp_path / "index")
    tokens = population._corpus.train.tokens
    assert not tokens.flags.owndata and not tokens.flags.writeable
    released = []
    corpus = dataclasses.replace(population._corpus, release=lambda: released.append(1))
    monkeypatch.setattr(population, "_corpus", corpus)
    for _ in range(100):
        population.examples(np.arange(len(population)))
    assert 2 <= len(released) <= 100


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_index_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    index = JsonlPopulation(train, _jsonl(tmp_path / "t.jsonl", _people()), index=tmp_path).index
    assert index is not None
    for path in sorted(index.iterdir()):
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        longer, cut = whole + b"\0", whole[:-2]
        for damaged in (flipped, longer, cut, b"", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if path.name == HEADER and damaged is None:
                JsonlPopulation(train, tmp_path / "t.jsonl", index=tmp_path)  # made again
                assert path.read_bytes() == whole
                continue
            with pytest.raises(DataError, match="cannot be used: .*delete that folder") as error:
                JsonlPopulation(train, tmp_path / "t.jsonl", index=tmp_path)
            assert str(index) in str(error.value) and "\n" not in str(error.value)
            path.write_bytes(whole)
    JsonlPopulation(train, tmp_path / "t.jsonl", index=tmp_path)


def test_a_header_of_another_version_or_edited_by_hand_is_refused(tmp_path: Path) -> None:
    train = _jsonl(tmp_path / "a.jsonl", _people())
    index = JsonlPopulation(train, index=tmp_path).index
    assert index is not None
    header = json.loads((index / HEADER).read_text())
    (index / HEADER).write_text(json.dumps(header | {"held_out": 0}))
    with pytest.raises(DataError, match="was changed"):
        JsonlPopulation(train, index=tmp_path)


# --- tables ---------------------------------------------------------------------------------------


def _table(rows: list[Row]) -> Any:
    return pyarrow.Table.from_pylist(rows)


def _write_stream(table: Any, path: Path) -> None:
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=11)


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "parquet": lambda table, path: parquet.write_table(table, path, row_group_size=13),
    "feather": lambda table, path: feather.write_feather(table, str(path), chunksize=11),
    "stream": _write_stream,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("rows", [_people(), _requests()], ids=["people", "requests"])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_same_rows_are_the_same_population_in_every_format(
    tmp_path: Path, kind: str, rows: list[Row], indexed: bool
) -> None:
    index = tmp_path / "index" if indexed else None
    lines = JsonlPopulation(_jsonl(tmp_path / "a.jsonl", rows), devices=7, index=None)
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](_table(rows), path)
    table = ParquetPopulation(path, devices=7, index=index, name="jsonl")
    assert (table.index is not None) == indexed
    content = _content(table)
    content[7]["source"] = str(tmp_path / "a.jsonl")
    assert content == _content(lines)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_is_taken_up_where_a_killed_build_left_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls, kills = tmp_path / f"a.{kind}", 0, 0
    WRITERS[kind](_table(_people(6)), path)

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise Killed

    monkeypatch.setattr(flat_arrays.os, "fsync", fsync)
    while True:
        calls = 0
        try:
            population = ParquetPopulation(path, index=tmp_path / "index")
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert kills > 3
    assert _content(population) == _content(ParquetPopulation(path, index=None))


def test_columns_can_have_other_names_types_and_neighbours(tmp_path: Path) -> None:
    rows = _people(5)
    plain = JsonlPopulation(_jsonl(tmp_path / "a.jsonl", [
        row | {"user_id": row["user_id"][1:]} for row in rows
    ]), index=None)
    table = pyarrow.table({
        "who": pyarrow.array([int(row["user_id"][1:]) for row in rows], pyarrow.int64()),
        "when": pyarrow.array([3.5] * len(rows)),
        "message": pyarrow.array([row["text"] for row in rows]).dictionary_encode(),
    })
    parquet.write_table(table, tmp_path / "a.parquet")
    named = {"user_id": "who", "text": "message"}
    renamed = make_population({"name": "parquet", "path": str(tmp_path / "a.parquet"),
                               "columns": named, "index": None})
    devices = np.arange(len(plain))
    assert _lists(renamed.examples(devices)) == _lists(plain.examples(devices))
    assert list(renamed.words) == list(plain.words)


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"text": "message"}, "no column 'message', it has .*text: set population.columns.text"),
        ({"text": "user_id"}, "two fields have the column 'user_id'"),
        ({"words": "text"}, "columns.words is no field"),
    ],
)
def test_impossible_columns_are_one_line(
    tmp_path: Path, columns: dict[str, str], named: str
) -> None:
    parquet.write_table(_table(_people(3)), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=named):
        ParquetPopulation(tmp_path / "a.parquet", columns=columns)


def test_a_table_without_text_says_what_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a"], "id": ["u"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="neither 'text' nor 'tokens', it has body, id"):
        ParquetPopulation(tmp_path / "a.parquet")


def test_a_malformed_row_of_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(_table([*_people(6), {"user_id": "x", "text": None}]), path)
    for index in (None, tmp_path / "index"):
        with pytest.raises(DataError, match="a.parquet row 22: neither 'text' nor 'tokens'"):
            ParquetPopulation(path, index=index)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="row 1: text is 1, not a string"):
        ParquetPopulation(path)


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    parquet.write_table(_table(_people()), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    _jsonl(tmp_path / "lines.parquet", _people())
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("cut.parquet", "lines.parquet", "empty.parquet", "absent.parquet", ""):
        with pytest.raises(DataError) as error:
            ParquetPopulation(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_without_pyarrow_there_is_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *others: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'sottovoce\[parquet\]'"):
        ParquetPopulation(tmp_path / "a.parquet")


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled, terminal", [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_that_wants_it(enabled: bool, terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with IndexProgress(enabled, console) as bar:
        bar("reading", 0.5)
        bar("sorting", 1.0)
        bar.message("waiting for [process 7]")
    assert ("indexing: sorting" in screen.getvalue()) == (enabled and terminal)
    assert ("waiting for [process 7]" in screen.getvalue()) == (enabled and terminal)
