"""Training metrics that are released with noise: what they are, what they cost, what they hide."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_fleets import DEVICES, fleet, parameters_of
from small_runs import metrics, model, resume, run, run_until_killed, summary

from sottovoce.client.errors import ConfigError
from sottovoce.client.figures import device_figures
from sottovoce.client.fleet import FleetReply
from sottovoce.client.groups import LocalUpdates
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.private_metrics import (
    FIGURES,
    NORMS,
    PREFIX,
    MetricBounds,
    PrivateMetrics,
    default_noise,
)
from sottovoce.server.checkpoints import load_latest
from sottovoce.server.limits import validate
from sottovoce.server.metrics_setup import private_metrics
from sottovoce.server.settings import compose
from sottovoce.server.setup import make_setup
from sottovoce.simulations.experiment import build_experiment

BOUNDS = MetricBounds(loss=5.0, examples=12)
NOISY = st.floats(0.05, 50)
AWKWARD = st.floats(allow_nan=True, allow_infinity=True, width=32)

# -- the split -------------------------------------------------------------------------------------


@given(NOISY, st.floats(1.01, 1000))
def test_the_two_parts_are_worth_the_whole(whole: float, times: float) -> None:
    ours = PrivateMetrics(whole, whole * times, BOUNDS)
    assert ours.rest > whole
    assert (ours.rest**-2 + ours.own**-2) ** -0.5 == pytest.approx(whole, rel=1e-9)


@given(NOISY, st.integers(1, 10**6))
def test_the_usual_split_adds_at_most_a_thirtieth_to_the_noise_of_the_sum(
    whole: float, cohort: int
) -> None:
    ours = PrivateMetrics(whole, default_noise(cohort, whole), BOUNDS)
    assert whole < ours.rest < whole * (1 + 1 / 30)
    assert ours.deviation >= cohort / 100 * (1 - 1e-9)


def test_no_noise_stays_no_noise() -> None:
    assert PrivateMetrics(0.0, default_noise(100, 0.0), BOUNDS).rest == 0.0


# -- what a device contributes ---------------------------------------------------------------------


@given(st.lists(st.tuples(AWKWARD, st.integers(0, 1000), AWKWARD, st.booleans()), min_size=1))
def test_no_device_contributes_more_than_norm_one(
    devices: list[tuple[float, int, float, bool]],
) -> None:
    """Whatever it measured: losses and norms that are huge, negative, infinite or no number."""
    losses, visits, norms, clipped = zip(*devices, strict=True)
    updates = LocalUpdates(
        {}, None, torch.ones(len(devices), dtype=torch.bool), torch.tensor(norms),
        torch.tensor(clipped), torch.tensor(losses, dtype=torch.float64), torch.tensor(visits), 0,
    )
    rows = device_figures(updates, BOUNDS, 0.5)
    assert bool((rows >= 0).all()) and bool((rows <= 1).all())
    assert bool(((rows / math.sqrt(len(FIGURES))).norm(dim=1) <= 1 + 1e-12).all())


def measured(devices: np.ndarray, bounds: MetricBounds | None, clip: float = 0.05) -> Any:
    fast = fleet("bilstm", None, clip)
    fast.training = replace(fast.training, metric_bounds=bounds)
    return fast.train(parameters_of(fast.model), devices, 2).totals


def alone(device: int, bounds: MetricBounds, clip: float) -> list[float]:
    """A device's figures from its exact ones, slowly."""
    exact = measured(np.array([device]), None, clip)
    mean = exact["loss"] / exact["examples"]
    return [
        1.0,
        exact["clipped_devices"],
        min(mean / bounds.loss, 1.0),
        min(exact["examples"] / bounds.examples, 1.0),
        min(exact["norm"] / (NORMS * clip), 1.0),
    ]


@pytest.mark.parametrize("bounds", [BOUNDS, MetricBounds(loss=1.0, examples=2)])
def test_a_fleet_sums_what_each_device_cut_to_its_bounds(bounds: MetricBounds) -> None:
    found = measured(DEVICES, bounds)
    slow = np.sum([alone(device, bounds, 0.05) for device in DEVICES.tolist()], axis=0)
    ours = [found[PREFIX + name] for name in FIGURES]
    assert ours == pytest.approx(slow.tolist(), rel=1e-4)
    assert found[PREFIX + "devices"] == len(DEVICES)


# -- what a round releases -------------------------------------------------------------------------


def test_noise_has_the_deviation_that_was_promised() -> None:
    ours = PrivateMetrics(1.0, 7.0, BOUNDS)
    generator = np.random.default_rng(1)
    drawn = np.array([list(ours.noised({}, generator).values()) for _ in range(4000)])
    scaled = drawn / math.sqrt(len(FIGURES))  # to the vector of norm 1
    assert scaled.std(axis=0) == pytest.approx(np.full(len(FIGURES), 7.0), rel=0.05)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(len(FIGURES))).max() < 0.08


def test_with_little_noise_they_are_the_exact_ones() -> None:
    ours = PrivateMetrics(1e-9, 1e-8, MetricBounds(loss=50.0, examples=100))
    sums = {"devices": 20.0, "clipped": 5.0, "loss": 1.6, "examples": 2.4, "norm": 3.0}
    totals = {PREFIX + name: value for name, value in sums.items()}
    found = ours.metrics(ours.noised(totals, np.random.default_rng(0)), clip_norm=0.5)
    assert found == pytest.approx({
        "devices": 20, "examples": 240, "clipped_fraction": 0.25, "train_loss": 4.0,
        "mean_signal_norm": 0.15 * NORMS * 0.5,
    }, rel=1e-5)  # fmt: skip


@given(st.lists(st.floats(-1e6, 1e6), min_size=len(FIGURES), max_size=len(FIGURES)))
def test_whatever_the_noise_metrics_stay_in_their_range(sums: list[float]) -> None:
    found = PrivateMetrics(1.0, 4.0, BOUNDS).metrics(dict(zip(FIGURES, sums, strict=True)), 0.5)
    assert 0 <= found["clipped_fraction"] <= 1
    assert 0 <= found["train_loss"] <= BOUNDS.loss
    assert found["devices"] >= 0 and found["examples"] >= 0


# -- runs ------------------------------------------------------------------------------------------

RUN = (
    "privacy=device", "privacy.device.private_metrics=true", "privacy.device.epsilon=null",
    "privacy.device.noise_multiplier=1.5", "seed=4", "rounds=3", "run.evaluate_every=3",
    "population.max_examples_per_round=4", "run.evaluation_devices=1", "run.workers=1",
)  # fmt: skip
RAW = {"update_norm", "dropped", "devices_by_level", "levels", "signal_to_noise",
       "example_clipped_fraction", "bad_replies"}


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ledger.json").read_text())
    return found


def test_a_run_writes_noised_metrics_and_costs_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    private, plain = tmp_path / "private", tmp_path / "plain"
    assert run(private, *RUN, "run.report=true") == 0
    assert run(plain, *RUN, "privacy.device.private_metrics=false") == 0
    ours, exact = metrics(private)[1:], metrics(plain)[1:]
    for noised, raw in zip(ours, exact, strict=True):
        assert not RAW & set(noised)
        assert {"devices", "examples", "train_loss", "clipped_fraction"} <= set(noised)
        assert noised["train_loss"] != raw["train_loss"]
    assert not any("held_out_examples" in name for record in metrics(private) for name in record)
    assert summary(private)["epsilon"]["device"] == summary(plain)["epsilon"]["device"]
    event = facts(private)["events"][-1]
    assert event["noise_multiplier"] == 1.5 and "noised training metrics" in event["purpose"]
    assert facts(private)["claims"]["private_metrics"]["noise_multiplier"] == 6
    told, usual = summary(private)["statement"], summary(plain)["statement"]
    assert "metrics and training figures" in usual and "metrics and training figures" not in told
    assert "held-out devices, which never train" in told
    page = (private / "report.html").read_text()
    assert "exact, for the operator" not in page and "cut to a public bound" in page


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(
    clipping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (*RUN, f"privacy.device.clipping={clipping}")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(whole, *words) == 0
    run_until_killed(folder, *words, at=2)
    assert resume(folder) == 0
    assert model(folder) == model(whole)
    untimed = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in metrics(one)]
        for one in (folder, whole)
    ]
    assert untimed[0] == untimed[1]
    assert Ledger.load(folder / "ledger.json") == Ledger.load(whole / "ledger.json")
    assert {event["noise_multiplier"] for event in facts(whole)["events"] if
            event["type"] == "gaussian"} == {1.5}


def test_figures_of_a_round_that_is_asked_for_again_are_not_released_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where fleets draw afresh, the same noise on other figures would show their difference."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    run_until_killed(folder, *RUN, at=2)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    experiment = build_experiment(text)
    state, _ = load_latest(folder / "checkpoints")
    source = NoiseSource.load(folder / "checkpoints")
    strategy = make_setup(experiment, source, state, text).strategy
    strategy.book_lost(2)
    ours = FleetReply({}, {}, 0, {PREFIX + name: 3.0 for name in FIGURES})
    assert set(strategy._noised_metrics(ours, 2)) == {"clip_norm"}
    assert "train_loss" in strategy._noised_metrics(ours, 3)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy=both"], "only after the server has seen them"),
        (["privacy=none"], "does nothing while"),
        (["privacy=device", "privacy.device.min_separation=4"], "plans for all rounds together"),
        (["privacy=device", "privacy.device.metrics_noise_multiplier=-1"], "must be above 0"),
        (["privacy=device", "privacy.device.metrics_loss_bound=0"], "must be above 0"),
        (["privacy=device", "privacy.device.private_metrics=false",
          "privacy.device.metrics_noise_multiplier=9"], "only used with"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        validate(compose(["privacy.device.private_metrics=true", *overrides]))
    assert "\n" not in str(caught.value)


def test_figures_that_spend_more_than_the_round_are_refused() -> None:
    config = compose([
        "privacy=device", "privacy.device.private_metrics=true",
        "privacy.device.metrics_noise_multiplier=2",
    ])
    with pytest.raises(ConfigError, match="metrics_noise_multiplier=2 must be above") as caught:
        private_metrics(config, BOUNDS, 2.0, 100)
    assert "\n" not in str(caught.value)


def test_without_held_out_devices_nothing_is_evaluated_on_those_that_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sottovoce.client.errors import DataError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no others are evaluated on"):
        run(tmp_path / "run", *RUN, "population.held_out_devices=0")
