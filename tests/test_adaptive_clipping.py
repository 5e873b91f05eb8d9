"""A clip norm of device updates that follows a private quantile, and what it costs: no more."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleets import DEVICES, NOISED, assert_same, fleet, parameters_of
from small_runs import metrics, model, resume, run, run_until_killed, summary
from torch import Tensor

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import FleetReply, LocalTraining
from sottovoce.client.messages import (
    read_clip_norm,
    read_train_content,
    reply_content,
    to_record,
)
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.adaptive import AdaptiveMechanism
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.optimizer.quantile import QuantileClip
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.simulations.grid import LocalGrid
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.noised_sum import NoisedSum
from sottovoce.strategies.optimizers import FedAvg
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.samplers import FixedSizeSampler, Sampler, UniformSampler

POPULATION, COHORT = 400, 100
ACTIVITY = np.full(POPULATION, 3)
NORMS = np.random.default_rng(0).lognormal(0.5, 0.8, POPULATION)
PARAMETERS = {"w": torch.zeros(30)}


def of_round(number: int, purpose: str = "noise") -> np.random.Generator:
    return NoiseSource.from_seed(2).generator(purpose, number)


def mechanism(
    noise: float = 2.0, count_noise: float = 5.0, clip_norm: float = 0.1, target: float = 0.5
) -> AdaptiveMechanism:
    quantile = QuantileClip(clip_norm, count_noise=count_noise, target=target)
    return AdaptiveMechanism(quantile, noise, COHORT)


# -- the mechanism ---------------------------------------------------------------------------------


@given(st.floats(0.2, 20), st.floats(0.6, 50), st.floats(0, 1), st.floats(-0.5, 0.5))
def test_a_device_moves_sum_and_count_together_by_no_more_than_the_noise_asked_for(
    noise: float, share: float, length: float, indicator: float
) -> None:
    """In units of their noise: a contribution of norm at most S and a count within a half."""
    ours = mechanism(noise, count_noise=share * noise)
    moved = math.hypot(
        length * ours.clip_norm / ours.deviation, indicator / ours.quantile.count_noise
    )
    worst = math.hypot(ours.clip_norm / ours.deviation, 0.5 / ours.quantile.count_noise)
    assert moved <= worst * (1 + 1e-12)
    assert worst == pytest.approx(1 / noise, rel=1e-9)
    assert ours.sum_multiplier > noise


def test_recording_only_the_noise_of_the_sum_would_understate() -> None:
    ours = mechanism(1.0, count_noise=0.6)
    z, sampling = ours.noise_multiplier, {"sampling": "poisson", "sampling_rate": 0.01}
    true, naive = (
        epsilon(GaussianEvent(noise_multiplier=m, count=1000, **sampling), 1e-5)  # type: ignore[arg-type]
        for m in (z, ours.sum_multiplier)
    )
    assert true == pytest.approx(1.828, abs=2e-3)
    assert naive < 0.9


def test_releases_have_the_noise_of_the_sum() -> None:
    ours = mechanism(2.0, count_noise=4.0, clip_norm=0.3)
    released = ours.release({"w": torch.zeros(100_000)}, 0.0, of_round(1))["w"]
    assert float(released.std()) == pytest.approx(ours.sum_multiplier * 0.3, rel=0.02)
    with pytest.raises(ValueError, match="local_variance=1"):
        ours.release({"w": torch.zeros(3)}, 1.0, of_round(1))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("first", [0.02, 40.0])
def test_the_clip_norm_comes_to_the_quantile_of_the_norms(target: float, first: float) -> None:
    ours = mechanism(clip_norm=first, target=target)
    generator, found = np.random.default_rng(1), []
    for number in range(250):
        norms = NORMS[generator.random(POPULATION) < COHORT / POPULATION]
        ours.observe(len(norms), float((norms > ours.clip_norm).sum()), of_round(number))
        found.append(ours.clip_norm)
    assert np.mean(NORMS <= np.median(found[150:])) == pytest.approx(target, abs=0.05)


def test_the_count_is_divided_by_the_public_cohort_and_cannot_be_forged_beyond_it() -> None:
    for devices, clipped in ((40, 10.0), (100, 100.0), (0, 0.0), (10, 99.0), (10, -3.0)):
        ours = mechanism(count_noise=1e-9, noise=1e-9)
        before = ours.clip_norm
        ours.observe(devices, clipped, of_round(1))
        below = devices - min(max(clipped, 0), devices)
        fraction = (below - devices / 2) / COHORT + 0.5
        assert ours.clip_norm == pytest.approx(before * math.exp(-0.2 * (fraction - 0.5)))


def test_its_state_is_exact() -> None:
    ours, other = mechanism(), mechanism()
    ours.observe(100, 60.0, of_round(1))
    other.load(ours.state())
    assert other.clip_norm == ours.clip_norm != mechanism().clip_norm


# -- a round ---------------------------------------------------------------------------------------


def clipping_fleets(nodes: int, sent: list[float | None]) -> LocalGrid:
    """Devices whose updates have the norms NORMS, clipped to what the message says."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        _, devices, _, _ = read_train_content(message.content)
        clip_norm = read_clip_norm(message.content)
        sent.append(clip_norm)
        bound = math.inf if clip_norm is None else clip_norm
        total = float(np.minimum(NORMS[devices], bound).sum())
        update = torch.full((30,), total / math.sqrt(30))
        totals = {"clipped_devices": float((NORMS[devices] > bound).sum()), "examples": 1.0}
        levels = Counter(activity_levels(ACTIVITY[devices]).tolist())
        return Message(
            reply_content(FleetReply({"w": update}, dict(levels), 0, totals)), reply_to=message
        )

    return LocalGrid(app, {}, [{} for _ in range(nodes)])


def strategy(ours: Any, sampler: Sampler) -> NoisedSum:
    return NoisedSum(
        sampler=sampler, activity=ACTIVITY, optimizer=FedAvg(1.0), mechanism=ours,
        training=LocalTraining(0.5, BatchPlan(4, 1, 16, poisson=False), None, ours.clip_norm),
        ledger=Ledger(), participation=Participation(), source=NoiseSource.from_seed(4),
        settings="",
    )  # fmt: skip


def play(one: NoisedSum, grid: LocalGrid, rounds: range) -> list[dict[str, Any]]:
    found, parameters = [], PARAMETERS
    for number in rounds:
        messages = one.configure_train(number, to_record(parameters), ConfigRecord(), grid)
        _, record = one.aggregate_train(number, grid.send_and_receive(messages))
        found.append(dict(record))
    return found


@pytest.mark.parametrize("nodes", [1, 3])
def test_fleets_clip_to_the_norm_of_the_round_that_metrics_name(nodes: int) -> None:
    sent: list[float | None] = []
    one = strategy(mechanism(), UniformSampler(POPULATION, COHORT, seed=1))
    records = play(one, clipping_fleets(nodes, sent), range(1, 5))
    assert sent == [record["clip_norm"] for record in records for _ in range(nodes)]
    assert len(set(sent)) == 4
    assert one.mechanism is not None and one.mechanism.clip_norm not in sent


def test_a_fixed_clip_norm_is_not_sent() -> None:
    from sottovoce.privacy.mechanisms.device import DeviceMechanism

    sent: list[float | None] = []
    one = strategy(DeviceMechanism(0.7, 2.0), UniformSampler(POPULATION, COHORT, seed=1))
    (record,) = play(one, clipping_fleets(1, sent), range(1, 2))
    assert sent == [None] and record["clip_norm"] == 0.7
    assert one.mechanism_state() == {}


@pytest.mark.parametrize("fixed", [False, True])
def test_the_ledger_gets_the_noise_of_the_round_as_a_whole(fixed: bool) -> None:
    kind = FixedSizeSampler if fixed else UniformSampler
    one = strategy(mechanism(noise=1.7), kind(POPULATION, COHORT, seed=1))
    play(one, clipping_fleets(2, []), range(1, 4))
    assert len(one.ledger) == 3
    for event in one.ledger:
        assert isinstance(event, GaussianEvent)
        assert event.noise_multiplier == 1.7
        assert event.relation == ("replace_one" if fixed else "add_remove")


def test_the_noise_of_sum_and_count_is_not_shared() -> None:
    """Were the count's noise the first of the sum's, both could be told from the release."""
    one = strategy(mechanism(), UniformSampler(POPULATION, COHORT, seed=1))
    names: list[str] = []
    drawn = one.source.generator

    def watched(purpose: str, *key: int) -> np.random.Generator:
        names.append(purpose)
        return drawn(purpose, *key)

    one.source.generator = watched  # type: ignore[method-assign]
    play(one, clipping_fleets(1, []), range(1, 2))
    assert len(names) == len(set(names)) == 2


# -- the fleet -------------------------------------------------------------------------------------


def sums_of(update_clip: float, sent: float | None) -> tuple[dict[str, Tensor], float]:
    fast = fleet("bilstm", None, update_clip)
    parameters = parameters_of(fast.model)
    if sent is not None:
        fast.train(parameters, DEVICES, 1)
        fast.set_clip_norm(sent)
    reply = fast.train(parameters, DEVICES, 2)
    return reply.sums, reply.totals["clipped_devices"]


def test_a_simulated_fleet_clips_to_what_it_is_sent() -> None:
    plain, clipped = sums_of(0.02, None)
    moved, also = sums_of(5.0, 0.02)
    assert clipped == also > 0
    assert_same(moved, plain, tolerance=1e-6)
    assert sums_of(5.0, None)[1] == 0


def test_fleets_whose_devices_add_noise_refuse_a_moving_norm() -> None:
    noised = fleet("bilstm", NOISED, 0.05)
    noised.set_clip_norm(None)
    noised.set_clip_norm(0.05)
    for one in (noised, fleet("bilstm", None, None)):
        with pytest.raises(ConfigError, match="clip_norm=0.3 was sent to devices"):
            one.set_clip_norm(0.3)


# -- runs ------------------------------------------------------------------------------------------

RUN = (
    "privacy=device", "privacy.device.clipping=adaptive", "privacy.device.clip_norm=5",
    "privacy.device.noise_multiplier=1.5", "privacy.device.epsilon=null", "seed=4", "rounds=5",
    "run.evaluate_every=5", "population.max_examples_per_round=4", "run.evaluation_devices=1",
)  # fmt: skip


def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(whole, *RUN) == 0
    run_until_killed(folder, *RUN, at=4)
    assert resume(folder) == 0
    assert model(folder) == model(whole)
    norms = [record["clip_norm"] for record in metrics(whole)[1:]]
    assert norms == [record["clip_norm"] for record in metrics(folder)[1:]]
    assert norms[0] == 5 and len(set(norms)) == 5 and norms[-1] < 5
    assert Ledger.load(folder / "ledger.json") == Ledger.load(whole / "ledger.json")


def test_it_costs_what_a_fixed_norm_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for kind in ("adaptive", "fixed"):
        folder = tmp_path / kind
        assert run(folder, *RUN, f"privacy.device.clipping={kind}", "rounds=2") == 0
        found.append(summary(folder)["epsilon"]["device"])
    assert found[0] == found[1]


@settings(max_examples=20)
@given(st.floats(0.1, 30), st.integers(1, 5000))
def test_the_usual_split_adds_at_most_a_sixth_to_the_noise_of_the_sum(
    noise: float, cohort: int
) -> None:
    from sottovoce.server.schedule_setup import adaptive_mechanism

    config = compose(["privacy=device"])
    ours = adaptive_mechanism(config, noise, cohort)
    assert noise < ours.sum_multiplier < noise * 7 / 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy=both", "privacy.device.clipping=adaptive"], "no example's noise covers"),
        (["privacy.device.clipping=adaptive", "privacy.device.min_separation=4"],
         "moves the scale that correlated noise was set for"),
        (["privacy.device.clipping=quantile"], "clipping=quantile does not exist"),
        (["privacy.device.count_noise=4"], "only used by privacy.device.clipping=adaptive"),
        (["privacy.device.clipping=adaptive", "privacy.device.count_noise=1",
          "privacy.device.epsilon=null", "privacy.device.noise_multiplier=2"], "above half of"),
        (["privacy.device.clipping=adaptive", "privacy.device.target_quantile=1"],
         "target_quantile=1.0 must be between 0 and 1"),
        (["privacy=none", "privacy.device.clipping=adaptive"], "does nothing while"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        validate(compose(["privacy=device", *overrides]))
    assert "\n" not in str(caught.value)


def test_a_count_that_spends_more_than_the_target_is_refused_when_the_noise_is_found() -> None:
    from sottovoce.server.schedule_setup import adaptive_mechanism

    config = compose(["privacy=device", "privacy.device.count_noise=0.4"])
    with pytest.raises(ConfigError, match="count_noise=0.4 must be above"):
        adaptive_mechanism(config, 2.0, 100)
