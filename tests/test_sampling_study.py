"""Studies: which runs they make, that they go on where they stopped, and what they write."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig
from small_runs import SMALL, model

from sottovoce.client.errors import ConfigError
from sottovoce.server import cli, sampling_study, study
from sottovoce.server.config import register
from sottovoce.server.run_record import RunRecord
from sottovoce.server.study import Arm, Result, run_settings, run_study

TINY = (*SMALL[:-2], "rounds=2", "timeline.periods=2", "seeds=1", "run.workers=1")


def composed(*overrides: str) -> DictConfig:
    register("study")
    with initialize_config_module("sottovoce.configs", version_base="1.3"):
        return hydra_compose("study", list(overrides))


def record(arm: str, seed: int, values: Sequence[float]) -> Result:
    """A finished run that reached these accuracies, one every five rounds."""
    kind = arm.split("-")[0]
    rounds = [{"round": 5 * k, "accuracy": value, "period": k, "devices": 90 + seed}
              for k, value in enumerate(values)]
    timeline = {"name": kind, "periods": 3, "rounds_per_period": None, "retention": 2}
    config: dict[str, Any] = {
        "rounds": 10, "cohort_size": 90, "timeline": timeline, "population": {"name": "assistant"},
        "task": {"name": "intent_slots"},
    }
    summary = {"headline": "accuracy", "metrics": {"accuracy": values[-1]},
               "epsilon": {"device": {"epsilon": 2.0 + seed}}}
    return Result(Arm(arm, {}), seed, RunRecord(Path(arm), "", config, rounds, summary))


def results() -> list[Result]:
    return [
        record(arm.name, seed, [0.1, 0.2 + 0.1 * seed, 0.3 + 0.1 * seed])
        for seed in (1, 2) for arm in sampling_study.arms(composed())
    ]


def test_the_arms_are_every_sampler_in_both_settings_and_differ_in_nothing_else() -> None:
    config = composed()
    arms = sampling_study.arms(config)
    assert [arm.name for arm in arms] == [
        f"{kind}-{sampler}" for kind in ("static", "continual")
        for sampler in ("uniform", "linear", "power", "log")
    ]
    changed = {key for arm in arms for key in arm.changes}
    assert changed == {"timeline.name", "strategy.sampler", "strategy.activity_weight"}
    found = run_settings(config, arms[-1], 4)
    assert found.seed == 4 and found.strategy.activity_weight == "log"
    assert "seeds" not in found and "study" not in found


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    (first, *others) = sampling_study.table(results())
    assert len(others) == 7
    assert first["final_mean"] == pytest.approx(0.45)
    assert first["final_sd"] == pytest.approx(0.1 / 2**0.5)
    assert first["course_mean"] == pytest.approx(0.4)  # without what was measured before training
    assert first["epsilon_device"] == 4.0  # the worst seed's
    assert first["epsilon_example"] is None


def test_a_study_writes_one_table_as_text_and_csv_and_one_picture(tmp_path: Path) -> None:
    paths = sampling_study.write(tmp_path, results())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sampling.csv", "sampling.md", "sampling.png"]
    text, rows, picture = (path.read_bytes() for path in paths)
    found = list(csv.DictReader(io.StringIO(rows.decode())))
    assert [row["sampler"] for row in found] == ["uniform", "linear", "power", "log"] * 2
    assert "| continual | log | 0.450 ± 0.071 |" in text.decode()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> str:
    """A study of two arms, that writes the model of each."""
    module = ModuleType("study_of_two")

    def arms(config: DictConfig) -> list[Arm]:
        return [Arm(name, {"timeline.name": name}) for name in ("static", "continual")]

    def write(folder: Path, found: Sequence[Result]) -> list[Path]:
        path = folder / "two.md"
        path.write_text(" ".join(f"{r.arm.name}-{r.run.summary['rounds']}" for r in found))
        return [path]

    module.arms, module.write = arms, write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(study.STUDIES, "two", module.__name__)
    return "study=two"


def test_a_study_goes_on_where_it_stopped_and_repeats_nothing(
    tmp_path: Path, two: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    config = composed(two, *TINY, f"dir={folder}")
    told: Callable[..., bool] = study.run_arm

    def stopping(place: Path, settings: DictConfig) -> bool:
        if "continual" in place.name:
            raise KeyboardInterrupt
        return told(place, settings)

    with monkeypatch.context() as patch:
        patch.setattr(study, "run_arm", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_study(config)
    static = folder / "runs" / "static-seed1"
    before = (static / "summary.json").stat().st_mtime_ns, model(static)
    assert run_study(config) == 0
    assert (folder / "two.md").read_text() == "static-2 continual-2"
    assert before == ((static / "summary.json").stat().st_mtime_ns, model(static))
    assert "static-seed1: finished before" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="other settings"):
        run_study(composed(two, *TINY, f"dir={folder}", "cohort_size=11"))


def test_a_study_that_cannot_be_says_so_before_its_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"dir={tmp_path / 'study'}"
    for words, said in (
        (["study=weather"], "study=weather does not exist: choose sampling"),
        (["seeds=0"], "seeds=0 must be at least 1"),
        (["timeline=static"], "set timeline=continual"),
        (["strategy.total_weight=10"], "strategy.total_weight"),
    ):
        assert cli.main(["study", place, *words]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "study").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, two: str) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="holds something already"):
        run_study(composed(two, *TINY, f"dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
