"""Whole runs: what they write, what they claim, when they stop, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import FIXED_NOISE, SMALL, metrics, model, resume, run, strict, summary

from sottovoce.privacy import Ledger, epsilon
from sottovoce.privacy.accounting.events import GaussianEvent, NonPrivateRelease
from sottovoce.server import cli
from sottovoce.server.runs import load_run

EVERY_ROUND = {
    "round", "devices", "dropped", "examples", "train_loss", "seconds", "update_norm",
    "clipped_fraction", "example_clipped_fraction", "devices_by_level",
}  # fmt: skip
EVALUATED = {"loss", "accuracy", "slot_f1", "exact_match"}
OF_DEVICES = {"clip_norm", "signal_to_noise", "epsilon_device"}
SUMMARY = {
    "status", "rounds", "headline", "metrics", "epsilon", "population", "task", "model",
    "parameters", "seconds", "peak_memory_mb", "noise", "warnings",
}  # fmt: skip
CLAIMS = {"none": (), "device": ("device",), "example": ("example",), "both": ("device", "example")}
OBSERVER = {"device": "release", "example": "server"}
NOISE = {
    "none": (),
    "device": FIXED_NOISE[:2],
    "example": FIXED_NOISE[2:],
    "both": FIXED_NOISE,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=list(CLAIMS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(choice of privacy, folder) of a finished run of 3 rounds, evaluated before and after."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    report = f"run.report={str(request.param == 'both').lower()}"
    assert run(folder, f"privacy={request.param}", *NOISE[request.param], report) == 0
    return request.param, folder


# -- the run folder --------------------------------------------------------------------------------


def test_a_run_writes_what_its_folder_promises(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    expected = {
        "config.yaml", "metrics.jsonl", "ledger.json", "model.safetensors", "model.json",
        "checkpoints", "summary.json", "MODEL_CARD.md",
    } | ({"report.html"} if choice == "both" else set())  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.rglob("*.json"):
        strict(path.read_text())
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-000000", "round-000002", "round-000003"], "and no secret any more"


def test_every_round_has_its_record(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    first, *rounds = metrics(folder)
    assert first["round"] == 0 and EVALUATED <= first.keys()
    assert [record["round"] for record in rounds] == [1, 2, 3]
    optional = OF_DEVICES | {"epsilon_example"}
    expected = {f"epsilon_{unit}" for unit in CLAIMS[choice]}
    expected |= OF_DEVICES if "device" in CLAIMS[choice] else set()
    for record in rounds:
        assert EVERY_ROUND <= record.keys()
        assert record.keys() & optional == expected
        assert sum(record["devices_by_level"].values()) == record["devices"] + record["dropped"]
        assert 0 <= record["clipped_fraction"] <= 1
        assert 0 <= record["example_clipped_fraction"] <= 1
        assert record["update_norm"] > 0 and record["seconds"] > 0
        assert math.isfinite(record["train_loss"])
    assert EVALUATED <= rounds[-1].keys() and not EVALUATED & rounds[0].keys()
    assert {f"{name}_held_out_examples" for name in EVALUATED} <= rounds[-1].keys()


def test_the_summary_says_how_it_ended(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    found, last = summary(folder), metrics(folder)[-1]
    assert SUMMARY <= found.keys()
    assert (found["status"], found["rounds"], found["headline"]) == ("finished", 3, "accuracy")
    assert found["noise"] == ("none" if choice == "none" else "os entropy")
    assert {name: found["metrics"][name] for name in EVALUATED} == {n: last[n] for n in EVALUATED}
    assert tuple(found["epsilon"]) == CLAIMS[choice]
    tensors = load_file(folder / "model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["population"]["devices"] == 100


def test_epsilon_is_that_of_the_ledger_on_disk(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    ledger, last = Ledger.load(folder / "ledger.json"), metrics(folder)[-1]
    assert ledger.units == CLAIMS[choice]
    for unit, claim in summary(folder)["epsilon"].items():
        delta, observer = claim["delta"], claim["observer"]
        assert observer == OBSERVER[unit]
        assert ledger.deltas[unit] == delta
        again = epsilon(ledger, delta, unit=unit, observer=observer)
        assert claim["epsilon"] == pytest.approx(again, rel=1e-9)
        assert last[f"epsilon_{unit}"] == pytest.approx(again, rel=2e-3)
        assert last[f"epsilon_{unit}"] >= again * (1 - 1e-9)
        assert claim["epsilon"] == max(row["epsilon"] for row in claim["by_level"])


def test_the_ledger_has_an_event_for_every_round(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    ledger = Ledger.load(folder / "ledger.json")
    gaussian = [event for event in ledger if isinstance(event, GaussianEvent)]
    of_devices = [event.round for event in gaussian if event.unit == "device"]
    assert of_devices == ([1, 2, 3] if "device" in CLAIMS[choice] else [])
    of_examples = [event.round for event in gaussian if event.unit == "example"]
    assert len(set(of_examples)) == len(of_examples)
    assert bool(of_examples) == ("example" in CLAIMS[choice])
    exposed = [event for event in ledger if isinstance(event, NonPrivateRelease)]
    assert {(event.unit, event.observer) for event in exposed} == (
        {("device", "server")} if "device" in CLAIMS[choice] else set()
    )
    if exposed:
        assert math.isinf(epsilon(ledger, 1e-5, unit="device", observer="server"))
    ledger.save(folder.parent / "again.json")
    assert Ledger.load(folder.parent / "again.json") == ledger


def test_epsilon_rises_from_round_to_round(finished: tuple[str, Path]) -> None:
    choice, folder = finished
    for unit in CLAIMS[choice]:
        series = [record[f"epsilon_{unit}"] for record in metrics(folder)[1:]]
        assert series == sorted(series) and series[0] > 0


def test_a_finished_run_loads_back(finished: tuple[str, Path]) -> None:
    _, folder = finished
    loaded = load_run(folder)
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, tensors[name]) for name, p in loaded.model.named_parameters())
    assert loaded.initial_model is not None and loaded.participants is not None
    first = dict(loaded.initial_model.named_parameters())
    assert any(not torch.equal(tensors[name], first[name]) for name in tensors)
    asked = sum(record["devices"] + record["dropped"] for record in metrics(folder)[1:])
    assert 0 < len(loaded.participants) <= asked


def test_without_a_seed_two_runs_differ_and_with_one_they_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6), ("d", "null"), ("e", "null")):
        settings = ("privacy=device", *FIXED_NOISE[:2], "rounds=1", f"seed={seed}")
        assert run(tmp_path / name, *settings) == 0
    assert model(tmp_path / "a") == model(tmp_path / "b")
    assert len({model(tmp_path / name) for name in "acde"}) == 4
    assert summary(tmp_path / "a")["noise"] == "reproducible noise: simulation only"
    assert any("seed=5" in line for line in summary(tmp_path / "a")["warnings"])


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "limit", "settings"),
    [
        ("device", 3.0, ("privacy=device", *FIXED_NOISE[:2])),
        ("example", 1.5, ("privacy=example", "privacy.example.noise_multiplier=3")),
    ],
)
def test_a_run_ends_before_it_passes_its_budget(
    unit: str,
    limit: float,
    settings: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    limits = (f"privacy.{unit}.max_epsilon={limit}", f"privacy.{unit}.delta=1e-4")
    plan = ("seed=1", "rounds=40", "run.checkpoint_every=3", "run.evaluate_every=50")
    assert run(folder, *settings, *limits, *plan) == 0
    found, last = summary(folder), metrics(folder)[-1]
    assert f"privacy.{unit}.max_epsilon={limit:g} would be passed" in capsys.readouterr().out
    assert found["status"] == "budget_spent"
    assert 0 < found["rounds"] == last["round"] < 40
    assert 0 < found["epsilon"][unit]["epsilon"] <= limit
    assert EVALUATED <= last.keys(), "the model that is left is evaluated"
    assert load_file(folder / "model.safetensors")
    assert not (folder / "checkpoints" / "secret.key").exists()
    assert load_run(folder).participants is not None
    if unit == "device":
        ledger = Ledger.load(folder / "ledger.json")
        ledger.append([e for e in ledger if isinstance(e, GaussianEvent)][-1])
        assert epsilon(ledger, 1e-4, unit="device", observer="release") > limit
    before = model(folder)
    assert resume(folder) == 1
    assert "has spent its privacy budget" in capsys.readouterr().err
    assert model(folder) == before


def test_a_budget_too_small_for_any_round_leaves_the_first_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = "privacy.device.max_epsilon=0.01"
    assert run(folder, "privacy=both", *FIXED_NOISE, limit, "run.report=true") == 0
    found = summary(folder)
    assert (found["status"], found["rounds"]) == ("budget_spent", 0)
    assert [found["epsilon"][unit]["epsilon"] for unit in ("device", "example")] == [0, 0]
    assert model(folder) == (folder / "checkpoints/round-000000/model.safetensors").read_bytes()


def test_a_limit_on_participations_lets_a_run_go_on_within_its_budget(tmp_path: Path) -> None:
    """After its one round a device costs nothing more, so the budget of one round lasts."""
    folder = tmp_path / "run"
    once = ("privacy=example", "privacy.example.noise_multiplier=3", "strategy.sampler=fixed_size",
            "cohort_size=40", "privacy.example.delta=1e-4", "privacy.example.max_participations=1")
    assert run(folder, *once, "rounds=3", "privacy.example.max_epsilon=5") == 0
    found = summary(folder)
    assert (found["status"], found["rounds"]) == ("finished", 3)
    assert found["epsilon"]["example"]["epsilon"] <= 5
    assert sum(record["devices"] for record in metrics(folder)[1:]) <= 100


# -- odd settings ----------------------------------------------------------------------------------


def test_one_device_is_a_population(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = ("population.devices=1", "cohort_size=1", "strategy.sampler=uniform")
    assert run(folder, "privacy=both", *FIXED_NOISE, *one) == 0
    assert [record["devices"] for record in metrics(folder)[1:]] == [1, 1, 1]


def test_empty_cohorts_are_rounds_of_pure_noise(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    few = ("cohort_size=1", "strategy.sampler=uniform", "rounds=8", "seed=3")
    assert run(folder, "privacy=device", *FIXED_NOISE[:2], *few) == 0
    rounds = metrics(folder)[1:]
    empty = [record for record in rounds if record["devices"] == 0]
    assert 0 < len(empty) < 8
    for record in empty:
        assert record["update_norm"] > 0 and record["signal_to_noise"] == 0
        assert record["devices_by_level"] == {} and "train_loss" not in record
    assert len({record["epsilon_device"] for record in rounds}) == 8


def test_rounds_without_a_single_device_are_no_training_and_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    few = ("cohort_size=1", "strategy.sampler=uniform", "rounds=1", "seed=4")
    assert run(folder, "privacy=example", *few) == 0
    (record,) = metrics(folder)[1:]
    assert (record["devices"], record["epsilon_example"], record["update_norm"]) == (0, 0, 0)
    assert summary(folder)["epsilon"]["example"]["epsilon"] == 0


@pytest.mark.parametrize("settings", [("rounds=1",), ("rounds=2", "run.evaluate_every=100")])
def test_the_first_and_the_last_model_are_always_evaluated(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "privacy=none", *settings) == 0
    evaluated = [record["round"] for record in metrics(folder) if "accuracy" in record]
    assert evaluated == [0, summary(folder)["rounds"]]


def test_a_huge_clip_norm_clips_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    huge = ("privacy.device.clip_norm=1e6", "privacy.example.clip_norm=1e6", "rounds=1")
    assert run(folder, "privacy=both", *FIXED_NOISE, *huge) == 0
    record = metrics(folder)[1]
    assert (record["clipped_fraction"], record["example_clipped_fraction"]) == (0, 0)
    assert all(bool(torch.isfinite(t).all()) for t in load_run(folder).model.parameters())


@pytest.mark.parametrize("privacy", list(CLAIMS))
def test_a_diverging_device_is_dropped_and_counted(privacy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Seeded: a device whose first batches happen to be empty diverges by its noise, not its signal.
    diverging = ("strategy.learning_rate=1e30", "strategy=fedavg", "strategy.max_rate=1", "seed=3")
    assert run(folder, f"privacy={privacy}", *NOISE[privacy], *diverging) == 0
    dropped = sum(record["dropped"] for record in metrics(folder)[1:])
    if privacy == "both":  # every step is clipped to its bound before it can do harm
        return
    assert dropped == sum(sum(r["devices_by_level"].values()) for r in metrics(folder)[1:])
    assert any(f"{dropped} of {dropped} updates were dropped" in w
               for w in summary(folder)["warnings"])


@pytest.mark.parametrize("task", ["intent_slots", "next_word"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_diverged_model_is_said_to_be_one_in_strict_json(task: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    diverging = ("strategy.server_learning_rate=1e38", f"task={task}", "run.report=true")
    assert run(folder, "privacy=none", "strategy=fedavg", *diverging) == 0
    assert metrics(folder)[-1]["loss"] is None
    assert any("training diverged" in line for line in summary(folder)["warnings"])


def test_a_delta_as_large_as_one_device_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("privacy=device", *FIXED_NOISE[:2], "rounds=1", "privacy.device.delta=0.01")
    assert run(tmp_path / "run", *settings) == 0
    err = capsys.readouterr().err
    assert "delta=0.01 is not below 1/devices=0.01" in err
    assert any("delta=0.01" in line for line in summary(tmp_path / "run")["warnings"])


def test_clipping_without_noise_is_warned_of_and_claims_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = ("privacy.device.epsilon=null", "privacy.device.noise_multiplier=0", "rounds=1")
    assert run(tmp_path / "run", "privacy=device", *silent) == 0
    assert "privacy.device.noise_multiplier=0 clips but adds no noise" in capsys.readouterr().err
    assert metrics(tmp_path / "run")[-1]["epsilon_device"] is None
    assert summary(tmp_path / "run")["epsilon"]["device"]["epsilon"] == "inf"


def test_a_vocabulary_from_the_training_text_voids_the_claim(tmp_path: Path) -> None:
    read = ("privacy=both", *FIXED_NOISE, "rounds=1", "task.vocabulary.source=training_text")
    assert run(tmp_path / "run", *read) == 0
    found = summary(tmp_path / "run")
    assert [claim["epsilon"] for claim in found["epsilon"].values()] == ["inf", "inf"]
    assert any("vocabulary" in line for line in found["warnings"])


# -- refused ---------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr with which `simulate` refuses these settings."""
    assert cli.main(["simulate", *SMALL, *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sottovoce: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["cohort_size=101"], "cohort_size=101"),
        (["privacy.device.epsilon=1e-9"], "epsilon=1e-09"),
        (["privacy.example.noise_multiplier=null"], "privacy.example"),
        (["strategy.max_rate=0.01"], "max_rate=0.01"),
        (["population.devices=1", "cohort_size=1"], "too few devices"),
        (["strategy.learning_rate=nan"], "strategy.learning_rate"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_leaves_nothing(
    words: list[str], named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, *words)
    assert list(here.iterdir()) == []
    folder = here / "mine"
    assert named in refused(capsys, *words, f"run.dir={folder}")
    assert not folder.exists() or list(folder.iterdir()) == [], "the folder can be used again"


def test_a_population_without_anything_to_evaluate_on_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "data.jsonl", [request("a"), request("b")])
    assert cli.main(["simulate", *jsonl_settings("population.held_out_fraction=0")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing to evaluate on" in err
    assert [path.name for path in here.iterdir()] == ["data.jsonl"]


def request(user: str, **changed: Any) -> dict[str, Any]:
    whole = {"user_id": user, "text": "play jazz", "tokens": ["play", "jazz"], "intent": "Play",
             "slots": ["O", "B-genre"]}
    return whole | changed


def write(path: Path, lines: list[Any]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))


ODD = ("population.path=data.jsonl", "cohort_size=1", "privacy=none", "strategy.sampler=uniform")
MANY = [request(user) for user in "abcdefghij" for _ in range(3)]


def jsonl_settings(*words: str) -> list[str]:
    small = [word for word in SMALL if not word.startswith(("population", "cohort_size"))]
    return [*small, "population=jsonl", *ODD, *words]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], "data.jsonl"),
        ([*MANY, "{broken"], "line 31"),
        ([*MANY[:4], "[1, 2]", *MANY], "line 5"),
        ([*MANY, request("k", slots=["O"])], "line 31"),
        ([*MANY, request("k", intent=None)], "line 31"),
        ([*MANY, {"user_id": "k", "tokens": []}], "line 31"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_line(
    lines: list[Any], named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "data.jsonl", lines)
    assert cli.main(["simulate", *jsonl_settings()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
    assert [path.name for path in here.iterdir()] == ["data.jsonl"]


def test_a_device_without_examples_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "data.jsonl", [*MANY, request("mute", text="", tokens=[], slots=[])])
    assert cli.main(["simulate", *jsonl_settings()]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "line 31: device 'mute' has no examples" in err
    assert [path.name for path in here.iterdir()] == ["data.jsonl"]


def test_a_good_file_runs(here: Path) -> None:
    write(here / "data.jsonl", MANY)
    assert cli.main(["simulate", *jsonl_settings("rounds=1", "run.dir=out", "privacy=both")]) == 0
    found = summary(here / "out")
    assert (found["status"], found["rounds"]) == ("finished", 1)
    assert found["population"]["unit"]


def test_a_file_that_is_gone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *jsonl_settings()]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data.jsonl" in err


