"""Laws of canary devices: what they hand over, who they are, and what an audit makes of them."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_fleets import CLIPPED, NOISED, OPTIMIZERS, fleet, parameters_of, parts
from small_runs import FIXED_NOISE, metrics, model, resume, run, run_until_killed

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.fleet import ExampleClipping, LocalTraining
from sottovoce.privacy.audit import directions as made
from sottovoce.privacy.audit.attacks import ATTACKS
from sottovoce.privacy.audit.device_attacks import known_round_scores, likelihood_scores
from sottovoce.privacy.audit.device_record import DeviceRecord, load_record
from sottovoce.privacy.audit.directions import Directions, flatten
from sottovoce.privacy.audit.material import Material
from sottovoce.privacy.audit.pooled import pooled_separation
from sottovoce.privacy.audit.roc import auc
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.checkpoints import load_latest
from sottovoce.server.device_canaries import COINS
from sottovoce.server.runs import load_run
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate
from sottovoce.simulations import blocks as cut
from sottovoce.simulations.canary_devices import (
    LOUD,
    CanaryDevicePopulation,
    CanaryDevices,
    direction_update,
    with_device_canaries,
)
from sottovoce.simulations.fleet import SimulatedFleet

SHAPES = {"b": torch.Size([7]), "a": torch.Size([5, 90]), "c": torch.Size([])}
CANARIES = (
    "privacy=device", *FIXED_NOISE[:2], "audit.device_canaries=30", "audit.canary_activity=8",
    "strategy.sampler=uniform", "cohort_size=40", "seed=7", "run.evaluate_every=9",
)


# -- directions ------------------------------------------------------------------------------------


def test_directions_have_norm_1_and_are_the_same_whenever_they_are_drawn() -> None:
    first, again = Directions(3, 4, SHAPES), Directions(3, 9, SHAPES)
    for canary in range(4):
        unit = first.unit(canary)
        assert {name: t.shape for name, t in unit.items()} == SHAPES
        assert np.linalg.norm(flatten(unit)) == pytest.approx(1, abs=1e-6)
        assert all(torch.equal(unit[name], again.unit(canary)[name]) for name in unit)
    assert not torch.equal(first.unit(0)["a"], first.unit(1)["a"])
    assert not torch.equal(first.unit(0)["a"], Directions(4, 4, SHAPES).unit(0)["a"])


@pytest.mark.parametrize("chunk", [64, 128, 1 << 20])
def test_dots_are_inner_products_with_each_direction_whatever_the_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Directions(3, 5, SHAPES)
    units = [flatten(expected.unit(canary)) for canary in range(5)]
    monkeypatch.setattr(made, "CHUNK", chunk)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    found = Directions(3, 5, SHAPES).dots(tensors)
    np.testing.assert_allclose(found, [flatten(tensors) @ unit for unit in units], atol=1e-5)


# -- what they hand over ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("example", [None, CLIPPED, NOISED], ids=["plain", "clipped", "noised"])
def test_every_direction_canary_hands_over_its_direction_at_the_clip_norm(
    example: ExampleClipping | None, optimizer: str
) -> None:
    plan = BatchPlan(4, local_epochs=1, max_examples=12, poisson=example is not None)
    training = LocalTraining(0.5, plan, example, 0.3, OPTIMIZERS[optimizer])
    canaries = CanaryDevices("direction", 4, 100, 16, seed=1)
    for canary in range(4):
        draws, data, updates = direction_update(
            canaries, 100 + canary, training, SHAPES, "a", server_round=2
        )
        unit = canaries.directions(SHAPES).unit(canary)
        for name, tensor in updates.signal.items():
            torch.testing.assert_close(tensor[0], 0.3 * unit[name], rtol=1e-4, atol=1e-7)
        assert float(updates.norms[0]) == pytest.approx(0.3 * (LOUD if canary % 2 else 1), rel=1e-4)
        assert bool(updates.clipped[0]) or canary % 2 == 0
        owed = 0.0 if updates.owed is None else float(updates.owed[0])
        assert owed == pytest.approx(training.noise_variance(4))
        assert draws[0].level == 4 and data.touched.shape == (1, 5)


def _with_canaries(workers: int = 1) -> SimulatedFleet:
    plain = fleet("bilstm", None, 0.05)
    canaries = CanaryDevices("direction", 6, len(plain.population), 8, seed=2)
    return SimulatedFleet(
        CanaryDevicePopulation(plain.population, canaries), plain.task, plain.model, plain.training,
        plain.source, 4, workers=workers,
    )


def test_a_fleet_adds_each_asked_canary_once_from_any_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cut, "LEAST", 4)
    monkeypatch.setattr(cut, "LARGEST", 1)
    natural, plain = np.arange(0, 40, 3, dtype=np.int64), fleet("bilstm", None, 0.05)
    start = parameters_of(plain.model)
    without = plain.train(start, natural, 3)
    both = np.concatenate([natural, [201, 204]])
    replies = []
    for workers in (1, 2):
        mixed = _with_canaries(workers)
        replies.append(mixed.train(start, both, 3))
        mixed.close()
    found, other = replies
    assert all(torch.equal(found.sums[name], other.sums[name]) for name in found.sums)
    shapes = {name: tensor.shape for name, tensor in found.sums.items()}
    units = [mixed.canaries.directions(shapes).unit(k) for k in (1, 4)]  # type: ignore[union-attr]
    for name, tensor in found.sums.items():
        added = 0.05 * (units[0][name] + units[1][name])
        torch.testing.assert_close(tensor, without.sums[name] + added, rtol=1e-4, atol=1e-6)
    counted = dict(without.devices_by_level)
    counted[3] = counted.get(3, 0) + 2
    assert found.devices_by_level == counted
    alone = _with_canaries().train(start, np.array([203], dtype=np.int64), 3)
    assert alone.devices_by_level == {3: 1}


def test_text_canaries_say_the_same_whoever_is_asked_beside_them() -> None:
    base, _, _ = parts("bilstm")
    mixed = CanaryDevicePopulation(base, CanaryDevices("text", 5, len(base), 6, seed=3))
    assert len(mixed) == len(base) + 5 and mixed.activity[-1] == 6 and mixed.natural is base
    asked = [np.array([0, 5]), np.array([1]), np.array([2, 2, 0])]
    together = mixed.examples(np.array([202, 17, 204]), asked)
    for place, (device, numbers) in enumerate(zip((202, 17, 204), asked, strict=True)):
        alone = mixed.examples(np.array([device]), [numbers])
        rows = np.arange(together.device_offsets[place], together.device_offsets[place + 1])
        taken = together.take(rows)
        for name in ("tokens", "offsets", "intent", "slots"):
            np.testing.assert_array_equal(getattr(taken, name), getattr(alone, name))
    said = mixed.examples(np.arange(200, 205))
    assert said.tokens.max() < len(base.words) and len({tuple(said.tokens[i * 36:][:6])
                                                        for i in range(5)}) == 5


def test_a_population_without_canaries_is_the_very_same_object() -> None:
    base, _, _ = parts("bilstm")
    assert with_device_canaries(base, None) is base
    assert with_device_canaries(base, {"device_canaries": 0}) is base


# -- scores ----------------------------------------------------------------------------------------


def synthetic(
    rounds: int, canaries: int, *, rate: float, shift: float, seed: int = 0, **changed: Any
) -> DeviceRecord:
    """A run of noise 1 in which canaries that are in add `shift` where they are drawn."""
    generator = np.random.default_rng(seed)
    inside = np.arange(canaries) % 2 == 0
    drawn = generator.random((rounds, canaries)) < rate
    dots = generator.standard_normal((rounds, canaries)) + shift * (drawn & inside)
    sample = generator.standard_normal((rounds, 512))
    facts: dict[str, Any] = {
        "kind": "direction", "first": 10, "activity": 4, "rate": rate, "seed": 0, "norm": shift,
        "inside": inside, "loudness": np.where(np.arange(canaries) // 2 % 2, LOUD, 1.0),
        "rounds": np.arange(1, rounds + 1), "drawn": drawn, "dots": dots,
        "deviation": np.ones(rounds), "clip_norm": np.full(rounds, shift),
        "answered": generator.poisson(50, rounds) * 1.0, "all_answered": True, "divisor": 50.0,
        "names": ("a",), "sizes": np.array([512.0]),
        "squares": (sample**2).sum(1, keepdims=True), "sample": sample,
    }
    return DeviceRecord(**{**facts, **changed})


def test_likelihood_scores_are_those_of_the_sampled_gaussian() -> None:
    record = synthetic(5, 40, rate=0.3, shift=1.5)
    centred = record.dots - np.median(record.dots, axis=1, keepdims=True)
    spread = np.maximum(1.0, 1.4826 * np.median(np.abs(centred), axis=1, keepdims=True))
    def density(x: Any, mean: float) -> Any:
        return np.exp(-((x - mean) ** 2) / (2 * spread**2))

    ratio = (0.7 * density(centred, 0) + 0.3 * density(centred, 1.5)) / density(centred, 0)
    np.testing.assert_allclose(likelihood_scores(record), np.log(ratio).sum(0), atol=1e-9)


def test_known_rounds_measure_the_shift_that_one_release_makes() -> None:
    record = synthetic(1, 4000, rate=1.0, shift=1.0, seed=4)
    scores = known_round_scores(record)
    found = pooled_separation(scores[record.inside], scores[~record.inside])
    centred = record.dots[0] - np.median(record.dots[0])
    spread = max(1.0, 1.4826 * float(np.median(np.abs(centred))))
    assert found == pytest.approx(1.0, abs=0.2) and spread < 1.25
    few = synthetic(3, 50, rate=0.2, shift=1.0)
    never = ~few.drawn.any(axis=0)
    assert never.any() and np.array_equal(np.isnan(known_round_scores(few)), never)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries") / "run"
    assert run(folder, *CANARIES) == 0
    return folder


def test_only_canaries_whose_coin_says_so_take_part(finished: Path) -> None:
    record = load_record(finished)
    assert record is not None and record.first == 100
    coins = NoiseSource.from_seed(7).generator(COINS).random(30) < 0.5
    np.testing.assert_array_equal(record.inside, coins)
    state, _ = load_latest(finished / "checkpoints")
    took_part = state.participation["devices"].numpy()
    present = np.flatnonzero((record.drawn & record.inside).any(axis=0)) + 100
    np.testing.assert_array_equal(took_part[took_part >= 100], present)
    assert [r["devices"] for r in metrics(finished)[1:]] == record.answered.tolist()
    run_ = load_run(finished)
    assert len(run_.population) == 100 and run_.participants is not None
    assert run_.participants.max() < 100
    for name in ("device_canaries.json", "device_canaries.jsonl"):
        assert stat.S_IMODE((finished / name).stat().st_mode) == 0o600


def test_a_resumed_run_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_until_killed(tmp_path / "run", *CANARIES, at=2)
    with (tmp_path / "run" / "device_canaries.jsonl").open("a") as file:
        file.write('{"round": 3, "drawn": [1')  # killed in the middle of a line
    assert resume(tmp_path / "run") == 0
    assert model(tmp_path / "run") == model(finished)
    for name in ("device_canaries.json", "device_canaries.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_example_canaries_beside_them_change_nothing_for_canary_devices(
    finished: Path, tmp_path: Path
) -> None:
    both = ("audit.canaries=mislabelled", "audit.number=40")
    assert run(tmp_path / "run", *CANARIES, *both) == 0
    record, alone = load_record(tmp_path / "run"), load_record(finished)
    assert record is not None and alone is not None
    np.testing.assert_array_equal(record.inside, alone.inside)
    np.testing.assert_array_equal(record.drawn, alone.drawn)
    assert run_audit(AuditConfig(run=str(tmp_path / "run"))) in (0, 4)
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    names = {attack["name"] for attack in found["attacks"] if attack["valid"]}
    assert {"canary_device_rounds", "canary_loss"} <= names and len(found["checks"]) == 5


@pytest.mark.parametrize("name", ["device_canaries.json", "device_canaries.jsonl"])
def test_a_run_whose_record_is_gone_or_another_runs_is_not_audited_without_it(
    finished: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).unlink()
    with pytest.raises(RunError, match="device_canaries"):
        load_run(folder)
    shutil.copy(finished / name, folder)
    header = json.loads((folder / "device_canaries.json").read_text())
    (folder / "device_canaries.json").write_text(json.dumps({**header, "seed": 8}))
    with pytest.raises(RunError, match="another run"):
        load_run(folder)
    shutil.copy(finished / "device_canaries.json", folder)
    lines = (folder / "device_canaries.jsonl").read_text().splitlines(keepends=True)
    (folder / "device_canaries.jsonl").write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(RunError, match="lacks some of the 3 rounds"):
        load_run(folder)


def test_an_audit_holds_the_canaries_bound_against_the_device_claim(
    finished: Path, tmp_path: Path
) -> None:
    code = run_audit(AuditConfig(
        run=str(finished), output=str(tmp_path), attacks=[
            "canary_device_rounds", "canary_device_known", "canary_device_final"]
    ))
    record = json.loads((tmp_path / "audit.json").read_text())
    attacks = {attack["name"]: attack for attack in record["attacks"]}
    assert attacks["canary_device_rounds"]["relation"] == "add_remove"
    assert attacks["canary_device_rounds"]["epsilon_claimed"] == record["claim"]["epsilon"]
    assert attacks["canary_device_final"]["valid"]
    assert not attacks["canary_device_known"]["valid"], "it knows who was sampled when"
    assert [check["name"] for check in record["checks"]] == [
        "noise_level", "noise_reuse", "clipping", "weighting", "divisor"]
    assert code in (0, 4) and "What the claim rests on" in (tmp_path / "audit.html").read_text()


def test_both_layers_and_fedadam_and_rests_run_with_canaries(tmp_path: Path) -> None:
    both = ("privacy=both", *FIXED_NOISE, "audit.device_canaries=6", "audit.canary_activity=8",
            "rounds=2", "seed=3")
    assert run(tmp_path / "both", *both) == 0
    resting = ("privacy.device.min_separation=2", "privacy.device.mechanism=banded",
               "privacy=device", "privacy.device.epsilon=8", "audit.device_canaries=6",
               "audit.canary_activity=8", "rounds=4", "seed=3")
    assert run(tmp_path / "resting", *resting) == 0
    for name in ("both", "resting"):
        record = load_record(tmp_path / name)
        assert record is not None and (record.deviation > 0).all()


def test_directions_without_noise_are_told_apart_and_texts_are_scored(tmp_path: Path) -> None:
    common = ("privacy=none", "audit.device_canaries=40", "strategy=fedavg", "cohort_size=70",
              "strategy.sampler=uniform", "audit.canary_activity=16", "seed=5", "rounds=3",
              "privacy.device.clip_norm=20")
    for kind, attack in (("direction", "canary_device_known"), ("text", "canary_device_loss")):
        assert run(tmp_path / kind, *common, f"audit.canary_kind={kind}") == 0
        run_audit(AuditConfig(
            run=str(tmp_path / kind), attacks=[attack], format="json", output=str(tmp_path)
        ))
        found = json.loads((tmp_path / "audit.json").read_text())
        assert found["verdict"] == "INCONCLUSIVE", "nothing is claimed"
        record = load_record(tmp_path / kind)
        assert record is not None
        scored = record.drawn.any(axis=0) if kind == "direction" else np.ones(40, dtype=bool)
        assert found["attacks"][0]["n_members"] == (record.inside & scored).sum()
        assert found["attacks"][0]["relation"] == "add_remove"
        if kind == "direction":
            assert found["attacks"][0]["auc"] > 0.9
    assert auc_once_memorised(tmp_path / "text") > 0.95


def auc_once_memorised(folder: Path) -> float:
    """AUC of the loss of text canaries on a model that was taught the sentences of those inside."""
    finished, record = load_run(folder), load_record(folder)
    assert record is not None
    population = finished.population
    ids = np.flatnonzero(record.inside) + record.first
    layer = CanaryDevicePopulation(
        population, CanaryDevices("text", 40, record.first, record.activity, record.seed)
    )
    batch = finished.task.collate(layer.examples(ids, [np.arange(1)] * len(ids)))
    model = copy.deepcopy(finished.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        finished.task.losses(model, batch).mean().backward()
        optimizer.step()
    taught = replace(finished, model=model)
    attack = ATTACKS["canary_device_loss"]
    scores = attack._scores(record, Material(taught, devices=10, seed=0))
    return auc(scores[record.inside], scores[~record.inside])


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["audit.canary_kind=loud"], "audit.canary_kind=loud"),
        (["audit.device_canaries=-1"], "audit.device_canaries=-1"),
        (["privacy=device", "noise_cohort_size=90"], "noise_cohort_size=90"),
        (["timeline=continual"], "timeline"),
        (["strategy.level_epsilon=2"], "level_epsilon"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    overrides: list[str], word: str, tmp_path: Path
) -> None:
    asked = ["population.devices=100", "cohort_size=10", "audit.device_canaries=10", *overrides]
    with pytest.raises(ConfigError, match=word) as raised:
        simulate(compose(asked), tmp_path)
    assert "\n" not in str(raised.value)
