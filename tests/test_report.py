"""Laws of the run report, its plots and the privacy statement, on runs made up here."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sottovoce.client.errors import RunError
from sottovoce.server.claims import success_bound
from sottovoce.server.plots import picture, plots
from sottovoce.server.report import write_report
from sottovoce.server.run_record import read_metrics, read_run
from sottovoce.server.statement import privacy_statement
from sottovoce.server.wording import epsilon_text, level_text, small_text

DEVICES = [24_412, 90_220, 171_951, 225_083, 215_644, 153_270, 77_430, 29_030, 9_720, 2_640, 600]
RATES = [min(2.0**level * 2.1e-5, 0.0108) for level in range(len(DEVICES))]
Json = dict[str, Any]


def make_config(privacy: str = "device", task: str = "intent_slots", **changes: Any) -> Json:
    """A resolved config.yaml as plain data."""
    return {
        "rounds": 60,
        "cohort_size": 500,
        "seed": None,
        "resume": None,
        "population": {"name": "assistant", "devices": sum(DEVICES), "preset": "assistant"},
        "task": {"name": task, "max_length": 24, "vocabulary": {"source": "grammar"}},
        "model": {"name": "bilstm", "embedding_size": 64, "hidden_size": 96, "layers": 1},
        "strategy": {"name": "fedadam", "server_learning_rate": 0.02, "sampler": "activity",
                     "activity_weight": "linear", "max_rate": 0.0108, "local_epochs": 1},
        "privacy": {
            "device": {"enabled": privacy in ("device", "both"), "clip_norm": 0.4,
                       "epsilon": 4.0, "delta": 1e-7, "max_epsilon": None},
            "example": {"enabled": privacy in ("example", "both"), "clip_norm": 1.0,
                        "noise_multiplier": 0.8, "delta": 1e-5, "max_epsilon": 12.0,
                        "max_participations": 4},
        },
        "run": {"evaluate_every": 5},
        **changes,
    }


def make_metrics(config: Json, rounds: int = 60) -> list[Json]:
    """Records as a run writes them, shaped like a run that learns."""
    rng = np.random.default_rng(7)
    privacy = config["privacy"]
    records = [{"round": 0, **evaluation(config["task"]["name"], 0, rng)}]
    for i in range(1, rounds + 1):
        taken = rng.poisson(np.array(DEVICES) * RATES * 500 / np.dot(DEVICES, RATES))
        record: Json = {
            "round": i, "devices": int(taken.sum()), "dropped": int(i % 20 == 0),
            "examples": int(taken.sum() * 18), "seconds": 1.7 + 0.2 * rng.random(),
            "train_loss": 4.4 * math.exp(-i / 14) + 0.9 + 0.1 * rng.random(),
            "update_norm": 0.2 / math.sqrt(i), "clip_norm": 0.4, "clipped_fraction": 0.0,
            "example_clipped_fraction": 0.0,
            "devices_by_level": {str(k): int(n) for k, n in enumerate(taken) if n},
        }
        if privacy["device"]["enabled"]:
            record |= {"epsilon_device": 3.93 * math.sqrt(i / 60), "clipped_fraction":
                       0.95 * math.exp(-i / 40) + 0.03 * rng.random(),
                       "signal_to_noise": 9 / i**0.8 + 0.1 * rng.random()}
        if privacy["example"]["enabled"]:
            record |= {"epsilon_example": 9.1 * (i / 60) ** 0.6,
                       "example_clipped_fraction": 0.3 + 0.5 * math.exp(-i / 25)}
        if i % 5 == 0 or i == rounds:
            record |= evaluation(config["task"]["name"], i, rng)
        records.append(record)
    return records


def evaluation(task: str, i: int, rng: np.random.Generator) -> Json:
    learned = 1 - math.exp(-i / 16) + 0.006 * rng.random()
    if task == "next_word":
        found = {"loss": 8.3 - 3.4 * learned, "perplexity": math.exp(8.3 - 3.4 * learned),
                 "top1_accuracy": 0.21 * learned, "top3_accuracy": 0.36 * learned}
    else:
        found = {"loss": 4.6 - 3.6 * learned, "accuracy": 0.03 + 0.85 * learned,
                 "slot_f1": 0.74 * learned**2, "exact_match": 0.61 * learned**2}
    return found | {f"{k}_held_out_examples": v * 0.98 for k, v in found.items()}


def make_summary(config: Json, metrics: list[Json]) -> Json:
    rows = [{"level": k, "devices": n, "sampling_rate": p, "epsilon": 3.93 * (p / max(RATES)) ** .7}
            for k, (n, p) in enumerate(zip(DEVICES, RATES, strict=True))]
    privacy, last = config["privacy"], metrics[-1]
    epsilon = {}
    if privacy["device"]["enabled"]:
        epsilon["device"] = {"epsilon": 3.93, "delta": 1e-7, "by_level": rows}
    if privacy["example"]["enabled"]:
        example = [{**r, "sampling_rate": min(1.0, 8 / 2**r["level"]), "epsilon":
                    9.1 / (1 + r["level"])**.5} for r in rows]
        epsilon["example"] = {"epsilon": 9.1, "delta": 1e-5, "by_level": example}
    return {
        "status": "finished", "rounds": last["round"], "headline": "perplexity"
        if config["task"]["name"] == "next_word" else "accuracy",
        "metrics": {k: v for k, v in last.items() if k in evaluation(config["task"]["name"], 1,
                                                             np.random.default_rng(0))},
        "epsilon": epsilon,
        "levels": [{k: r[k] for k in ("level", "devices", "sampling_rate")} for r in rows],
        "population": {"source": "generated grammar of voice-assistant requests",
                       "devices": sum(DEVICES), "examples": 23_304_500, "held_out_devices": 1000,
                       "unit": "device", "activity": "log-normal, mu 2.3, sigma 1.3"},
        "vocabulary": {"source": "grammar", "size": 1873, "description": "the grammar's own words"},
        "task": config["task"]["name"], "model": "bilstm", "parameters": 214_331,
        "seconds": 112.4, "peak_memory_mb": 871.2, "noise": "os entropy", "warnings": [],
        "environment": {"python": "3.11.7", "torch": "2.13.0", "flwr": "1.41.0",
                        "dp-accounting": "0.6.0"},
    }



def make_ledger(config: Json, relation: str = "zero_out") -> Json:
    device, example = (config["privacy"][u]["enabled"] for u in ("device", "example"))
    levels = list(enumerate(RATES))
    events: list[Json] = []
    if device:
        events.append({"type": "gaussian", "noise_multiplier": 1.04, "sampling": "poisson",
                       "unit": "device", "relation": relation if example else "add_remove",
                       "observer": "release", "by_level": [[k, p, 1] for k, p in levels]})
        events.append({"type": "non_private", "purpose": "sum before central noise",
                       "unit": "device", "observer": "server"})
    if example:
        events.append({"type": "gaussian", "noise_multiplier": 0.8, "sampling": "poisson",
                       "unit": "example", "relation": "add_remove", "observer": "fleet",
                       "by_level": [[k, min(1.0, 8 / 2**k), 3] for k, _ in levels]})
    return {"schema": 1, "levels": {str(k): n for k, n in enumerate(DEVICES)},
            "deltas": {"device": 1e-7} if device else {}, "claims": {}, "events": events}


def make_run(folder: Path, config: Json | None = None, rounds: int = 60,
             summary: Json | None = None) -> Path:
    """A finished run's folder; `summary` changes keys of summary.json."""
    config = config or make_config()
    metrics = make_metrics(config, rounds)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    (folder / "ledger.json").write_text(json.dumps(make_ledger(config)))
    made = {**make_summary(config, metrics), **(summary or {})}
    (folder / "summary.json").write_text(json.dumps(made))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "both", make_config("both"))


class Page(HTMLParser):
    """Collects a page's text and whatever it would load from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.loads, self.open = "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"src", "href", "data", "action", "srcset"}
        self.loads += [v for k, v in attrs if k in names and v]
        self.loads += [tag] if tag in ("script", "iframe", "link", "object", "embed") else []
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def statement_of(config: Json, ledger: Json | None = None, **changes: Any) -> Any:
    summary = {**make_summary(config, make_metrics(config, 5)), **changes}
    return privacy_statement(summary, make_ledger(config) if ledger is None else ledger, config)


# -- the page ----------------------------------------------------------------------------------


def test_the_report_is_one_well_formed_file_that_loads_nothing(both: Path) -> None:
    path = write_report(both)
    page = Page(path)
    source = path.read_text(encoding="utf-8")
    assert path == both / "report.html" and page.open == [] and page.loads == []
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert not [p for p in both.iterdir() if "partial" in p.name]


def test_the_report_holds_headline_epsilon_every_level_and_the_configuration(both: Path) -> None:
    text = Page(write_report(both)).text
    for found in ("Intent accuracy", "ε = 3.93", "ε = 9.10", "Finished", "1,024–2,047",
                  "server_learning_rate: 0.02", "dp-accounting 0.6.0", "871 MB", "torch 2.13.0"):
        assert found in text.replace("dp-accounting0", "dp-accounting 0").replace(
            "torch2", "torch 2"), found


def test_the_same_run_gives_the_same_page(both: Path) -> None:
    assert write_report(both).read_bytes() == write_report(both).read_bytes()


@pytest.mark.parametrize("privacy", ["none", "device", "example", "both"])
@pytest.mark.parametrize("task", ["intent_slots", "next_word"])
def test_every_kind_of_run_can_be_reported(tmp_path: Path, privacy: str, task: str) -> None:
    page = Page(write_report(make_run(tmp_path, make_config(privacy, task), rounds=6)))
    assert ("no privacy guarantee" in page.text) == (privacy == "none")
    assert ("Device-level (ε" in page.text) == (privacy in ("device", "both"))
    assert ("Perplexity" in page.text) == (task == "next_word")


@pytest.mark.parametrize("privacy", ["none", "both"])
def test_a_run_that_stopped_before_its_first_round_can_be_reported(
    tmp_path: Path, privacy: str
) -> None:
    folder = make_run(tmp_path, make_config(privacy), rounds=0)
    (folder / "summary.json").unlink()
    (folder / "ledger.json").unlink()
    assert "0 of 60" in Page(write_report(folder)).text


def test_a_run_without_any_evaluation_or_round_can_be_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path, make_config("none"), rounds=0)
    (folder / "metrics.jsonl").write_text("")
    (folder / "summary.json").write_text("{}")
    (folder / "config.yaml").write_text("rounds: 3\n")
    assert "0 of 3" in Page(write_report(folder)).text


def test_a_killed_run_is_reported_from_its_rounds_and_ledger(tmp_path: Path) -> None:
    folder = make_run(tmp_path, make_config("both"), rounds=20)
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 21, "devi')
    text = Page(write_report(folder)).text
    run = read_run(folder)
    assert "Not finished" in text and "20 of 60" in text
    assert f"ε = {epsilon_text(run.metrics[-1]['epsilon_device'])}" in text
    assert [r["devices"] for r in run.levels] == DEVICES


def test_text_from_a_run_cannot_become_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path, summary={"warnings": ["<script>alert(1)</script>"]}, rounds=2)
    page = Page(write_report(folder))
    assert "script" not in page.loads and "<script>alert(1)</script>" in page.text


def test_an_audit_beside_the_run_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=2)
    attack = {"name": "loss_threshold", "unit": "example", "auc": 0.512, "auc_ci": [0.49, 0.53],
              "tpr_at_fpr": {"0.01": 0.012}, "epsilon_lower_bound": 0.07}
    (folder / "audit.json").write_text(json.dumps({"verdict": "no_violation",
                                                   "attacks": [attack]}))
    text = Page(write_report(folder)).text
    assert "no violation" in text and "0.512 (0.490 – 0.530)" in text


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_not_a_run_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path, rounds=1)
    (folder / name).unlink()
    with pytest.raises(RunError, match=rf"{re.escape(str(tmp_path))}.*no {name}.*simulate") as e:
        write_report(folder)
    assert "\n" not in str(e.value)


def test_a_broken_line_inside_metrics_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n{"round": \n{"round": 2}\n')
    with pytest.raises(RunError, match="metrics.jsonl line 2 "):
        read_metrics(path)


def test_a_round_run_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1, "loss": 3}\n{"round": 2}\n{"round": 1, "loss": 2}\n')
    assert read_metrics(path) == [{"round": 1, "loss": 2}, {"round": 2}]


def test_a_broken_summary_or_config_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("summary.json", "config.yaml"):
        folder = make_run(tmp_path / name, rounds=1)
        (folder / name).write_text("{a: [")
        with pytest.raises(RunError, match=name) as error:
            write_report(folder)
        assert "\n" not in str(error.value)


# -- pictures ----------------------------------------------------------------------------------


def test_every_plot_is_drawn_only_where_there_is_data(tmp_path: Path) -> None:
    names = {}
    for privacy in ("none", "device", "example"):
        run = read_run(make_run(tmp_path / privacy, make_config(privacy), rounds=6))
        names[privacy] = {p.title for p in plots(run)}
    assert names["none"] == {"Utility over rounds", "Participation by activity level"}
    assert names["device"] - names["none"] == {"Utility against ε", "ε against the budget",
                                               "Clipping", "Signal to noise"}
    assert "Signal to noise" not in names["example"]


def test_plots_survive_infinite_and_missing_figures(tmp_path: Path) -> None:
    folder = make_run(tmp_path, rounds=6)
    records = read_metrics(folder / "metrics.jsonl")
    records[2] |= {"epsilon_device": math.inf, "train_loss": math.nan, "signal_to_noise": 0.0}
    records[3] |= {"epsilon_device": None, "devices_by_level": {}, "clipped_fraction": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert len(plots(read_run(folder))) == 6


def test_the_readme_picture_is_a_wide_png(both: Path) -> None:
    png = picture(both)
    width, height = (int.from_bytes(png[i:i + 4], "big") for i in (16, 20))
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and width > 2.5 * height


# -- the privacy statement ---------------------------------------------------------------------


def test_no_privacy_is_said_plainly_and_in_red() -> None:
    said = statement_of(make_config("none"))
    assert "no privacy guarantee" in said.headline and not said.claims and not said.covered
    assert any(w.startswith("no privacy guarantee") for w in said.warnings)


def test_infinite_epsilon_is_no_guarantee() -> None:
    config = make_config("device")
    found = {"device": {"epsilon": "inf", "delta": 1e-7}}
    said = statement_of(config, epsilon=found)
    assert "no privacy guarantee" in said.headline and not said.covered
    assert any(w.startswith("no privacy guarantee") for w in said.warnings)


def test_every_claim_states_the_terms_it_depends_on() -> None:
    for claim in statement_of(make_config("both")).claims:
        assert [f.term for f in claim.facts] == [
            "Unit", "Neighbouring relation", "Observer", "Delta", "Sampling, as run",
            "Noise multiplier", "Accountant"]
        assert "δ = 1e-" in claim.sentence and "0.6.0" in claim.facts[-1].text


def test_epsilon_is_infinite_for_observers_before_the_claim_and_holds_after_it() -> None:
    spent = {name: row for name, _, row in statement_of(make_config("both")).observers}
    assert spent["server"]["device"] == spent["fleet"]["device"] == "∞"
    assert spent["release"]["device"] == "3.93"
    assert {row["example"] for row in spent.values()} == {"9.10"}


def test_the_relation_is_the_ledgers_own() -> None:
    config = make_config("both")
    texts = [statement_of(config, make_ledger(config, r)).claims[0].facts[1].text
             for r in ("zero_out", "add_remove")]
    assert texts[0].startswith("Zero-out") and "not the add/remove" in texts[0]
    assert "No amplification" in _sampling(statement_of(config, make_ledger(config)))
    assert texts[1].startswith("Add or remove") and "topped up" in texts[1]


def test_sampling_is_described_as_run() -> None:
    config = make_config("device")
    ledger = make_ledger(config)
    assert "from 2.1e-5 (devices with 1 example) to 0.011" in _sampling(statement_of(config))
    ledger["events"][0] |= {"sampling": "fixed_size", "relation": "replace_one"}
    assert _sampling(statement_of(config, ledger)).startswith("Fixed size")
    ledger["events"][0] |= {"sampling": "none"}
    assert "No amplification" in _sampling(statement_of(config, ledger))


def _sampling(said: Any) -> str:
    return next(f.text for f in said.claims[0].facts if f.term == "Sampling, as run")


def test_a_delta_that_is_too_large_is_flagged() -> None:
    config = make_config("device")
    found = {"device": {"epsilon": 2.0, "delta": 1e-5}}
    said = statement_of(config, epsilon=found)
    assert next(f for f in said.claims[0].facts if f.term == "Delta").caution
    assert any("delta=1e-5 is not below 1/devices=1e-6" in w for w in said.warnings)
    assert not any("delta" in w for w in statement_of(config).warnings)


def test_reproducible_noise_projections_and_private_vocabularies_are_warned_of_once() -> None:
    config = make_config("device")
    said = statement_of(
        config, noise="reproducible noise: simulation only", projection=True,
        vocabulary={"source": "training_text"},
        warnings=["reproducible noise: simulation only", "something else"])
    starts = [w.split(":")[0].split(" read")[0] for w in said.warnings]
    assert starts == ["reproducible noise", "projection", "vocabulary", "something else"]
    assert not any("vocabulary" in c for c in said.covered)
    assert any("vocabulary" in c for c in said.not_covered)


def test_the_attackers_bound_is_that_of_the_hypothesis_test() -> None:
    assert success_bound(0.0, 0.0, 0.01) == pytest.approx(0.01)
    assert success_bound(math.log(10), 0.0, 0.01) == pytest.approx(0.1)
    assert success_bound(math.inf, 0.0, 0.01) == 1.0
    bounds = [success_bound(e, 1e-6, 0.01) for e in np.linspace(0, 20, 50)]
    assert bounds == sorted(bounds) and bounds[-1] <= 1.0


# -- wording -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e-4, 0.0312, 0.0999, 0.1, 1.001, 3.996, 17.861, 250.0])
def test_a_printed_epsilon_is_never_below_the_true_one(value: float) -> None:
    assert value - 1e-6 <= float(epsilon_text(value)) <= value * 1.1 + 0.01


def test_figures_are_written_as_people_write_them() -> None:
    assert [epsilon_text(v) for v in (None, 0, math.inf, "inf", 3.911)] == [
        "–", "0", "∞", "∞", "3.92"]
    assert [small_text(v) for v in (1e-7, 2.5e-5, 0.0108, 0.25, 1.0)] == [
        "1e-7", "2.5e-5", "0.011", "0.25", "1"]
    assert [level_text(n) for n in (0, 1, 9, 15)] == ["1", "2–3", "512–1,023", "32,768+"]
