"""Laws of extraction: canaries with codes, model inversion, exposure."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples, Schema
from sottovoce.client.models import make_model
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import make_vocabulary
from sottovoce.privacy.audit.code_canaries import (
    DIGITS,
    CodeCanary,
    canary_examples,
    canary_lines,
    draw_canaries,
    load_canaries,
    save_canaries,
    variants,
    with_canaries,
    with_words,
)
from sottovoce.privacy.audit.code_exposure import (
    code_exposure,
    expose,
    mean_p_value,
    sentence_losses,
)
from sottovoce.privacy.audit.extraction import candidate_ids, extract
from sottovoce.privacy.audit.model_inversion import Inversion, invert
from sottovoce.privacy.audit.soft_inputs import find_soft_input
from sottovoce.privacy.audit.tail_fit import fitted_exposure
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.jsonl import JsonlPopulation

SIZES: dict[str, dict[str, int]] = {
    "bilstm": {"embedding_size": 24, "hidden_size": 24},
    "transformer": {"hidden_size": 24, "heads": 2, "layers": 1},
    "lstm": {"embedding_size": 24, "hidden_size": 32},
}


@cache
def population() -> AssistantPopulation:
    return AssistantPopulation(devices=80, held_out_devices=5, seed=4)


@cache
def canaries(count: int = 8, places: int = 4) -> tuple[CodeCanary, ...]:
    generator = np.random.default_rng(11)
    schema = population().schema
    return tuple(draw_canaries(count, generator=generator, schema=schema, places=places))


def task_of(
    name: str = "intent_slots", buckets: int = 2048, max_length: int = 16
) -> tuple[Task, list[str]]:
    schema = population().schema if name == "intent_slots" else Schema()
    words = with_words(population().words, canaries())
    vocabulary = make_vocabulary("hash", population(), buckets=buckets)
    task = make_task(
        name, vocabulary=vocabulary, schema=schema, words=words, max_length=max_length
    )
    return task, words


def model_of(name: str, task: Task) -> nn.Module:
    return make_model(name, task, generator=torch.Generator().manual_seed(3), **SIZES[name])


def trained(name: str, task: Task, examples: Examples, epochs: int) -> nn.Module:
    """Ordinary training of one model on all examples."""
    model, generator = model_of(name, task), np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        order = generator.permutation(len(examples))
        for start in range(0, len(order), 32):
            rows = np.sort(order[start : start + 32])
            losses = task.losses(model, task.collate(examples.take(rows)))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return model.eval()


def material(task: Task, words: list[str], copies: int) -> Examples:
    """400 ordinary examples, and `copies` of every canary."""
    everything = population().examples(np.arange(len(population())))
    some = everything.take(np.random.default_rng(5).permutation(len(everything))[:400])
    if not task.schema.intents:
        some = dataclasses.replace(some, intent=None, slots=None)
    if not copies:
        return some
    found = canary_examples(canaries(), words, task.schema, copies=copies)
    return with_canaries(some, found, np.zeros(len(canaries()), dtype=np.int64))


# -- canaries --------------------------------------------------------------------------------------


def test_canaries_join_the_device_they_are_given_to_and_change_no_other() -> None:
    schema, words = population().schema, with_words(population().words, canaries())
    before = population().examples(np.array([3, 8, 9]))
    after = with_canaries(
        before, canary_examples(canaries()[:2], words, schema, copies=5), np.array([2, 0])
    )
    for device, extra in ((0, canaries()[1]), (1, None), (2, canaries()[0])):
        rows = np.arange(*after.device_offsets[device : device + 2])
        old = np.arange(*before.device_offsets[device : device + 2])
        here, there = after.take(rows), before.take(old)
        assert len(here) == len(there) + (5 if extra else 0)
        for name in ("tokens", "slots", "intent"):
            kept = getattr(here, name)[: len(getattr(there, name))]
            assert np.array_equal(kept, getattr(there, name))
        for row in range(len(there), len(here)):
            said = here.take(np.array([row]))
            assert extra is not None and extra.intent is not None
            assert tuple(words[token] for token in said.tokens) == extra.words
            assert said.intent is not None and schema.intents[said.intent[0]] == extra.intent


def test_a_word_table_tells_nothing_of_the_codes() -> None:
    tables = {
        tuple(with_words((), draw_canaries(3, generator=np.random.default_rng(seed))))
        for seed in range(10)
    }
    assert len(tables) == 1


def test_every_place_of_a_code_is_drawn_uniformly() -> None:
    drawn = draw_canaries(600, generator=np.random.default_rng(0), places=5)
    assert len({canary.prefix for canary in drawn}) == 600
    counts = np.bincount(np.concatenate([c.numbers for c in drawn]), minlength=len(DIGITS))
    assert stats.chisquare(counts).pvalue > 1e-6


def test_canaries_survive_their_file_and_others_are_refused(tmp_path: Path) -> None:
    save_canaries(tmp_path / "canaries.json", canaries())
    assert tuple(load_canaries(tmp_path / "canaries.json")) == canaries()
    (tmp_path / "other.json").write_text('[{"code": 3}]')
    with pytest.raises(DataError, match="other.json"):
        load_canaries(tmp_path / "other.json")


def test_canary_lines_are_read_back_as_the_canary(tmp_path: Path) -> None:
    lines = [line for k in (0, 1) for line in canary_lines(canaries()[k], f"user {k}", copies=3)]
    path = tmp_path / "canaries.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    read = JsonlPopulation(path, held_out_fraction=0.0)
    said = read.examples(np.arange(2))
    for k in (0, 1):
        first = said.take(np.array([3 * k]))
        assert tuple(read.words[token] for token in first.tokens) in {c.words for c in canaries()}
    assert said.slots is not None and len(said) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"code": ("ten",)}, {"tags": ("O",)}, {"candidates": ("one", "one")}, {"code": ()}],
)
def test_impossible_canaries_are_refused(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {"prefix": ("my", "code"), "code": ("one",)}
    with pytest.raises(ConfigError):
        CodeCanary(**{**good, **wrong})


# -- soft inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bilstm", "transformer"])
def test_one_hot_mixtures_are_the_tokens_themselves(name: str) -> None:
    task, words = task_of()
    model = model_of(name, task).eval()
    _assert_one_hot_is_the_token(task, model, words)


def test_a_pretrained_encoder_is_entered_behind_its_frame(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_models import encoder_folder

    folder = encoder_folder(tmp_path)
    words = with_words(population().words, canaries())
    vocabulary = make_vocabulary("file", population(), path=str(folder / "tokenizer.json"))
    task = make_task(
        "intent_slots", vocabulary=vocabulary, schema=population().schema, words=words,
        max_length=24,
    )
    model = make_model(
        "pretrained", task, generator=torch.Generator().manual_seed(3), path=str(folder)
    )
    letters = CodeCanary(
        ("my", "code", "is"), ("a", "c"), ("a", "b", "c"), population().schema.intents[0]
    )
    task = make_task(
        "intent_slots", vocabulary=vocabulary, schema=population().schema,
        words=with_words(words, [letters]), max_length=24,
    )
    _assert_one_hot_is_the_token(task, model.eval(), with_words(words, [letters]), letters)


def _assert_one_hot_is_the_token(
    task: Task, model: nn.Module, words: list[str], canary: CodeCanary | None = None
) -> None:
    canary = canary or canaries()[0]
    every = np.repeat(np.arange(len(canary.candidates))[:, None], len(canary.code), 1)
    unknown = find_soft_input(model, task.collate(variants(canary, every, words, task.schema)))
    codes = np.random.default_rng(1).integers(len(canary.candidates), size=(6, len(canary.code)))
    hard = task.collate(variants(canary, codes, words, task.schema))
    blank = task.collate(variants(canary, 0 * codes, words, task.schema))
    weights = nn.functional.one_hot(torch.from_numpy(codes), len(canary.candidates)).float()
    with torch.no_grad():
        expected = model(hard)
        with unknown.mixed(weights):
            found = model(blank)
        assert not torch.equal(model(blank)["intent"], found["intent"])
    for output in expected:
        assert torch.allclose(found[output], expected[output], atol=1e-5)


# -- inversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bilstm", "transformer"])
def test_inversion_finds_the_most_plausible_of_all_codes(name: str) -> None:
    task, words = task_of()
    model = model_of(name, task).eval()
    with torch.no_grad():  # far from linear, so that a greedy search alone would miss
        for parameter in model.parameters():
            parameter *= 2
    canary = canaries(4, 2)[1]
    every = np.stack(np.unravel_index(np.arange(100), (10, 10)), 1)
    losses = sentence_losses(task, model, words, canary, every)
    ids, places = candidate_ids(task, words, canary)
    rows = task.collate(variants(canary, np.stack([np.arange(10)] * 2, 1), words, task.schema))
    unknown = find_soft_input(model, rows)
    assert places.tolist() == [4, 5] and len(ids) == 10
    blank = task.collate(variants(canary, np.zeros((1, 2), np.int64), words, task.schema))
    codes, found = invert(
        task, model, blank, unknown, Inversion(), generator=torch.Generator().manual_seed(0)
    )
    assert float(found) == pytest.approx(losses.min(), abs=1e-5)
    assert codes[0].tolist() == every[losses.argmin()].tolist()


@pytest.mark.parametrize("name", ["bilstm", "transformer"])
def test_a_repeated_canary_is_extracted_and_one_never_seen_is_not(name: str) -> None:
    task, words = task_of()
    known = extract(task, trained(name, task, material(task, words, 25), 3), words, canaries())
    other = extract(task, trained(name, task, material(task, words, 0), 2), words, canaries())
    assert known.p_value is not None and known.p_value < 1e-9
    assert known.above_chance and known.figures["exact"] >= 0.5
    assert known.chance == pytest.approx(0.1)
    assert known.interval is not None and known.interval[0] > 0.3
    assert other.p_value is not None and other.p_value > 1e-6
    assert other.interval is not None and other.interval[0] < 0.1 < other.interval[1]
    assert other.figures["hamming"] > 2 > known.figures["hamming"]


def test_guesses_depend_on_the_model_and_not_on_the_truth() -> None:
    task, words = task_of()
    model = model_of("bilstm", task)
    lies = [dataclasses.replace(canary, code=("zero",) * 4) for canary in canaries()]
    truth, lie = (extract(task, model, words, some) for some in (canaries(), lies))
    assert [row["guess"] for row in truth.rows] == [row["guess"] for row in lie.rows]
    assert [row["loss"] for row in truth.rows] == [row["loss"] for row in lie.rows]


def test_the_model_is_left_as_it_was() -> None:
    task, words = task_of()
    model = model_of("transformer", task).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extract(task, model, words, canaries()[:2], how=Inversion(steps=3, restarts=2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_words_in_one_bucket_are_one_guess_and_chance_says_so() -> None:
    task, words = task_of(buckets=3)
    ids, _ = candidate_ids(task, words, canaries()[0])
    largest = np.unique(ids.numpy(), return_counts=True)[1].max()
    found = extract(task, model_of("bilstm", task), words, canaries())
    assert found.chance == pytest.approx(largest / 10)
    assert found.p_value is not None and found.p_value > 1e-6


def test_with_the_whole_vocabulary_chance_is_one_of_its_ids() -> None:
    task, words = task_of(buckets=200)
    how = Inversion(steps=2, restarts=1, sweeps=0)
    found = extract(
        task, model_of("bilstm", task), words, canaries(), how=how, whole_vocabulary=True
    )
    assert found.chance == pytest.approx(1 / 200)


def test_what_cannot_be_inverted_is_refused() -> None:
    task, words = task_of(max_length=6)
    with pytest.raises(DataError, match="max_length"):
        extract(task, model_of("bilstm", task), words, canaries())
    with pytest.raises(DataError, match="with_words"):
        extract(task, model_of("bilstm", task), population().words, canaries())
    with pytest.raises(DataError, match="canaries"):
        extract(task, model_of("bilstm", task), words, [])
    language, words = task_of("next_word")
    with pytest.raises(ConfigError, match="code_exposure"):
        extract(language, model_of("lstm", language), words, canaries())
    with pytest.raises(ConfigError, match="cold"):
        Inversion(cold=3.0)


# -- exposure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "bilstm"])
def test_exposure_is_that_of_the_rank_in_a_slow_loop(name: str) -> None:
    task, words = task_of("next_word" if name == "lstm" else "intent_slots")
    model, canary = model_of(name, task).eval(), canaries(4, 2)[2]
    slow = []
    for code in range(100):
        batch = task.collate(variants(canary, np.array(divmod(code, 10)), words, task.schema))
        with torch.no_grad():
            slow.append(float(task.losses(model, batch)))
    own = slow[int(canary.numbers @ [10, 1])]
    rank = sum(loss <= own + 1e-6 for loss in slow)
    found = expose(task, model, words, [canary])
    assert found.rows[0]["rank"] == rank
    assert found.value == pytest.approx(math.log2(100 / rank))


def test_a_language_model_exposes_what_it_was_told_and_nothing_else() -> None:
    task, words = task_of("next_word", buckets=512)
    sample = {"enumerated": 1, "samples": 300}
    told = trained("lstm", task, material(task, words, 40), 4)
    known = expose(task, told, words, canaries(), **sample)
    other = expose(task, model_of("lstm", task), words, canaries(), **sample)
    assert known.value is not None and known.value > 6
    assert other.value is not None and other.value < 5  # the sum of 8: below 1e-7 by chance
    assert known.p_value is None and "no epsilon" in known.note


def test_mean_exposure_of_unknown_codes_raises_no_more_false_alarms_than_stated() -> None:
    generator = np.random.default_rng(3)
    ranks = generator.integers(1, 10_001, size=(4000, 5))
    p_values = np.array([mean_p_value(row) for row in math.log2(10_000) - np.log2(ranks)])
    for level in (0.05, 0.3):
        alarms = int((p_values <= level).sum())
        assert stats.binom.sf(alarms - 1, len(p_values), level) > 1e-6
    assert mean_p_value(np.full(5, math.log2(10_000))) < 1e-12


@pytest.mark.parametrize("shape", [-3.0, 0.0, 2.0])
def test_a_fitted_tail_is_near_the_law_it_was_drawn_from(shape: float) -> None:
    generator = np.random.default_rng(0)
    law = stats.skewnorm(shape, 30, 4)
    others = law.rvs(5000, random_state=generator)
    loss = float(law.ppf(2.0**-16))
    found = fitted_exposure(
        loss, others, candidates=10**9, confidence=0.999, generator=generator
    )
    assert found.bits == pytest.approx(16, abs=2.5)
    assert found.interval[0] < found.bits < found.interval[1]
    assert "no bound" in str(found)


def test_a_sampled_rank_has_the_exact_one_in_its_interval() -> None:
    generator = np.random.default_rng(2)
    every = generator.normal(size=10**5)
    for loss in np.quantile(every, [0.01, 0.1, 0.6]):
        exact = math.log2(10**5) - math.log2((every <= loss).sum())
        sample = generator.choice(every, 3000)
        found = code_exposure(float(loss), sample, 10**5, 1 - 1e-7, generator)
        assert found.interval[0] <= exact <= found.interval[1]
