"""Fleets and whole runs of bags of words: seeded, on one worker or two, without kernels too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bag_fleets import CLIPPED, NOISED, Bag, Sayings, parameters_of, task_of, training_of
from safetensors.torch import load_file
from torch import Tensor

from sottovoce.client import bag_trainer, native
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import ExampleClipping, FleetReply
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate
from sottovoce.simulations import group_size
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.simulations.group_size import BAGS, NATIVE, Way

DEVICES = np.arange(300, dtype=np.int64)

needs_kernels = pytest.mark.skipif(
    native.kernels() is None, reason="the kernels were not built: no C compiler at installation"
)


def fleet(
    example: ExampleClipping | None, workers: int = 1, group: int | None = None
) -> SimulatedFleet:
    population = Sayings(300)
    return SimulatedFleet(
        population, task_of(population), Bag(), training_of(example, 0.2),
        NoiseSource.from_seed(4), group, workers,
    )


def reply(one: SimulatedFleet) -> FleetReply:
    try:
        return one.train(parameters_of(one.model), DEVICES, 3)
    finally:
        one.close()


@needs_kernels
@pytest.mark.parametrize("example", [None, NOISED])
def test_a_bag_is_trained_by_the_kernels_unless_a_group_size_is_given(
    example: ExampleClipping | None,
) -> None:
    assert fleet(example).size.chosen == Way(NATIVE, BAGS)
    assert fleet(example, group=8).size.chosen == Way("grouped", 8)


@needs_kernels
@pytest.mark.parametrize("example", [None, CLIPPED])
def test_a_round_is_that_of_the_grouped_engine(example: ExampleClipping | None) -> None:
    fast, slow = reply(fleet(example)), reply(fleet(example, group=8))
    for name, total in slow.sums.items():
        torch.testing.assert_close(fast.sums[name], total, rtol=1e-4, atol=3e-5)
    assert fast.devices_by_level == slow.devices_by_level
    assert fast.totals == pytest.approx(slow.totals, rel=1e-4)


@needs_kernels
@pytest.mark.parametrize("example", [None, NOISED])
def test_a_seeded_round_gives_the_same_bytes_on_one_worker_or_two(
    example: ExampleClipping | None,
) -> None:
    first = reply(fleet(example))
    for again in (reply(fleet(example)), reply(fleet(example, workers=2))):
        for name, total in first.sums.items():
            assert torch.equal(again.sums[name], total), name
        assert again.totals == first.totals


@needs_kernels
def test_the_noise_of_both_ways_is_as_large() -> None:
    """Next to no signal: the sums are noise of the variance that devices declare."""
    loud = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)
    for way in (None, 16):
        one = fleet(loud, group=way)
        found = reply(one)
        declared = sum(
            n * one.training.noise_variance(level) for level, n in found.devices_by_level.items()
        )
        values = torch.cat([t.double().flatten() for t in found.sums.values()]) / declared**0.5
        assert float(values.pow(2).mean()) == pytest.approx(1, abs=6 * (2 / len(values)) ** 0.5)


@needs_kernels
def test_smaller_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = reply(fleet(NOISED))
    one = fleet(NOISED)
    one.size = group_size.GroupSize([Way(NATIVE, BAGS // 4)], fixed=True)
    monkeypatch.setattr("sottovoce.simulations.fleet.block_devices", lambda *a, **b: BAGS)
    for name, total in reply(one).sums.items():
        torch.testing.assert_close(total, first.sums[name], rtol=1e-6, atol=1e-6)


def corpus(folder: Path) -> Path:
    """Devices that ask for one of four things, without slots."""
    random = np.random.default_rng(1)
    asked = ["play some music", "what is the weather", "set an alarm", "call my mother"]
    path = folder / "asked.jsonl"
    with path.open("w") as file:
        for device in range(120):
            for _ in range(int(random.integers(2, 9))):
                intent = int(random.integers(4))
                more = " ".join(random.choice(["please", "now", "again", "today"], 2))
                row = {"user_id": f"d{device}", "text": f"{asked[intent]} {more}",
                       "intent": asked[intent].split()[0]}
                file.write(json.dumps(row) + "\n")
    return path


def run(folder: Path, *overrides: str) -> dict[str, Tensor]:
    folder.mkdir()
    assert simulate(compose([
        "population=jsonl", f"population.path={corpus(folder)}",
        "model=bag", "model.hidden_size=16", "task.vocabulary.buckets=64", "cohort_size=40",
        "rounds=5", "strategy.max_rate=1", "strategy.learning_rate=0.5", "run.report=false",
        "run.progress=false", *overrides,
    ]), folder) == 0
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "privacy", ["privacy=none", "privacy=example privacy.example.epsilon=null "
                "privacy.example.noise_multiplier=1"]
)
def test_a_whole_run_of_a_bag_and_the_same_one_again(tmp_path: Path, privacy: str) -> None:
    first, again = (run(tmp_path / name, "seed=3", *privacy.split()) for name in "ab")
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name


@needs_kernels
def test_a_run_without_kernels_ends_at_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = run(tmp_path / "fast", "seed=3", "privacy=none")
    monkeypatch.setattr(bag_trainer, "kernels", lambda: None)
    slow = run(tmp_path / "slow", "seed=3", "privacy=none")
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, slow[name], rtol=1e-3, atol=1e-4)


def test_a_population_with_slots_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model=bag .* cannot tag slots: use a population") as e:
        simulate(compose(["model=bag", "run.report=false", "run.progress=false"]), tmp_path)
    assert "\n" not in str(e.value)
