"""Laws of the probes that read one device's update."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, LocalTraining
from sottovoce.client.models import make_model
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import make_vocabulary
from sottovoce.privacy.audit.update_leakage import UpdateProbe, update_leakage, without_noise
from sottovoce.privacy.audit.update_rows import FALSE_ALARMS, Recovery, moved_rows, recover_tokens
from sottovoce.privacy.audit.update_span import Placed, recover_positions, row_space, surprise
from sottovoce.privacy.audit.update_view import DeviceUpdate, observed_update
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.fleet import SimulatedFleet

SIZES: dict[str, dict[str, int]] = {
    "bilstm": {"embedding_size": 64, "hidden_size": 20},
    "transformer": {"hidden_size": 64, "heads": 2, "layers": 1},
    "lstm": {"embedding_size": 64, "hidden_size": 24},
}
ONE_STEP = BatchPlan(16, local_epochs=1, max_examples=16, poisson=False)
STEPS = BatchPlan(4, local_epochs=2, max_examples=8, poisson=False)
COINS = BatchPlan(8, local_epochs=1, max_examples=32, poisson=True)
PLAIN = LocalTraining(0.3, ONE_STEP, None, None)
TRAININGS = {
    "one step": PLAIN,
    "several steps": LocalTraining(0.3, STEPS, None, None),
    "clipped update": LocalTraining(0.3, STEPS, None, 0.05),
    "clipped examples": LocalTraining(0.3, COINS, ExampleClipping(0.5, 0.0), 0.05),
    "weight decay": LocalTraining(0.3, STEPS, None, None, DeviceOptimizer(weight_decay=0.1)),
    "momentum": LocalTraining(0.3, STEPS, None, None, DeviceOptimizer(momentum=0.9)),
}


def noised(sigma: float) -> LocalTraining:
    return LocalTraining(0.3, COINS, ExampleClipping(0.5, sigma), None)


@cache
def population() -> AssistantPopulation:
    return AssistantPopulation(devices=100, held_out_devices=5, seed=4)


@cache
def task_of(name: str) -> Task:
    return make_task(
        name, vocabulary=make_vocabulary("hash", population(), buckets=1024),
        schema=population().schema, words=population().words, max_length=14,
    )


def parts(name: str) -> tuple[Task, nn.Module]:
    task = task_of("next_word" if name == "lstm" else "intent_slots")
    draw = torch.Generator().manual_seed(5)
    return task, make_model(name, task, generator=draw, **SIZES[name])


def device(examples: int) -> int:
    return int(np.flatnonzero(population().activity == examples)[0])


def update_of(name: str, training: LocalTraining, who: int) -> tuple[Task, nn.Module, DeviceUpdate]:
    task, model = parts(name)
    fleet = SimulatedFleet(population(), task, model, training, NoiseSource.from_seed(2), 1)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return task, model, observed_update(fleet, parameters, who)


def tokens_of(update: DeviceUpdate) -> set[int]:
    inside = torch.arange(update.batch["tokens"].shape[1]) < update.batch["lengths"][:, None]
    return set(update.batch["tokens"][inside].tolist())


def rows_of(name: str, training: LocalTraining, who: int) -> tuple[Recovery, DeviceUpdate]:
    _, model, update = update_of(name, training, who)
    found = recover_tokens(model, update)
    assert isinstance(found, Recovery)
    return found, update


def span_of(name: str, training: LocalTraining, who: int) -> tuple[Placed, DeviceUpdate]:
    task, model, update = update_of(name, training, who)
    size = task.vocabulary.size
    found = recover_positions(model, update, vocabulary=size, max_length=task.max_length)
    assert isinstance(found, Placed)
    return found, update


# -- without noise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("training", TRAININGS)
def test_without_noise_the_rows_that_moved_are_the_tokens(name: str, training: str) -> None:
    found, update = rows_of(name, TRAININGS[training], device(6))
    assert {row + 1 for row in np.flatnonzero(found.flagged)} == tokens_of(update)
    assert found.precision == found.recall == 1


@pytest.mark.parametrize("name", ["bilstm", "lstm"])
def test_an_lstm_s_input_weights_span_its_tokens(name: str) -> None:
    for training in ("one step", "clipped update"):
        found, update = span_of(name, TRAININGS[training], device(4))
        assert {row + 1 for row in np.flatnonzero(found.tokens.flagged)} == tokens_of(update)
        assert found.pairs is None


def test_attention_spans_tokens_at_their_positions() -> None:
    found, update = span_of("transformer", PLAIN, device(3))
    assert found.pairs is not None
    length = found.pairs.present.size // (task_of("intent_slots").vocabulary.size - 1)
    placed = {divmod(int(i), length) for i in np.flatnonzero(found.pairs.flagged)}
    truth = {
        (int(token) - 1, position)
        for row, count in zip(update.batch["tokens"], update.batch["lengths"], strict=True)
        for position, token in enumerate(row[: int(count)])
    }
    assert truth <= placed
    assert found.tokens.precision == found.tokens.recall == 1
    assert len(placed) < 3 * len(truth)


def test_more_tokens_than_dimensions_are_not_spanned_but_said_to_be_too_many() -> None:
    task, model, update = update_of("transformer", replace(PLAIN, plan=STEPS), device(12))
    size = task.vocabulary.size
    found = recover_positions(model, update, vocabulary=size, max_length=task.max_length)
    assert isinstance(found, str) and "everything" in found


# -- with noise ------------------------------------------------------------------------------------


def test_less_is_recovered_the_more_noise_a_device_adds() -> None:
    recalls = [rows_of("bilstm", noised(s), device(6))[0].recall for s in (0.0, 0.002, 0.02, 1.0)]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] == 1 and recalls[-1] == 0


@pytest.mark.parametrize("name", SIZES)
def test_with_the_noise_of_a_guarantee_nothing_is_named(name: str) -> None:
    rows, _ = rows_of(name, noised(1.0), device(6))
    span, _ = span_of(name, noised(1.0), device(6))
    assert rows.flagged.sum() <= 2 and span.tokens.flagged.sum() <= 2


def test_the_size_of_the_noise_does_not_tell_touched_rows_from_others() -> None:
    task, model = parts("bilstm")
    fleet = SimulatedFleet(population(), task, model, noised(1.0), NoiseSource.from_seed(77), 1)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    touched, others = [], []
    for who in np.flatnonzero(population().activity > 3)[:40].tolist():
        update = observed_update(fleet, parameters, who)
        rows = (update.parts["embedding.weight"].double() / (update.deviation or 0)).pow(2).mean(1)
        here = torch.tensor(sorted(tokens_of(update)))
        touched.append(rows[here])
        others.append(rows[torch.isin(torch.arange(len(rows)), here, invert=True)])
    for found in (torch.cat(touched), torch.cat(others)):
        spread = (2 / (len(found) * 64)) ** 0.5
        assert abs(float(found.mean()) - 1) < 6 * spread + 0.005  # a signal far below the noise


def test_rows_of_pure_noise_are_named_as_seldom_as_stated() -> None:
    draw = torch.Generator().manual_seed(0)
    tables, rows = 300, 400
    named = sum(
        int(moved_rows(0.3 * torch.randn(rows, 16, generator=draw))[1].sum())
        for _ in range(tables)
    )
    assert stats.poisson.sf(named - 1, 1.5 * FALSE_ALARMS * tables) > 1e-6


def test_a_row_far_above_the_noise_is_named() -> None:
    table = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    table[[3, 77]] *= 4
    assert set(np.flatnonzero(moved_rows(table)[1])) >= {3, 77}


@pytest.mark.parametrize("known", [True, False])
def test_the_row_space_holds_the_signal_and_none_of_the_noise(known: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    inputs = torch.randn(5, 60, generator=draw, dtype=torch.float64)
    signal = torch.randn(90, 5, generator=draw, dtype=torch.float64) @ inputs
    noise = 0.05 * torch.randn(90, 60, generator=draw, dtype=torch.float64)
    deviation = 0.05 if known else None
    span = row_space(signal + noise, deviation)
    assert len(span) == 5 and len(row_space(noise, 0.05)) == 0
    unit = nn.functional.normalize(inputs, dim=1)
    assert float((unit - unit @ span.T @ span).norm(dim=1).max()) < 0.05


def test_surprise_has_the_false_alarms_of_its_law() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(40_000, 20))
    distances = np.linalg.norm(inputs[:, 12:], axis=1) / np.linalg.norm(inputs, axis=1)
    p_values = np.exp(-surprise(distances[:, None], free=8))
    for level in (0.1, 0.001):
        # a share of a whole is spread less than its chi-square: fewer alarms, not more
        assert (p_values <= level).mean() <= level + 6 * np.sqrt(level / len(p_values))


# -- where a probe does not apply ------------------------------------------------------------------


def test_frozen_and_shared_tables_are_said_not_to_apply() -> None:
    task, model, update = update_of("bilstm", PLAIN, device(4))
    parts = {name: part for name, part in update.parts.items() if "embedding" not in name}
    assert "frozen" in str(recover_tokens(model, replace(update, parts=parts)))
    model.head = nn.Linear(64, task.vocabulary.size, bias=False)
    model.head.weight = model.get_parameter("embedding.weight")
    assert "shared" in str(recover_tokens(model, update))


def test_layers_that_see_neighbours_are_said_not_to_apply() -> None:
    task, model, update = update_of("bilstm", PLAIN, device(4))
    heads = {name: part for name, part in update.parts.items() if name.startswith("heads")}
    size = task.vocabulary.size
    found = recover_positions(
        model, replace(update, parts=heads), vocabulary=size, max_length=task.max_length
    )
    assert isinstance(found, str) and ("neighbours" in found or "everything" in found)
    none = recover_positions(
        model, replace(update, parts={}), vocabulary=size, max_length=task.max_length
    )
    assert isinstance(none, str) and "frozen" in none


def test_a_pretrained_encoder_s_tokens_are_read_from_its_own_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_models import encoder_folder

    folder = encoder_folder(tmp_path)
    vocabulary = make_vocabulary("file", population(), path=str(folder / "tokenizer.json"))
    task = make_task(
        "intent_slots", vocabulary=vocabulary, schema=population().schema,
        words=population().words, max_length=24,
    )
    for rank, applies in ((0, True), (4, False)):
        model = make_model(
            "pretrained", task, generator=torch.Generator().manual_seed(3), path=str(folder),
            lora_rank=rank,
        )
        found = update_leakage(population(), task, model, PLAIN, devices=[device(2)])
        assert (found[0].not_applicable is None) == applies
        if applies:
            assert found[0].figures["precision"] == found[0].figures["recall"] == 1


# -- results ---------------------------------------------------------------------------------------


def test_results_over_devices_state_chance_and_are_json() -> None:
    task, model = parts("bilstm")
    training = noised(0.5)
    clear = update_leakage(population(), task, model, without_noise(training), devices=4)
    hidden = update_leakage(population(), task, model, training, devices=4)
    for probe in (*clear, *hidden):
        json.dumps(probe.record(), allow_nan=False)
        assert probe.observer == "fleet" and "not proof" in probe.note
    rows = clear[0]
    assert rows.above_chance and rows.value == 1 and rows.chance is not None and rows.chance < 0.2
    assert rows.figures["devices"] == len(rows.rows) <= 4
    assert not hidden[0].above_chance and hidden[0].figures["noised"] == 1
    assert "no bound on epsilon" in str(rows)


def test_a_probe_of_a_run_looks_at_its_first_round() -> None:
    class Run:
        def __init__(self) -> None:
            self.population = population()
            self.task, self.model = parts("lstm")
            self.initial_model = self.model
            self.ledger, self.summary, self.participants = None, {}, None

    found = UpdateProbe("update_rows", PLAIN, devices=3).measure(Run(), seed=0, confidence=0.9)
    assert found.value == 1 and found.confidence == 0.9 and found.unit == "example"
