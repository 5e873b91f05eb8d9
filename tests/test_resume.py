"""A run that was stopped anywhere and resumed ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import FIXED_NOISE, SMALL, Killed, metrics, model, resume, run, summary

from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.server import callbacks, checkpoints, training
from sottovoce.server.checkpoints import load_checkpoint, load_latest
from sottovoce.strategies.noised_sum import NoisedSum

SETTINGS = ("privacy=both", *FIXED_NOISE, "seed=7", "run.evaluate_every=2")
LONG = 15


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(folder, *SETTINGS) == 0
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics(folder)]


def assert_same_end(folder: Path, other: Path) -> None:
    assert model(folder) == model(other)
    assert without_seconds(folder) == without_seconds(other)
    assert Ledger.load(folder / "ledger.json") == Ledger.load(other / "ledger.json")
    a, b = summary(folder), summary(other)
    assert (a["status"], a["epsilon"], a["metrics"]) == (b["status"], b["epsilon"], b["metrics"])
    left = [path.name for path in folder.rglob(".*")]
    assert left == [], "drafts are left behind"
    assert not (folder / "checkpoints" / "secret.key").exists()


def rounds_in(ledger: Ledger) -> set[int]:
    return {event.round for event in ledger.events if event.round is not None}


def assert_ledger_leads(folder: Path) -> None:
    """Whatever was released stands in the ledger that is on disk."""
    newest = load_latest(folder / "checkpoints")[0]
    recorded = rounds_in(Ledger.load(folder / "ledger.json"))
    assert recorded >= set(range(1, newest.round + 1))
    assert recorded >= {r["round"] for r in metrics(folder)} - {0}
    assert rounds_in(newest.ledger) == set(range(1, newest.round + 1))


# -- killed ----------------------------------------------------------------------------------------


def wait_for_round(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    path = folder / "metrics.jsonl"
    while not (path.exists() and f'{{"round": {number},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


# A suite that runs in the background hands down an ignored SIGINT.
LISTENING = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from sottovoce.server.cli import main; sys.exit(main())"
)


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [*SMALL, *SETTINGS, f"rounds={LONG}", f"run.dir={folder}", *overrides]
    command = [sys.executable, "-c", LISTENING, "simulate", *words]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ},
    )


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "long"
    assert run(folder, *SETTINGS, f"rounds={LONG}") == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_resumes_to_the_same_bytes(
    number: signal.Signals, tmp_path: Path, undisturbed_long: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_round(process, folder, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert_ledger_leads(folder)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"sottovoce simulate resume={folder}" in out
        assert "Traceback" not in out + err
        assert summary(folder)["status"] == "interrupted"
    else:
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
    assert len(metrics(folder)) < LONG
    assert (folder / "checkpoints" / "secret.key").stat().st_mode & 0o777 == 0o600
    assert resume(folder) == 0
    assert_same_end(folder, undisturbed_long)


def killing(function: Callable[..., Any], *, at: int, before: bool = True) -> Callable[..., Any]:
    """`function`, but its call number `at` is the last thing that the process does."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            raise Killed
        result = function(*args, **kwargs)
        if calls == at:
            raise Killed
        return result

    return wrapped


# Callbacks are told of round 0 too, so their third call is round 2; the first checkpoint is
# written before round 0 is told, and again then.
POINTS = {
    "while evaluating for the first time": (training.Evaluator, "__call__", 1, True),
    "before the first record": (callbacks.LedgerFile, "on_round", 1, False),
    "after the cohort was asked": (NoisedSum, "configure_train", 2, False),
    "after the sum was noised": (NoisedSum, "aggregate_train", 2, False),
    "before the ledger was saved": (callbacks.LedgerFile, "on_round", 3, True),
    "between ledger and metrics": (callbacks.MetricsFile, "on_round", 3, True),
    "between metrics and checkpoint": (callbacks.Checkpoints, "on_round", 3, True),
    "between checkpoint and bar": (callbacks.Bar, "on_round", 3, True),
    "while a checkpoint was written": (checkpoints, "write_synced", 24, True),
    "after a checkpoint was moved into place": (checkpoints, "_sync_folder", 4, True),
    "before the results were written": (training, "write_results", 1, True),
    "after the results were written": (training, "write_results", 1, False),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_it_resumes_to_the_same_bytes(
    point: str, tmp_path: Path, undisturbed: Path
) -> None:
    owner, name, at, before = POINTS[point]
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing(getattr(owner, name), at=at, before=before))
        with pytest.raises(Killed):
            run(folder, *SETTINGS)
    if (folder / "metrics.jsonl").exists():
        assert_ledger_leads(folder)
    drafts = list((folder / "checkpoints").glob(".round-*"))
    assert bool(drafts) == (point == "while a checkpoint was written")
    code = resume(folder)
    assert code == (1 if point == "after the results were written" else 0)
    assert_same_end(folder, undisturbed)


def test_a_run_may_be_stopped_in_every_round(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    for call in range(3):
        with pytest.MonkeyPatch.context() as patch:
            wrapped = killing(NoisedSum.aggregate_train, at=1 if call == 0 else 2)
            patch.setattr(NoisedSum, "aggregate_train", wrapped)
            with pytest.raises(Killed):
                run(folder, *SETTINGS) if call == 0 else resume(folder)
    assert resume(folder) == 0
    assert_same_end(folder, undisturbed)


def test_the_ledger_on_disk_never_forgets_a_round_that_was_released(tmp_path: Path) -> None:
    """Rounds after the last checkpoint are done again; until then their events stay."""
    folder = tmp_path / "run"
    settings = (*SETTINGS, "run.checkpoint_every=4", "rounds=5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisedSum, "aggregate_train", killing(NoisedSum.aggregate_train, at=4))
        with pytest.raises(Killed):
            run(folder, *settings)
    path = folder / "ledger.json"
    assert rounds_in(Ledger.load(path)) == {1, 2, 3}
    assert load_latest(folder / "checkpoints")[0].round == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.MetricsFile, "on_round", killing(
            callbacks.MetricsFile.on_round, at=2))  # fmt: skip
        with pytest.raises(Killed):
            resume(folder)
    assert rounds_in(Ledger.load(path)) == {1, 2, 3}, "round 1 done again, 2 and 3 not yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisedSum, "aggregate_train", interrupting(2))
        assert resume(folder) == 130
    assert rounds_in(Ledger.load(path)) == {1, 2, 3}
    stated = summary(folder)["epsilon"]["device"]["epsilon"]
    assert stated == epsilon(Ledger.load(path), 1e-5, unit="device", observer="release")
    assert resume(folder) == 0
    assert rounds_in(Ledger.load(path)) == {1, 2, 3, 4, 5}
    assert run(tmp_path / "whole", *settings) == 0
    assert_same_end(folder, tmp_path / "whole")


def test_a_metrics_line_cut_short_is_written_again(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    stop_after(folder, 2)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "dev')
    assert resume(folder) == 0
    assert_same_end(folder, undisturbed)


def test_without_a_checkpoint_every_round_the_rounds_since_are_run_again(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = (*SETTINGS, "run.checkpoint_every=2", "rounds=5")
    assert run(whole, *settings) == 0
    assert load_latest(whole / "checkpoints")[0].round == 5, "the last round has a checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisedSum, "aggregate_train", interrupting(4))
        assert run(folder, *settings) == 130
    assert summary(folder)["rounds"] == 2
    assert [record["round"] for record in metrics(folder)] == [0, 1, 2]
    assert resume(folder) == 0
    assert_same_end(folder, whole)


# -- interrupted -----------------------------------------------------------------------------------


def interrupting(call: int) -> Callable[..., Any]:
    real, calls = NoisedSum.aggregate_train, 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*args)

    return wrapped


def stop_after(folder: Path, rounds: int, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoisedSum, "aggregate_train", interrupting(rounds + 1))
        assert run(folder, *SETTINGS, *overrides) == 130


def test_an_interrupted_run_leaves_a_model_its_ledger_and_its_secret(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    stop_after(folder, 2)
    assert_ledger_leads(folder)
    state, _ = load_latest(folder / "checkpoints")
    assert state.round == summary(folder)["rounds"] == 2
    assert rounds_in(Ledger.load(folder / "ledger.json")) == {1, 2}
    assert model(folder) == (folder / "checkpoints/round-000002/model.safetensors").read_bytes()
    assert (folder / "checkpoints" / "secret.key").exists()
    assert resume(folder) == 0
    assert_same_end(folder, undisturbed)


def test_interrupted_before_its_first_record_it_still_resumes(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Evaluator, "__call__", interrupt)
        assert run(folder, *SETTINGS, "run.report=true") == 130
    assert summary(folder)["rounds"] == 0
    assert summary(folder)["epsilon"]["device"]["epsilon"] == 0
    assert resume(folder) == 0
    assert model(folder) == model(undisturbed)


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


# -- damaged ---------------------------------------------------------------------------------------


def cut_in_half(checkpoint: Path, name: str) -> None:
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: len(data) // 2])


def remove(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()


def flip(checkpoint: Path, name: str) -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[-5] ^= 1
    (checkpoint / name).write_bytes(bytes(data))


def empty(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"{}")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after round 2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(folder, 2)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut_in_half, "model.safetensors"),
        (cut_in_half, "state.json"),
        (remove, "ledger.json"),
        (remove, "state.json"),
        (flip, "participation.safetensors"),
        (empty, "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    damage: Callable[[Path, str], None],
    name: str,
    copy: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copy / "checkpoints" / "round-000002", name)
    capsys.readouterr()
    assert resume(copy) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "round-000002" in line]
    assert len(said) == 1
    assert "taking the one before" in said[0]
    assert_same_end(copy, undisturbed)
    assert any("round-000002" in line for line in summary(copy)["warnings"])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sottovoce: ")
    assert err.count("\n") == 1
    return err


def test_without_any_whole_checkpoint_it_says_so_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in (copy / "checkpoints").glob("round-*"):
        cut_in_half(checkpoint, "model.safetensors")
    before = (copy / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert resume(copy) == 1
    assert "no whole checkpoint" in one_line(capsys)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_without_its_secret_a_run_cannot_resume(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "checkpoints" / "secret.key").unlink()
    capsys.readouterr()
    assert resume(copy) == 1
    assert "secret.key" in one_line(capsys)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_resumed_and_loses_nothing(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(undisturbed)
    capsys.readouterr()
    assert resume(undisturbed) == 1
    assert "has finished all 3 rounds" in one_line(capsys)
    assert everything_in(undisturbed) == before


def test_what_is_no_run_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "something").mkdir()
    for name in ("something", "nothing"):
        assert resume(tmp_path / name) == 1
        assert name in one_line(capsys)
    assert everything_in(tmp_path) == {}


def test_drafts_of_a_killed_process_are_removed(copy: Path, undisturbed: Path) -> None:
    draft = copy / "checkpoints" / ".round-000003.99999"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    for name in (".ledger.json.abc", ".metrics.jsonl.99999", ".model.safetensors.99999"):
        (copy / name).write_bytes(b"half")
    assert resume(copy) == 0
    assert_same_end(copy, undisturbed)


# -- checkpoints -----------------------------------------------------------------------------------


def test_the_first_checkpoint_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for keep, expected in ((1, [0, 4]), (3, [0, 2, 3, 4])):
        folder = tmp_path / str(keep)
        assert run(folder, "privacy=none", "rounds=4", f"run.keep_checkpoints={keep}") == 0
        found = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert found == [f"round-{number:06d}" for number in expected]


def test_a_checkpoint_holds_all_that_it_was_given(undisturbed: Path) -> None:
    state = load_checkpoint(undisturbed / "checkpoints" / "round-000003")
    again = checkpoints.save_checkpoint(undisturbed.parent / "copy", state, keep=1)
    read = load_checkpoint(again)
    assert read.round == state.round == 3
    for part in ("parameters", "optimizer", "participation"):
        a, b = getattr(read, part), getattr(state, part)
        assert a.keys() == b.keys() and len(a) > 0
        assert all(bool((a[name] == b[name]).all()) for name in a)
    assert read.ledger == state.ledger
