"""A device's examples: nothing lost, nothing left behind, nobody else's business."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sottovoce.client.agent import device_cli
from sottovoce.client.agent.journal import Journal, StepCost
from sottovoce.client.agent.store import DAY_S, DeviceStore
from sottovoce.client.agent.stored_rows import EARLIEST
from sottovoce.client.errors import DataError, RunError, SottovoceError

ROWS = [
    {"text": "Play some jazz, please!", "intent": "PlayMusic"},
    {"tokens": ["book", "it"], "intent": "Book", "slots": ["O", "B-thing"]},
    {"text": "what's up?"},
]


def start(code: str, *words: str) -> subprocess.Popen[str]:
    """A process that runs `code` with `words` as its arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def contents(folder: Path) -> bytes:
    """Every byte in the files of a folder."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# -- adding and reading ----------------------------------------------------------------------------


def test_rows_come_back_as_they_were_added(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "store")
    assert store.add(ROWS) == 3
    first, second, third = store.rows()
    assert first.tokens == ("play", "some", "jazz", ",", "please", "!")
    assert (first.intent, first.slots) == ("PlayMusic", None)
    assert (second.tokens, second.slots) == (("book", "it"), ("O", "B-thing"))
    assert (third.tokens, third.intent) == (("what's", "up", "?"), None)
    store.close()
    again = DeviceStore(tmp_path / "store")
    assert again.rows(2) == [first, second]
    assert (again.count(), again.count(1), again.last_id()) == (3, 1, 3)


def test_ids_are_never_given_twice(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    assert store.last_id() == 0
    store.add(ROWS)
    store.forget()
    assert (store.count(), store.last_id()) == (0, 3)
    store.add(ROWS[:1])
    assert store.rows()[0].id == 4
    assert store.rows(3) == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "neither 'text' nor 'tokens'"),
        ({"text": 3}, "text is 3"),
        ({"tokens": ["a", 1]}, "tokens holds 1"),
        ({"text": "a", "intent": 7}, "intent is 7"),
        ({"text": "a", "intent": "\ud800"}, "cannot be printed"),
        ({"text": "a b", "slots": ["O"]}, "2 tokens but 1 slots"),
        ({"text": "a", "slots": ["I-x"]}, "write B-x"),
        ({"text": "a", "time": "now"}, 'time is "now"'),
        ({"text": "a", "time": float("nan")}, "time is NaN"),
        ({"text": "a", "time": 10**400}, "time is 1000"),
        ({"text": "a", "time": True}, "time is true"),
    ],
)
def test_a_malformed_row_is_one_line_with_its_number_and_nothing_of_its_piece_is_stored(
    tmp_path: Path, row: dict[str, object], complaint: str
) -> None:
    store = DeviceStore(tmp_path)
    with pytest.raises(DataError, match=f"^example 2: .*{complaint}[^\n]*$"):
        store.add([ROWS[0], row])
    assert store.count() == 0


def test_rows_without_a_word_are_left_out_and_odd_text_is_kept(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    odd = ["\ud800 half", "naïve", "nul\0", "語"]
    assert store.add([{"text": " "}, {"tokens": []}, {"tokens": odd}]) == 1
    assert list(store.rows()[0].tokens) == odd


def test_many_rows_are_added_from_a_stream(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    assert store.add({"text": f"number {n}"} for n in range(2500)) == 2500
    with pytest.raises(DataError, match=r"^example 1501: "):
        store.add({"text": "n" if n else ""} if n < 1500 else {} for n in range(2500))
    assert store.count() == 3499


# -- several programs ------------------------------------------------------------------------------


ADDER = """
    import sys
    from sottovoce.client.agent.store import DeviceStore
    store = DeviceStore(sys.argv[1])
    for number in range(40):
        store.add([{"text": f"{sys.argv[2]} {number}"}])
"""


def test_apps_add_at_once_from_the_very_start_while_an_agent_holds_the_store(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "store"
    apps = [start(ADDER, str(folder), f"app{number}") for number in range(4)]
    assert [app.communicate(timeout=60)[1] for app in apps] == ["", "", "", ""]
    store = DeviceStore(folder)
    with store.held():
        app = start(ADDER, str(folder), "late")
        assert app.communicate(timeout=60)[1] == ""
    said = [row.tokens for row in store.rows()]
    assert len(said) == len(set(said)) == 200


def test_two_agents_cannot_hold_one_store_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    other = start(
        """
        import sys, time
        from sottovoce.client.agent.store import DeviceStore
        with DeviceStore(sys.argv[1]).held():
            print("held", flush=True)
            time.sleep(60)
        """,
        str(tmp_path),
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="in use by another agent"), store.held():
        pass
    with pytest.raises(RunError, match="in use by another agent"):
        store.forget()
    other.kill()
    other.communicate()
    with store.held(), pytest.raises(RunError, match="in use"), DeviceStore(tmp_path).held():
        pass


def test_a_writer_killed_at_any_moment_leaves_whole_rows(tmp_path: Path) -> None:
    code = """
        import sys
        from sottovoce.client.agent.store import DeviceStore
        store = DeviceStore(sys.argv[1])
        number = 0
        while True:
            store.add([{"text": f"first {number}"}, {"text": f"second {number}"}])
            number += 1
            print(number, flush=True)
    """
    for patience_s in (0.0, 0.01, 0.05):
        folder = tmp_path / str(patience_s)
        writer = start(code, str(folder))
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(patience_s)
        writer.kill()
        acknowledged = 1 + len(writer.stdout.read().split())
        writer.communicate()
        count = DeviceStore(folder).count()
        assert count % 2 == 0
        assert acknowledged <= count / 2 <= acknowledged + 1


# -- failures --------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    DeviceStore(tmp_path).add(ROWS)
    writer = start(
        """
        import resource, sys
        from sottovoce.client.agent.store import DeviceStore
        from sottovoce.client.errors import RunError
        store = DeviceStore(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            store.add({"text": "x" * 500} for _ in range(5000))
        except RunError as error:
            print(error)
        print(len(store.rows(3)))
        """,
        str(tmp_path),
    )
    out, err = writer.communicate(timeout=60)
    line, rows = out.splitlines()
    assert (err, rows) == ("", "3")
    assert "cannot be used" in line and "free" in line
    store = DeviceStore(tmp_path)
    assert store.rows(3)[0].tokens[0] == "play"
    before = store.count()
    assert before < 5003
    assert store.add(ROWS) == 3 and store.count() == before + 3


def test_sqlite_says_that_the_disk_is_full(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    with store._database.reading() as connection:
        connection.execute("PRAGMA max_page_count=8")
    with pytest.raises(RunError, match="the disk is full.*free some space"):
        store.add({"text": "x" * 500} for _ in range(500))
    assert store.count() == 0


def test_damaged_foreign_and_newer_files_are_told_apart(tmp_path: Path) -> None:
    for name in ("damaged", "foreign", "newer"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "examples.sqlite").write_bytes(b"no database " * 1000)
    with sqlite3.connect(tmp_path / "foreign" / "examples.sqlite") as foreign:
        foreign.execute("CREATE TABLE photos (id)")
    DeviceStore(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer" / "examples.sqlite") as newer:
        newer.execute("PRAGMA user_version=99")
    for name, words in (
        ("damaged", "is damaged .*restore"),
        ("foreign", "database of another program"),
        ("newer", "version 99.*install the newer"),
    ):
        with pytest.raises(DataError, match=f"^[^\n]*{words}[^\n]*$"):
            DeviceStore(tmp_path / name)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(DataError, match=r"holds other things \(letters.txt\)"):
        DeviceStore(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        DeviceStore(tmp_path / "letters.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
    with pytest.raises(DataError, match="is no device store"):
        DeviceStore(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()


def test_only_the_owner_can_read_a_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    store = DeviceStore(folder)
    store.add(ROWS)
    journal = Journal(folder)
    journal.begin("a" * 32, "run", 1, StepCost(1.0, 0.1, 2))
    with store.held():
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {name for name, mode in modes.items() if mode == 0o700} == {"identity", "spool", "cache"}
    assert {mode for mode in modes.values() if mode != 0o700} == {0o600}
    assert {"examples.sqlite-wal", "journal.sqlite-wal", "agent.lock"} <= modes.keys()
    (folder / "examples.sqlite").chmod(0o644)
    DeviceStore(folder)
    assert stat.S_IMODE((folder / "examples.sqlite").stat().st_mode) == 0o600


# -- deletion --------------------------------------------------------------------------------------


def test_purge_deletes_what_is_older_than_the_window_and_leaves_no_trace(tmp_path: Path) -> None:
    now = EARLIEST + 1000 * DAY_S
    store = DeviceStore(tmp_path)
    store.add({"text": f"oldsecret {n}", "time": now - 31 * DAY_S} for n in range(300))
    store.add([{"text": "young one", "time": now - 29 * DAY_S}])
    assert b"oldsecret" in contents(tmp_path)
    assert store.purge(now) == 0  # there is no window
    (tmp_path / "policy.toml").write_text("retention_days = 30")
    assert store.purge(now) == 300
    assert b"oldsecret" not in contents(tmp_path)
    assert [row.tokens for row in store.rows()] == [("young", "one")]
    assert store.purge(now + 2 * DAY_S, retention_days=1000) == 0


def test_a_clock_that_is_not_set_neither_dates_nor_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeviceStore(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 60.0)
    store.add(ROWS)
    assert store.span() is None
    assert store.purge(120.0, retention_days=0.0001) == 0
    now = EARLIEST + DAY_S
    assert store.purge(now, retention_days=30) == 0
    assert store.span() == (now, now)
    assert store.purge(now + 31 * DAY_S, retention_days=30) == 3


def test_forget_deletes_examples_and_updates_but_not_what_was_spent(tmp_path: Path) -> None:
    store, journal = DeviceStore(tmp_path), Journal(tmp_path)
    store.add([{"text": f"oldsecret {n}"} for n in range(300)])
    journal.begin("a" * 32, "run", 1, StepCost(1.0, 0.1, 2))
    (tmp_path / "spool" / "deep").mkdir()
    (tmp_path / "spool" / "deep" / "update").write_bytes(b"update")
    (tmp_path / "identity" / "key").write_bytes(b"key")
    assert store.forget() == 300
    left = contents(tmp_path)
    assert b"oldsecret" not in left and b"update" not in left and b"key" in left
    assert journal.costs() == [(StepCost(1.0, 0.1, 2), 1)]


# -- sottovoce device ------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = device_cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_command_adds_files_plain_zipped_and_from_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\ufeff" + "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    plain, zipped, store = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "store"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    stdin = io.BufferedReader(io.BytesIO(gzip.compress(text.encode())))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    for file, total in ((plain, 3), (zipped, 6), ("-", 9)):
        code, out, _ = said(capsys, "add", file, "--store", store)
        assert code == 0
        assert out == f"3 examples added, 1 without a word left out; {total} in {store}\n"
    rows = DeviceStore(store).rows()
    assert rows[0].tokens == rows[3].tokens == rows[6].tokens


def test_the_command_adds_all_lines_or_none_and_says_which_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = tmp_path / "a.jsonl", tmp_path / "store"
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}' * 1000)[:-20])
    (tmp_path / "c.gz").write_text("{}")
    file.write_text('{"text": "a"}\n{"text": 5}\n')
    for words, complaint in (
        (("add", file, "--store", store), f"{file} line 2: text is 5"),
        (("add", tmp_path / "no", "--store", store), "does not exist"),
        (("add", broken, "--store", store), "is a broken gzip file"),
        (("add", tmp_path / "c.gz", "--store", store), "is not a gzip file"),
        (("add", tmp_path, "--store", store), "cannot be read"),
        (("add", file), "--store"),
        (("ad", file, "--store", store), "'ad'"),
        (("list", "--store", store), "is no device store"),
        (("forget", "--store", store), "is no device store"),
        (("purge", "--store", store), "has no retention_days"),
    ):
        code, out, err = said(capsys, *words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("sottovoce: ") and complaint in err
        assert not store.exists()


def test_list_shows_counts_and_epsilon_but_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, journal = DeviceStore(tmp_path), Journal(tmp_path)
    store.add(ROWS)
    journal.begin("a" * 32, "spring", 7, StepCost(1.0, 0.25, 8))
    (tmp_path / "policy.toml").write_text("max_epsilon = 20")
    code, out, _ = said(capsys, "list", "--store", tmp_path)
    assert code == 0
    for words in ("3 examples", "1 participation", "(of 20)", "delta 1e-05", "spring", "begun"):
        assert words in out
    assert "jazz" not in out and "PlayMusic" not in out
    facts = json.loads(said(capsys, "list", "--json", "--store", tmp_path)[1])
    assert (facts["examples"], facts["participations"]) == (3, 1)
    assert 0 < facts["epsilon"] < 20
    journal.begin("b" * 32, "spring", 8, StepCost(None, 0.25, 8))
    assert json.loads(said(capsys, "list", "--json", "--store", tmp_path)[1])["epsilon"] is None
    assert "infinite" in said(capsys, "list", "--store", tmp_path)[1]


def test_purge_and_forget_say_what_they_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = DeviceStore(tmp_path)
    store.add([{"text": "old", "time": 5.0}, {"text": "new"}])
    (tmp_path / "policy.toml").write_text("retention_days = 30")
    _, out, _ = said(capsys, "purge", "--store", tmp_path)
    assert out == "1 example older than 30 days deleted; 1 left\n"
    _, out, _ = said(capsys, "forget", "--store", tmp_path)
    assert out.startswith("1 example deleted") and "journal stays" in out


def test_help_names_every_verb_and_every_key_of_the_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DeviceStore(tmp_path)
    code, policy, _ = said(capsys, "policy", "--json", "--store", tmp_path)
    values = json.loads(policy)
    _, shown, _ = said(capsys, "--help")
    for name in (*values.keys() - {"eligibility"}, *values["eligibility"].keys()):
        assert name in shown
    for verb in ("add", "list", "purge", "forget", "policy"):
        assert f"device {verb}" in shown
        assert said(capsys, verb, "--help")[1] == shown


def test_errors_are_for_people(tmp_path: Path) -> None:
    """Whatever a store raises is an error with one line."""
    DeviceStore(tmp_path).close()
    (tmp_path / "examples.sqlite").unlink()
    (tmp_path / "examples.sqlite").mkdir()
    with pytest.raises(SottovoceError, match=r"^[^\n]+$"):
        DeviceStore(tmp_path)
