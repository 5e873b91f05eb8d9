"""Laws of a task's specification: what a run asks of a device, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_devices import spec_of
from omegaconf import OmegaConf
from small_fleets import CLIPPED, NOISED, OPTIMIZERS, SIZES, fleet, parts

from sottovoce.client.agent.work import needed_mb, step_cost
from sottovoce.client.errors import ConfigError, SottovoceError
from sottovoce.client.models.hub_files import weights_sha256
from sottovoce.client.spec_models import MissingModel
from sottovoce.client.task_spec import SPEC_BYTES, TaskSpec, task_spec
from sottovoce.server.settings import compose
from sottovoce.simulations.experiment import Experiment, build_experiment

POPULATION = ["population=assistant", "population.devices=50", "population.held_out_devices=5"]


def experiment(*overrides: str) -> Experiment:
    config = compose([*POPULATION, "privacy.device.epsilon=null",
                      "privacy.device.noise_multiplier=1.5", *overrides])  # fmt: skip
    return build_experiment(OmegaConf.to_yaml(config))


def small(example: Any = NOISED, clip: float | None = 0.3, **options: Any) -> TaskSpec:
    _, task, model = parts("bilstm")
    training = fleet("bilstm", example, clip, **options).training
    return spec_of(task, model, "bilstm", SIZES["bilstm"], training)


@pytest.mark.parametrize("overrides", [
    ["privacy=both"],
    ["privacy=none", "model=transformer"],
    ["privacy=device", "task=next_word", "model=lstm"],
    ["privacy=device", "privacy.device.clipping=adaptive"],
    ["privacy=example", "privacy.example.clipping=micro_batch", "privacy.example.noise=decay"],
    ["privacy=example", "privacy.example.threshold=quantile", "strategy.momentum=0.9"],
    ["privacy=none", "strategy.device_optimizer=adam", "task.vocabulary.source=hash"],
], ids=lambda overrides: " ".join(overrides))  # fmt: skip
def test_a_runs_specification_builds_the_runs_task_model_and_training(overrides: list[str]) -> None:
    found = experiment(*overrides)
    spec = task_spec(found, "a run")
    read = TaskSpec.from_bytes(spec.to_bytes())
    assert read.to_bytes() == spec.to_bytes()
    assert read.local_training() == found.training
    task = read.build_task(["play", "some", "jazz"])
    assert task.outputs == found.task.outputs and task.max_length == found.task.max_length
    shapes = [(n, p.shape) for n, p in found.initial_model().named_parameters()]
    assert [(n, p.shape) for n, p in read.build_model(task=task).named_parameters()] == shapes
    assert read.reports_clipped == ("privacy.device.clipping=adaptive" in overrides)
    assert 0 < needed_mb(read) <= needed_mb(read, 3) <= needed_mb(read, 12)


def test_every_optimiser_travels_whole() -> None:
    for optimizer in OPTIMIZERS.values():
        spec = small(None, None, optimizer=optimizer)
        assert TaskSpec.from_bytes(spec.to_bytes()).local_training().optimizer == optimizer


def test_what_devices_cannot_do_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="engine=opacus"):
        task_spec(experiment("privacy=example", "privacy.example.engine=opacus"), "r")


def test_the_cost_is_that_of_what_is_run_and_follows_the_level_alone() -> None:
    spec = small()
    plan = spec.local_training().plan
    for level in range(8):
        cost = step_cost(spec, 1, level)
        assert cost.noise_multiplier == NOISED.noise_multiplier
        assert (cost.sampling_rate, cost.steps) == (plan.rate(level), plan.steps(level, 1))
    assert step_cost(small(CLIPPED), 1, 3).noise_multiplier is None
    assert step_cost(small(None), 1, 3).noise_multiplier is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_value_that_is_changed_anywhere_is_refused_in_one_line_or_harmless(
    data: st.DataObject,
) -> None:
    values = json.loads(small().to_bytes())
    place: Any = values
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
        | st.lists(st.integers(), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers())
    )  # fmt: skip
    try:
        spec = TaskSpec.from_bytes(json.dumps(values).encode())
        model = spec.build_model()
    except SottovoceError as error:
        assert "\n" not in str(error)
        return
    named = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert named == list(spec.parameters)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_specification_are_refused(data: bytes) -> None:
    with pytest.raises(SottovoceError):
        TaskSpec.from_bytes(data)


def test_a_specification_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(SottovoceError, match="at most"):
        TaskSpec.from_bytes(b"[" * (SPEC_BYTES + 1))


def test_a_pretrained_model_is_found_by_its_weights_and_never_sent(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tiny_models import encoder_folder

    folder = encoder_folder(tmp_path / "models" / "mine")
    encoder_folder(tmp_path / "models" / "another", hidden_size=16)
    sha256 = weights_sha256(folder)
    found = experiment(
        "model=pretrained", f"model.path={folder}", f"model.sha256={sha256}", "model.lora_rank=2",
        "privacy=device", "task.max_length=16",
    )  # fmt: skip
    data = task_spec(found, "r").to_bytes()
    assert str(tmp_path).encode() not in data
    spec = TaskSpec.from_bytes(data)
    model = spec.build_model(tmp_path / "models")
    frozen = {n: p for n, p in found.initial_model().named_parameters() if not p.requires_grad}
    own = dict(model.named_parameters())
    assert frozen and all(torch.equal(own[name], p) for name, p in frozen.items())
    assert all("lora_" in name or "heads" in name for name, _ in spec.parameters)
    for models in (None, tmp_path / "models" / "another"):
        with pytest.raises(MissingModel):
            spec.build_model(models)
