"""The studies of leakage: their arms, what they read out of an audit, and what they write."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig
from small_runs import SMALL

from sottovoce.server import audited, cli, mitigations_study, privacy_study
from sottovoce.server.config import register
from sottovoce.server.limits import validate
from sottovoce.server.run_record import RunRecord
from sottovoce.server.study import Arm, Result, run_settings

HERE = "populations=[]"  # the population of the settings, here a generated one
TINY = (*SMALL[:-2], "rounds=2", "timeline=static", "seeds=1", "run.workers=1", HERE)


def composed(*overrides: str) -> DictConfig:
    register("study")
    with initialize_config_module("sottovoce.configs", version_base="1.3"):
        return hydra_compose("study", list(overrides))


def attack(name: str, unit: str, bound: float, auc: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "unit": unit, "observer": "release", "valid": True, "epsilon_claimed": 9.0,
        "epsilon_lower_bound": bound, "ceiling": 5.0, "auc": auc, "auc_ci": [auc - 0.1, auc + 0.1],
        **more,
    }


def audit() -> dict[str, Any]:
    inversion = {"name": "model_inversion", "value": 0.5, "interval": [0.3, 0.7], "p_value": 1e-9}
    exposed = {"name": "exposure", "value": 7.0, "interval": [6.0, 8.0], "p_value": 1e-3,
               "figures": {"first": 0.25, "possible": 13.3}}
    return {
        "verdict": "NO VIOLATION FOUND",
        "attacks": [
            attack("weak", "device", 0.5, 0.9), attack("strong", "device", 1.5, 0.7),
            attack("foreign", "device", 4.0, 0.99, valid=False),
            attack("nearer", "device", 4.0, 0.99, observer="server"),
            attack("other", "example", 3.0, 0.95),
            attack("broken", "device", 0.0, 1.0, epsilon_lower_bound=None),
        ],
        "leakage": [inversion, exposed],
    }


def result(name: str, accuracy: float, epsilon: float | None, folder: Path) -> Result:
    spent = {} if epsilon is None else {"device": {"epsilon": epsilon}}
    config = {"rounds": 2, "cohort_size": 10, "task": {"name": "intent_slots"},
              "population": {"name": "snips"}, "audit": {"codes": 8, "code_copies": 100}}
    summary = {"headline": "accuracy", "metrics": {"accuracy": accuracy}, "epsilon": spent}
    return Result(Arm(name, {}), 1, RunRecord(folder, "", config, [], summary, {}, audit()))


# -- arms ------------------------------------------------------------------------------------------


def test_every_epsilon_is_an_arm_that_differs_in_privacy_alone() -> None:
    config = composed("study=privacy", HERE, "rounds=4")
    arms = privacy_study.arms(config)
    assert [arm.name for arm in arms] == [
        f"assistant-{epsilon}" for epsilon in ("none", "16", "8", "4", "2", "1")
    ]
    settings = [run_settings(config, arm, 1) for arm in arms]
    for found in settings:
        validate(found)
        assert found.timeline.name == "static" and found.audit.codes == audited.CODES
    assert [s.privacy.device.epsilon for s in settings] == [None, 16, 8, 4, 2, 1]
    assert [s.privacy.device.enabled for s in settings] == [False] + [True] * 5
    for found in settings:
        found.privacy = None
    assert all(found == settings[0] for found in settings)


def test_the_unit_example_is_noised_on_the_device_and_bounded_in_its_rounds() -> None:
    config = composed("study=privacy", HERE, "unit=example", "rounds=4", "epsilons=[null,8]")
    none, eight = (run_settings(config, arm, 1) for arm in privacy_study.arms(config))
    assert not none.privacy.example.enabled and not none.privacy.device.enabled
    assert eight.privacy.example.enabled and not eight.privacy.device.enabled
    assert eight.privacy.example.max_participations == 4
    assert none.audit.canaries == eight.audit.canaries == "mislabelled"


def test_populations_bring_their_task_and_settings_of_the_command_line_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, DictConfig] = {}

    def stop(place: Path, settings: DictConfig) -> bool:
        seen[place.name] = settings
        if len(seen) == 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr("sottovoce.server.study.run_arm", stop)
    monkeypatch.setattr("sottovoce.server.study.read_run", lambda place: None)
    words = ["study", "study=privacy", "epsilons=[8]", "cohort_size=33", "run.workers=1",
             "model.hidden_size=8", f"dir={tmp_path / 'study'}"]
    assert cli.main(words) == cli.INTERRUPTED
    assert list(seen) == ["snips-8-seed1", "chitchat-8-seed1"]
    snips, chitchat = seen.values()
    assert (snips.task.name, chitchat.task.name) == ("intent_slots", "next_word")
    assert snips.model.name == "bilstm" and chitchat.model.name != "bilstm"
    for found in (snips, chitchat):
        assert found.cohort_size == 33 and found.model.hidden_size == 8  # the user's
        assert found.strategy.server_learning_rate == 0.05  # the study's
        assert found.strategy.name == "fedadam" and not found.run.report  # the population's


def test_what_cannot_be_studied_is_said_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"dir={tmp_path / 'study'}"
    for words, said in (
        (["study=privacy", "epsilons=[8,0]"], "epsilons=[8, 0] must be numbers above 0"),
        (["study=privacy", "epsilons=[]"], "must be numbers above 0, or null"),
        (["study=privacy", "unit=user"], "unit=user is unknown: choose device or example"),
        (["study=privacy", "populations=[moon]"], "populations=moon does not exist: choose from"),
        (["study=mitigations", "populations=[snips,hwu]"], "compares on one"),
    ):
        assert cli.main(["study", place, *words]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "study").exists()


def test_each_mitigation_is_an_arm_of_its_own() -> None:
    config = composed("study=mitigations", HERE, "rounds=12")
    settings = {a.name: run_settings(config, a, 1) for a in mitigations_study.arms(config)}
    for found in settings.values():
        validate(found)
    assert [s.model.dropout for s in settings.values()] == [0, 0.3, 0.6, 0, 0, 0]
    assert [s.rounds for s in settings.values()] == [12, 12, 12, 3, 12, 12]
    assert [s.privacy.device.epsilon for s in settings.values()] == [None] * 4 + [100, 8]


# -- figures ---------------------------------------------------------------------------------------


def test_the_bound_is_the_strongest_that_may_be_compared(tmp_path: Path) -> None:
    row = audited.figures(result("snips-8", 0.9, 8.0, tmp_path).run, "device")
    assert (row["attack"], row["epsilon_lower_bound"], row["auc"]) == ("strong", 1.5, 0.9)
    assert (row["digits"], row["digits_low"], row["exposure"]) == (0.5, 0.3, 7.0)
    assert row["epsilon"] == 8.0 and row["codes_first"] == 0.25
    text = audited.cells(row)
    assert text == [
        "0.900", "8.00", "≥ 1.50 of 5.00", "0.900 [0.80, 1.00]", "0.50 [0.30, 0.70]", "7.0", "0.001"
    ]


def test_a_run_without_attacks_or_privacy_has_dashes_and_no_finite_claim(tmp_path: Path) -> None:
    run = result("snips-none", 0.9, None, tmp_path).run
    run.audit.clear()
    row = audited.figures(run, "device")
    assert audited.cells(row) == ["0.900", "∞", "–", "–", "–", "–", "–"]


def test_the_study_writes_one_table_as_text_and_csv_and_one_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privacy_study, "audited", lambda found: found.run)
    found = [result("snips-none", 0.9, None, tmp_path), result("snips-8", 0.8, 8.0, tmp_path)]
    text, rows, picture = privacy_study.write(tmp_path, found)
    listed = list(csv.DictReader(rows.open()))
    assert [(r["population"], r["asked"]) for r in listed] == [("snips", "none"), ("snips", "8")]
    assert "| snips, intent accuracy | 8 | 0.800 | 8.00 | ≥ 1.50 of 5.00 |" in text.read_text()
    assert "Absence of a finding is not proof" in text.read_text()
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_mitigations_are_written_as_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mitigations_study, "audited", lambda found: found.run)
    arms = mitigations_study.arms(composed("study=mitigations", HERE))
    found = [result(arm.name, 0.9, None, tmp_path) for arm in arms]
    text, rows = mitigations_study.write(tmp_path, found)
    names = [row["mitigation"] for row in csv.DictReader(rows.open())]
    assert names == ["none", "dropout 0.3", "dropout 0.6", "stopped after 7 rounds",
                     "device-level ε = 100", "device-level ε = 8"]
    assert "| dropout 0.3 | 0.900 | ∞ | ≥ 1.50 of 5.00 |" in text.read_text()


def test_a_tiny_study_trains_audits_and_repeats_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    words = ["study", "study=privacy", *TINY, "epsilons=[8]", "audit.code_copies=20",
             "population=assistant", f"dir={folder}"]
    assert cli.main(words) == 0
    place = folder / "runs" / "assistant-8-seed1"
    before = (place / "audit.json").stat().st_mtime_ns
    record = json.loads((place / "audit.json").read_text())
    assert {"model_inversion", "exposure"} <= {one["name"] for one in record["leakage"]}
    (row,) = csv.DictReader((folder / "privacy.csv").open())
    assert 0 < float(row["epsilon"]) <= 8 and float(row["exposure_possible"]) > 13
    assert "| assistant, intent accuracy | 8 |" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "assistant-8-seed1: finished before" in capsys.readouterr().err
    assert (place / "audit.json").stat().st_mtime_ns == before
