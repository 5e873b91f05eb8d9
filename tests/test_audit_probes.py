"""Codes in a run's data, and the probes that `sottovoce audit` looks for them with."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from small_runs import SMALL, run

from sottovoce.client.errors import ConfigError, DataError, RunError
from sottovoce.client.examples import Examples
from sottovoce.privacy.audit.attacks import ATTACKS
from sottovoce.privacy.audit.code_canaries import draw_canaries, load_canaries
from sottovoce.privacy.audit.leakage import ABSENCE
from sottovoce.privacy.audit.material import Material
from sottovoce.privacy.audit.probes import PROBES, choose_probes, other_names
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.server import cli
from sottovoce.server.runs import load_run
from sottovoce.server.settings import compose
from sottovoce.server.setup import settings_text
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.canaries import canaries_in
from sottovoce.simulations.code_population import (
    CODES_FILE,
    CodePopulation,
    codes_in,
    devices_of_the_source,
    with_codes,
    without_codes,
)
from sottovoce.simulations.experiment import build_experiment
from sottovoce.simulations.live_population import LivePopulation
from sottovoce.strategies.levels import activity_levels

CODES, COPIES = 3, 7


def population(devices: int = 20) -> CodePopulation:
    base = AssistantPopulation(devices=devices, held_out_devices=3, seed=4)
    canaries = draw_canaries(CODES, generator=np.random.default_rng(1), schema=base.schema)
    return CodePopulation(base, canaries, COPIES)


def sentences(examples: Examples, words: Any) -> list[list[tuple[str, int]]]:
    """Every device's sentences with their intents, as words."""
    assert examples.intent is not None
    rows = [
        (" ".join(words[t] for t in examples.tokens[a:b]), int(label))
        for a, b, label in zip(
            examples.offsets[:-1], examples.offsets[1:], examples.intent, strict=True
        )
    ]
    ends = examples.device_offsets
    return [rows[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


# -- the population --------------------------------------------------------------------------------


def test_each_code_is_said_by_a_device_of_its_own_and_nobody_else_changes() -> None:
    found = population()
    base, said = found.base, found.canaries
    assert len(found) == len(base) + CODES
    every = sentences(found.examples(np.arange(len(found))), found.words)
    assert every[: len(base)] == sentences(base.examples(np.arange(len(base))), base.words)
    for device, canary in zip(every[len(base) :], said, strict=True):
        assert canary.intent is not None
        label = found.schema.intents.index(canary.intent)
        assert device == [(" ".join(canary.words), label)] * COPIES


def test_examples_are_the_same_whatever_else_is_asked_for() -> None:
    found, generator = population(), np.random.default_rng(0)
    alone = [sentences(found.examples(np.array([d])), found.words)[0] for d in range(len(found))]
    devices = generator.permutation(len(found))[:12].astype(np.int64)
    numbers: list[NDArray[np.int64]] = [
        generator.integers(found.activity[d], size=3).astype(np.int64) for d in devices
    ]
    assert np.any(devices >= 20) and np.any(devices < 20)
    together = sentences(found.examples(devices, numbers), found.words)
    assert together == [
        [alone[d][n] for n in own] for d, own in zip(devices, numbers, strict=True)
    ]
    assert not len(found.examples(np.empty(0, np.int64)))


def test_what_is_not_there_is_refused() -> None:
    found = population()
    with pytest.raises(IndexError):
        found.examples(np.array([len(found)]))
    with pytest.raises(IndexError):
        found.examples(np.array([len(found) - 1]), [np.array([COPIES])])


def test_the_public_model_counts_the_devices_that_were_added() -> None:
    found = population()
    known, more = found.base.expected_level_counts(), found.expected_level_counts()
    assert known is not None and more is not None
    more[: len(known)] -= known
    assert more[activity_levels(np.array([COPIES]))[0]] == CODES and more.sum() == CODES


def test_without_its_codes_a_population_is_as_before_but_for_its_words() -> None:
    found = population()
    natural = without_codes(found)
    assert len(natural) == len(found.base) and codes_in(natural) is None
    assert list(natural.words) == list(found.words)
    assert list(natural.words)[: len(found.base.words)] == list(found.base.words)
    everybody = np.arange(len(natural))
    assert sentences(natural.examples(everybody), natural.words) == sentences(
        found.base.examples(everybody), found.base.words
    )
    assert "code_canaries" not in natural.describe()


def test_codes_follow_from_the_settings_and_none_means_none() -> None:
    base = AssistantPopulation(devices=20, held_out_devices=3)
    drawn = [
        with_codes(base, {"codes": 2, "code_copies": 3, "seed": seed}) for seed in (5, 5, 6)
    ]
    codes = [[c.code for c in p.canaries] for p in drawn if isinstance(p, CodePopulation)]
    assert codes[0] == codes[1] != codes[2]
    assert with_codes(base, None) is base
    assert with_codes(base, {"codes": 0, "code_copies": 3, "seed": 1}) is base
    with pytest.raises(ConfigError, match=r"audit.codes=1000.*at most 676"):
        with_codes(base, {"codes": 1000, "code_copies": 3, "seed": 1})


def test_all_kinds_of_canaries_go_together_and_touch_the_source_s_devices_alone() -> None:
    config = compose([
        *SMALL, "audit.codes=2", "audit.canaries=mislabelled", "audit.number=20",
        "audit.device_canaries=4", "audit.seed=1", "seed=1",
    ])
    whole = build_experiment(settings_text(config)).population
    codes, examples = codes_in(whole), canaries_in(whole)
    assert codes is not None and codes.devices == slice(100, 102)
    assert examples is not None and (examples.slots.devices < 100).all()
    assert devices_of_the_source(whole) == 100 and len(whole) == 106


def test_a_run_keeps_the_seed_of_its_canaries() -> None:
    def seed(*words: str) -> int:
        kept = OmegaConf.create(settings_text(compose([*words, "audit.codes=2"])))
        return int(kept.audit.seed)

    assert seed("seed=7") == 7 and seed("audit.seed=9") == 9
    assert seed() != seed()


def test_codes_do_not_go_with_a_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "timeline=continual", "audit.codes=2"]) == 1
    assert "audit.codes=2 adds devices that belong to no period" in capsys.readouterr().err
    assert cli.main(["simulate", "audit.codes=-1"]) == 1
    assert "audit.codes=-1 must be at least 0" in capsys.readouterr().err


# -- a run and its audit ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "run"
    words = ("audit.codes=3", "audit.code_copies=20", "population.held_out_devices=12", "seed=3")
    assert run(folder, *words, "privacy.example.noise_multiplier=2", "run.workers=1") == 0
    return folder


def _damaged(trained: Path, folder: Path, name: str, text: bytes) -> Path:
    shutil.copytree(trained, folder)
    (folder / name).write_bytes(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", b"{"), ("summary.json", b"[]"), ("model.safetensors", b"x"),
        ("summary.json", b'{"epsilon": {"device": {"epsilon": "four"}}}'),
    ],
)
def test_damaged_files_are_refused_in_one_line_that_names_them(
    trained: Path, tmp_path: Path, name: str, text: bytes
) -> None:
    with pytest.raises(RunError, match=f"{name} is damaged"):
        load_run(_damaged(trained, tmp_path / "run", name, text))


def test_a_model_that_the_run_did_not_make_is_refused(trained: Path, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in load_file(trained / "model.safetensors").items()}
    with pytest.raises(RunError, match="not the model of the last checkpoint"):
        load_run(_damaged(trained, tmp_path / "run", "model.safetensors", save(other)))
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as where none were kept
    assert load_run(tmp_path / "run").participants is None


def test_nothing_of_real_devices_is_asked_for(trained: Path, tmp_path: Path) -> None:
    line = {"tokens": ["wake", "me"], "intent": "alarm", "slots": ["O", "O"]}
    (tmp_path / "public.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    live = LivePopulation(str(tmp_path / "public.jsonl"), None, 5, None, 10)
    found = replace(load_run(trained), population=live, codes=(), participants=np.arange(3))
    chosen, lacking = choose_probes("default", found)
    assert not chosen and "real devices keep" in lacking["update_rows"]
    for name in ("device_loss", "participant_loss", "example_loss"):
        assert "real devices keep" in str(ATTACKS[name].missing(found))


def test_records_of_no_round_are_left_out_of_the_picture(trained: Path, tmp_path: Path) -> None:
    folder = _damaged(trained, tmp_path / "run", "metrics.jsonl", b'[1]\n{"epsilon_device": 3}\n')
    assert audit(folder, attacks=["device_loss"])["rounds"] == []


def audit(folder: Path, **settings: Any) -> dict[str, Any]:
    run_audit(AuditConfig(run=str(folder), format="json", **settings))
    found: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return found


def test_the_run_keeps_its_codes_for_the_auditor_alone(trained: Path) -> None:
    path = trained / CODES_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = load_run(trained)
    assert list(loaded.codes) == load_canaries(path) and len(loaded.codes) == 3
    for code in loaded.codes:  # no other file of the run says a code
        said = " ".join(code.code).encode()
        others = [p for p in trained.rglob("*") if p.is_file() and p != path]
        assert not any(said in p.read_bytes() for p in others)


def test_membership_attacks_never_look_at_a_device_that_says_a_code(trained: Path) -> None:
    loaded = load_run(trained)
    assert len(loaded.population) == 100 and loaded.codes_trained is not None
    assert loaded.participants is not None and (loaded.participants < 100).all()
    drawn = Material(loaded, devices=1000, seed=0).training_devices
    assert {int(name.split()[-1]) for name in drawn.ids} == set(range(100))


def test_by_default_every_probe_runs_and_says_what_it_cost(trained: Path) -> None:
    record = audit(trained)
    found = {one["name"]: one for one in record["leakage"]}
    assert list(found) == list(PROBES)
    for one in found.values():
        assert one["seconds"] > 0 and one["cost"] and ABSENCE in one["note"]
    assert "of 3 canary devices took part" in found["exposure"]["note"]
    assert {one["observer"] for one in found.values()} == {"release", "fleet"}
    hidden, plain = found["update_rows"], found["update_rows_without_noise"]
    assert hidden["figures"]["noised"] == 1 and plain["figures"]["noised"] == 0
    assert plain["value"] == 1 > hidden["value"]
    page = (trained / "audit.html").read_text()
    assert "What was read back" in page and "update_span_without_noise" in page


def test_attacks_names_probes_too_and_runs_nothing_else(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", f"run={trained}", "attacks=[exposure,device_loss]"]
    assert cli.main(words) in (0, 4)
    record = json.loads((trained / "audit.json").read_text())
    assert [one["name"] for one in record["leakage"]] == ["exposure"]
    assert [one["name"] for one in record["attacks"]] == ["device_loss"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "No bound on any ε; absence of a finding is not proof" in shown
    assert re.search(r"example, release, \d+\.\d s", shown)


def test_probes_alone_judge_nothing(trained: Path) -> None:
    record = audit(trained, attacks="update_rows")
    assert record["verdict"] == "INCONCLUSIVE" and record["attacks"] == []
    assert [one["name"] for one in record["leakage"]] == ["update_rows"]


def test_unknown_and_impossible_probes_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"attacks=exposed is unknown.*device_loss.*exposure"):
        audit(trained, attacks=["exposed"])
    with pytest.raises(ConfigError, match="names none: give some of device_loss"):
        other_names([], list(ATTACKS))
    plain = tmp_path / "plain"
    assert run(plain, "privacy=none", "run.workers=1") == 0
    probes, lacking = choose_probes("default", load_run(plain))
    assert [probe.name for probe in probes] == ["update_rows", "update_span"]
    assert "no code canaries" in lacking["exposure"]
    assert "devices add no noise" in lacking["update_rows_without_noise"]
    with pytest.raises(ConfigError, match=r"attacks=exposure cannot run: no code canaries"):
        audit(plain, attacks="exposure")


def test_a_lost_list_of_codes_is_no_absence_of_codes(trained: Path) -> None:
    path = trained / CODES_FILE
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(DataError, match="holds no canaries"):
            load_run(trained)
    finally:
        path.write_bytes(kept)
        path.chmod(0o600)
