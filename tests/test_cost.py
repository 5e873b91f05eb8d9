"""What a run would cost on real devices, beside hand counts and the run's own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import FIXED_NOISE, metrics, run

from sottovoce.server.checkpoints import RunState
from sottovoce.server.cost import message_bytes, targets
from sottovoce.server.cost_tables import bytes_text, cost_line, cost_table
from sottovoce.server.report import write_report
from sottovoce.server.run_record import read_run
from sottovoce.server.settings import compose
from sottovoce.simulations.conditions import Work, make_conditions

PHONES = ("conditions=phones", "conditions.over_selection=2", "conditions.deadline_s=4")


def cost_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["cost"]
    return found


@pytest.fixture(scope="module")
def phones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost") / "phones"
    assert run(folder, *FIXED_NOISE, *PHONES, "seed=1", "run.target_metric=0.999") == 0
    return folder


def test_a_message_is_its_parameters_and_a_little_more() -> None:
    state = RunState(1, {"w": torch.zeros(100, 50), "b": torch.zeros(7)})
    sizes = message_bytes(state, "x" * 3000)
    assert sizes["payload"] == 4 * 5007
    assert 3000 < sizes["down"] - sizes["payload"] < 4500
    assert 0 < sizes["up"] - sizes["payload"] < 1000
    twice = message_bytes(RunState(1, {**state.parameters, "v": torch.zeros(5007)}), "x" * 3000)
    assert 0 <= twice["up"] - sizes["up"] - 4 * 5007 < 500


def test_bytes_are_counted_for_devices_that_were_reached_and_that_answered(phones: Path) -> None:
    cost, records = cost_of(phones), [r for r in metrics(phones) if r["round"]]
    asked = sum(sum(r["devices_by_level"].values()) for r in records)
    reached = asked - sum(r["unavailable"] for r in records)
    sent = sum(r["devices"] + r["dropped"] for r in records)
    assert cost["basis"] == "counted" and asked > reached > 0
    assert cost["asked_a_round"] == pytest.approx(asked / 3)
    assert cost["answers_a_round"] == pytest.approx(sent / 3)
    assert cost["down_bytes"] == reached * cost["message"]["down"]
    assert cost["up_bytes"] == sent * cost["message"]["up"]
    assert cost["participations"]["mean"] == pytest.approx(asked / 100)


def test_device_seconds_are_work_over_pace_and_bytes_over_bandwidth(phones: Path) -> None:
    cost = cost_of(phones)["time"]
    settings = compose(["conditions=phones"]).conditions
    assert [kind["class"] for kind in cost["classes"]] == ["high", "middle", "low"]
    payload = cost_of(phones)["message"]["payload"]
    for kind in cost["classes"]:
        own = settings.classes[kind["class"]]
        pace = settings.reference_examples_per_second * own.speed
        assert kind["computing_s"] == pytest.approx(cost["examples"] / pace)
        network = payload * 8e-6 * (1 / own.down_mbps + 1 / own.up_mbps)
        assert kind["network_s"] == pytest.approx(network)
        measured = cost["measured_examples_per_second"] * own.speed
        assert kind["computing_s_as_measured"] == pytest.approx(cost["examples"] / measured)


def test_the_report_of_costs_agrees_with_the_conditions_clock() -> None:
    from sottovoce.client.batches import BatchPlan

    conditions = make_conditions(compose(["conditions=speakers"]).conditions)
    work = Work(BatchPlan(8, 2, 32, False), 1e6, 1e6)
    (usual, network), (old, _) = conditions.class_seconds(work, 4)
    assert usual == pytest.approx(2 * 23.5 / (100 * 0.2)) and old == pytest.approx(4 * usual)
    assert network == pytest.approx(8 / 40 + 8 / 10)


def test_without_conditions_there_are_counts_bytes_and_measured_seconds(tmp_path: Path) -> None:
    assert run(tmp_path / "lab", *FIXED_NOISE, "seed=1") == 0
    cost, records = cost_of(tmp_path / "lab"), [r for r in metrics(tmp_path / "lab") if r["round"]]
    assert cost["time"]["classes"] == [] and cost["time"]["computing_s_as_measured"] > 0
    assert cost["asked_a_round"] == cost["answers_a_round"]
    assert cost["up_bytes"] == sum(r["devices"] for r in records) * cost["message"]["up"]


def test_exact_counts_stay_out_where_metrics_are_private(tmp_path: Path) -> None:
    chosen = ["privacy=device", "privacy.device.epsilon=null", "seed=1", "cohort_size=20",
              "privacy.device.noise_multiplier=1.5", "privacy.device.private_metrics=true"]
    found = []
    for number, extra in enumerate((["rounds=2"], ["rounds=2", "seed=7"])):
        assert run(tmp_path / str(number), *chosen, *extra) == 0
        cost = cost_of(tmp_path / str(number))
        assert cost["basis"] == "expected" and cost["asked_a_round"] == pytest.approx(20)
        assert cost["participations"]["mean"] == pytest.approx(2 * 20 / 100)
        found.append((cost["down_bytes"], cost["up_bytes"], cost["participations"]))
    down = [f[0] / cost_of(tmp_path / str(n))["message"]["down"] for n, f in enumerate(found)]
    assert down[0] == pytest.approx(down[1]) and found[0][2] == found[1][2]


def test_a_projection_costs_what_the_large_cohort_would(tmp_path: Path) -> None:
    chosen = ["privacy=device", "privacy.device.epsilon=null", "seed=1", "rounds=2",
              "privacy.device.noise_multiplier=1.5"]
    assert run(tmp_path / "r", *chosen, "cohort_size=5", "noise_cohort_size=40") == 0
    cost = cost_of(tmp_path / "r")
    assert cost["basis"] == "expected"
    assert cost["up_bytes"] == pytest.approx(2 * 40 * cost["message"]["up"])


class Fake:
    """The two things that `targets` asks of an experiment."""

    def __init__(self, headline: str, rising: bool, target: float | None) -> None:
        self.task = type("T", (), {"headline": headline, "higher_is_better": rising})()
        self.config = compose([] if target is None else [f"run.target_metric={target}"])


def test_targets_are_reached_at_the_first_evaluation_that_is_good_enough() -> None:
    values = {0: 0.1, 5: 0.5, 10: 0.69, 15: 0.79, 20: 0.85}
    records = [{"round": r, "accuracy": v} for r, v in values.items()]
    spent = {r: 100.0 * r for r in range(1, 21)}
    fake: Any = Fake("accuracy", True, 0.99)
    found = {t["target"]: (t["round"], t["bytes"]) for t in targets(fake, records, spent)}
    assert found == {
        "80 % of the final": (10, 1000.0), "90 % of the final": (15, 1500.0),
        "95 % of the final": (20, 2000.0), "run.target_metric": (None, None),
    }


def test_targets_of_a_metric_that_falls_are_reached_from_above() -> None:
    records = [{"round": r, "perplexity": v} for r, v in ((0, 90.0), (5, 24.0), (10, 20.0))]
    fake: Any = Fake("perplexity", False, 30)
    found = {t["target"]: t["round"] for t in targets(fake, records, {5: 1.0, 10: 2.0})}
    assert found["80 % of the final"] == 5 and found["90 % of the final"] == 10
    assert found["run.target_metric"] == 5
    assert targets(fake, [{"round": 1}], {}) == []


def test_the_report_and_the_last_line_say_what_it_would_cost(phones: Path) -> None:
    page = write_report(phones).read_text()
    for words in ("What it would cost", "Seconds of a participation", "Rounds to a target",
                  "run.target_metric", "not reached", "Who is served well"):
        assert words in page
    line = cost_line(cost_of(phones))
    assert line.startswith("for real: ") and "a device is asked" in line
    rows = cost_table(read_run(phones))["classes"]
    assert [row[0] for row in rows] == ["high", "middle", "low"]
    assert cost_line({}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (48_230, "48.2 kB"), (999_600, "1 MB"),
     (2.1e9, "2.1 GB"), (1.234e15, "1.23 PB"), (5e20, "500000 PB"), (None, "–")],
)
def test_bytes_are_said_in_the_unit_that_fits(value: float | None, text: str) -> None:
    assert bytes_text(value) == text


def test_a_run_without_rounds_has_no_cost_section() -> None:
    class Run:
        summary: dict[str, Any] = {"cost": {"rounds": 0}}

    run_without: Any = Run()
    assert cost_table(run_without)["facts"] == []
