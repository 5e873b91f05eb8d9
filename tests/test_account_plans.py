"""What a budget allows: noise, rounds, cohort, population; both layers; and what levers cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.planning import (
    Layer,
    calibrate_layers,
    expected_participations,
    largest_cohort,
    largest_rate,
    likely_participations,
    most_rounds,
    smallest_population,
)
from sottovoce.server.account import AccountConfig, account, run_account
from sottovoce.strategies.counts import model_counts
from sottovoce.strategies.samplers import ActivitySampler

DEVICE = Layer(2.0, 1e-6, ((0, 0.01, 1),), 1.0)
EXAMPLE = Layer(4.0, 1e-5, ((2, 0.5, 3), (5, 0.1, 8)), 1.5, most_rounds=6, unit="example",
                observer="server")  # fmt: skip


def at(layer: Layer, rate: float) -> Layer:
    return Layer(layer.target_epsilon, layer.delta, ((0, rate, 1),), layer.noise_multiplier)


def test_one_round_more_than_the_most_is_too_many() -> None:
    rounds = most_rounds([DEVICE])
    assert DEVICE.epsilon(rounds) <= 2.0 < DEVICE.epsilon(rounds + 1)
    assert most_rounds([DEVICE], limit=50) == 50


def test_of_two_layers_the_first_to_be_spent_ends_the_run() -> None:
    unbounded = Layer(4.0, 1e-5, EXAMPLE.per_round, 1.5, unit="example", observer="server")
    both = most_rounds([DEVICE, unbounded])
    assert both == min(most_rounds([DEVICE]), most_rounds([unbounded]))
    assert EXAMPLE.epsilon(6) == EXAMPLE.epsilon(10**6), "participations are bounded"


def test_the_largest_rate_is_just_small_enough() -> None:
    rate = largest_rate(DEVICE, 500)
    assert at(DEVICE, rate).epsilon(500) <= 2.0 < at(DEVICE, rate * 1.002).epsilon(500)
    assert largest_cohort(DEVICE, 500, 10**5) == math.floor(rate * 10**5)
    devices = smallest_population(DEVICE, 500, 300)
    assert 300 / devices <= rate < 300 / (devices - 1)
    assert largest_rate(Layer(50.0, 1e-6, ((0, 0.5, 1),), 10.0), 5) == 1.0


def test_both_layers_get_their_own_noise() -> None:
    found = calibrate_layers([DEVICE, EXAMPLE], 100)
    for layer in found:
        spent = layer.epsilon(100)
        assert layer.target_epsilon * (1 - 2e-3) <= spent <= layer.target_epsilon


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda: most_rounds([Layer(0.1, 1e-6, ((0, 0.5, 1),), 0.5)]), "in the first round"),
        (lambda: largest_rate(Layer(1e-9, 1e-12, ((0, 0.5, 1),), 0.3), 10**6), "any sampling rate"),
        (lambda: largest_rate(DEVICE, 2.5), "rounds=2.5"),  # type: ignore[arg-type]
        (lambda: largest_cohort(DEVICE, 500, 10), "too few"),
        (lambda: most_rounds([Layer(1.0, 1.0, ((0, 0.5, 1),), 1.0)]), "delta=1.0"),
    ],
)
def test_what_no_plan_can_keep_is_refused_in_one_line(ask: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_participations_are_a_binomials() -> None:
    assert expected_participations(0.01, 1000) == pytest.approx(10.0)
    assert expected_participations(0.01, 1000, limit=5) == pytest.approx(4.958, abs=1e-3)
    assert expected_participations(1.0, 7, limit=3) == pytest.approx(3.0)
    most = likely_participations(0.01, 1000, devices=10**6)
    assert 35 <= most <= 45
    assert likely_participations(0.01, 1000, 10**6, limit=20) == 20
    assert likely_participations(0.0, 1000, 10**6) == 0
    assert likely_participations(1.0, 1000, 10**6) == 1000


# -- on the command line ---------------------------------------------------------------------------

PLAN = {"noise_multiplier": 1.0, "sampling_rate": 0.01, "steps": 1000, "delta": 1e-6}


def test_solving_is_the_inverse_of_accounting() -> None:
    rounds = account({**PLAN, "steps": None, "target_epsilon": 2.0, "solve": "rounds"})
    assert rounds["epsilon"] <= 2.0 < account(PLAN | {"steps": rounds["steps"] + 1})["epsilon"]
    without = {k: v for k, v in PLAN.items() if k != "sampling_rate"}
    cohort = account({**without, "target_epsilon": 2.0, "solve": "cohort", "devices": 10**5})
    assert cohort["epsilon"] <= 2.0 and cohort["sampling_rate"] == cohort["cohort_size"] / 10**5
    people = account({**without, "target_epsilon": 2.0, "solve": "population", "cohort_size": 500})
    assert people["epsilon"] <= 2.0 and people["sampling_rate"] == 500 / people["devices"]
    noise = account({k: v for k, v in PLAN.items() if k != "noise_multiplier"}
                    | {"target_epsilon": 2.0, "solve": "noise"})  # fmt: skip
    assert 1.99 <= noise["epsilon"] <= 2.0


def test_cohort_and_population_say_the_rate() -> None:
    without = {k: v for k, v in PLAN.items() if k != "sampling_rate"}
    assert account(without | {"cohort_size": 100, "devices": 10**4})["epsilon"] == account(PLAN)[
        "epsilon"
    ]


def test_both_layers_are_accounted_side_by_side() -> None:
    example = {"example_sampling_rate": 0.25, "example_steps": 4, "example_delta": 1e-5,
               "max_participations": 3}  # fmt: skip
    plan = {k: v for k, v in PLAN.items() if k != "noise_multiplier"}
    facts = account(plan | example | {"target_epsilon": 2.0, "example_epsilon": 3.0})
    assert facts["unit"] == "device" and 1.99 <= facts["epsilon"] <= 2.0
    layer = facts["example"]
    assert (layer["participations"], layer["steps"]) == (3, 12) and 2.99 <= layer["epsilon"] <= 3.0
    event = GaussianEvent(noise_multiplier=layer["noise_multiplier"], count=12,
                          sampling="poisson", sampling_rate=0.25)  # fmt: skip
    assert epsilon(event, 1e-5) == layer["epsilon"]
    plain = account(plan | {"target_epsilon": 2.0})
    assert plain["noise_multiplier"] == facts["noise_multiplier"]
    half = account(PLAN | example | {"example_epsilon": 3.0})
    assert half["example"] | {"steps": 12} == layer and half["epsilon"] == account(PLAN)["epsilon"]


@pytest.mark.parametrize(
    "options, words",
    [
        (PLAN | {"devices": 10**6}, "delta=1e-06 must be below 1/devices"),
        (PLAN | {"devices": 10**5, "cohort_size": 2e5}, "above 1"),
        (PLAN | {"devices": 10**5, "cohort_size": 500}, "contradicts cohort_size / devices"),
        (PLAN | {"solve": "rounds"}, "target_epsilon missing"),
        (PLAN | {"solve": "magic"}, "solve=magic"),
        (PLAN | {"target_epsilon": 2.0, "solve": "cohort"}, "devices missing"),
        (PLAN | {"devices": 2.5}, "devices=2.5"),
        (PLAN | {"example_steps": 3}, "both layers"),
        (PLAN | {"unit": "example", "example_epsilon": 3.0}, "unit=example contradicts"),
        (PLAN | {"example_noise_multiplier": 1.0, "example_epsilon": 3.0}, "contradict each other"),
        (PLAN | {"max_participations": 3}, "bounds steps on the device"),
        (PLAN | {"steps": 10**400}, "whole number from 1"),
        (PLAN | {"format": "statement"}, "needs run="),
        (PLAN | {"sweep": "max_rate"}, "cohort_size, levels"),
        (PLAN | {"sweep": "noise"}, "sweep=noise"),
        ({"noise_multiplier": 1.0, "steps": 10, "delta": 1e-2, "cohort_size": 50,
          "levels": [500, 500], "sweep": "max_rate"}, "1/devices"),
        ({"noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, "cohort_size": 50,
          "levels": [-1, 500], "sweep": "max_rate"}, "levels="),
    ],
)  # fmt: skip
def test_senseless_plans_are_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        account(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# -- sweeps ----------------------------------------------------------------------------------------

SWEEP = {"noise_multiplier": 1.0, "steps": 60, "delta": 1e-7, "cohort_size": 500,
         "preset": "assistant", "devices": 10**6}  # fmt: skip


def columns(facts: dict[str, Any]) -> list[dict[int, tuple[float, float]]]:
    return [
        {r["level"]: (r["sampling_rate"], r["epsilon"]) for r in row["by_level"]}
        for row in facts["sweep"]["rows"]
    ]


def test_a_cap_on_rates_spares_the_heavy_and_charges_the_light() -> None:
    facts = account(SWEEP | {"sweep": "max_rate", "values": [0.001, 0.005, 0.02]})
    rows = columns(facts)
    assert [row["value"] for row in facts["sweep"]["rows"]] == [0.001, 0.005, 0.02, 1.0]
    light, heavy = [row[0][1] for row in rows], [row[10][1] for row in rows]
    assert light == sorted(light, reverse=True) and heavy == sorted(heavy)
    for row, value in zip(rows, [0.001, 0.005, 0.02], strict=False):
        assert all(rate <= value for rate, _ in row.values())
        assert [e for _, e in sorted(row.values())] == sorted(e for _, e in row.values())


def test_a_uniform_mixture_ends_at_one_epsilon_for_all() -> None:
    facts = account(SWEEP | {"sweep": "uniform_mix", "max_rate": 0.01, "values": [0.5, 1.0]})
    assert [row["value"] for row in facts["sweep"]["rows"]] == [0.0, 0.5, 1.0]
    assert len({round(e, 9) for _, e in columns(facts)[-1].values()}) == 1
    spread = [max(e for _, e in row.values()) for row in columns(facts)]
    assert spread == sorted(spread, reverse=True)


def make_run(folder: Path) -> Path:
    """A ledger as a run by activity writes it."""
    counts = model_counts_of([5000.0, 3000.0, 1500.0, 400.0, 100.0])
    levels = [level for level, n in counts.rounded.items() for _ in range(n)]
    import numpy as np

    sampler = ActivitySampler(
        np.array(levels, dtype=np.uint8), 200, counts=counts, max_rate=0.08, uniform_mix=0.1
    )
    ledger = Ledger(levels=counts.rounded, deltas={"device": 1e-6}, claims=sampler.describe())
    for number in range(1, 21):
        ledger.append(GaussianEvent(
            noise_multiplier=0.9, sampling="poisson", round=number,
            by_level=tuple((lv, rate, 1) for lv, rate in sorted(sampler.rates.items())),
        ))  # fmt: skip
    ledger.save(folder / "ledger.json")
    return folder


def model_counts_of(expected: list[float]) -> Any:
    import numpy as np

    return model_counts(np.array(expected))


def test_a_sweep_of_a_run_has_the_run_among_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = account({"run": str(make_run(tmp_path)), "sweep": "max_rate", "values": [0.04, 0.2]})
    (own,) = [row for row in facts["sweep"]["rows"] if row["as_run"]]
    assert own["value"] == 0.08
    assert own["epsilon"] == pytest.approx(facts["epsilon"], rel=5e-3)
    for swept, stated in zip(own["by_level"], facts["by_level"], strict=True):
        assert swept["sampling_rate"] == pytest.approx(stated["sampling_rate"])
    options = AccountConfig(run=str(tmp_path), sweep="uniform_mix")
    assert run_account(options) == 0
    assert "as run" in capsys.readouterr().out
    options.format = "json"
    assert run_account(options) == 0
    assert json.loads(capsys.readouterr().out)["sweep"]["lever"] == "uniform_mix"


def test_what_was_not_sampled_by_activity_has_no_lever(tmp_path: Path) -> None:
    ledger = Ledger([GaussianEvent(noise_multiplier=1.0)], deltas={"device": 1e-6})
    ledger.save(tmp_path / "ledger.json")
    with pytest.raises(ConfigError, match="nothing to sweep"):
        account({"run": str(tmp_path), "sweep": "max_rate"})
