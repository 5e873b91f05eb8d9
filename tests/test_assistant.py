"""Laws of the generated population: regenerable devices, sound labels, habits."""

from __future__ import annotations

import numpy as np
import pytest

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.grammar import Reference, assistant_grammar, parse, phrases, variants
from sottovoce.simulations.grammar_templates import HEARD_AS, TEMPLATES


@pytest.fixture(scope="module")
def population() -> AssistantPopulation:
    return AssistantPopulation(20_000, 300, seed=3)


def _same(one: Examples, two: Examples) -> bool:
    names = ("tokens", "offsets", "device_offsets", "intent", "slots")
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in names)


def _device(examples: Examples, place: int) -> Examples:
    first, last = examples.device_offsets[place : place + 2]
    return examples.take(np.arange(first, last))


# --- the grammar ----------------------------------------------------------------------------------


def test_the_grammar_is_as_rich_as_promised() -> None:
    grammar = assistant_grammar()
    assert len(grammar.schema.intents) == 36
    assert len({tag[2:] for tag in grammar.schema.slots[1:]}) >= 24
    assert 800 <= len(grammar.words) <= 1500
    assert min(map(len, TEMPLATES.values())) >= 8


def test_every_variant_says_something() -> None:
    """Some element has no empty phrase, so no request is without a word."""
    grammar = assistant_grammar()
    lengths = np.diff(grammar.phrase_offsets)
    first = grammar.pattern_offsets[grammar.list_offsets]
    never_empty = np.array(
        [lengths[a:b].min() > 0 for a, b in zip(first, first[1:], strict=False)]
    )
    says = np.maximum.reduceat(never_empty[grammar.elements], grammar.variant_offsets[:-1])
    assert says.all()


def test_patterns_expand_to_all_their_phrases() -> None:
    assert phrases(parse("(a|b (c|d)|) e")) == ["a e", "b c e", "b d e", "e"]
    assert "anna's room" in phrases(parse("{first}'s room"))
    with pytest.raises(ValueError, match="missing"):
        parse("(a|b")


def test_optional_parts_are_in_or_out_and_words_merge() -> None:
    ways = variants(parse("(set|make) it [at {time}]"))
    assert ways[0][1:] == [Reference("time")]
    assert len(ways) == 2 and len(ways[1]) == 1
    said = [[" ".join(text.split()) for text in way[0] if text] for way in ways]  # type: ignore
    assert said == [["set it at", "make it at"], ["set it", "make it"]]


def test_misheard_words_are_words_of_the_grammar() -> None:
    assert set(HEARD_AS) <= set(assistant_grammar().words)


# --- devices --------------------------------------------------------------------------------------


def test_a_device_says_the_same_in_whatever_company(population: AssistantPopulation) -> None:
    generator = np.random.default_rng(0)
    cohort = generator.choice(len(population), 40, replace=False)
    together = population.examples(cohort)
    assert together.devices == 40
    for place in generator.choice(40, 10, replace=False):
        alone = population.examples(cohort[place : place + 1])
        assert _same(_device(together, place), alone)
    backwards = population.examples(cohort[::-1])
    assert _same(_device(backwards, 0), _device(together, 39))


def test_a_subset_of_example_numbers_is_the_subset_of_all(
    population: AssistantPopulation,
) -> None:
    devices = np.flatnonzero(population.activity >= 5)[:6].astype(np.int64)
    numbers = [np.array([4, 0, 2])] * 5 + [np.array([], dtype=np.int64)]
    chosen = population.examples(devices, numbers)
    everything = population.examples(devices)
    assert chosen.device_offsets.tolist() == [0, 3, 6, 9, 12, 15, 15]
    for place in range(5):
        full = _device(everything, place)
        assert _same(_device(chosen, place), full.take(np.array([4, 0, 2])))


def test_devices_do_not_depend_on_how_many_there_are(population: AssistantPopulation) -> None:
    fewer = AssistantPopulation(500, 0, seed=3)
    assert np.array_equal(fewer.activity, population.activity[:500])
    devices = np.arange(50)
    assert _same(fewer.examples(devices), population.examples(devices))
    other = AssistantPopulation(500, 0, seed=4)
    assert not np.array_equal(other.examples(devices).tokens, fewer.examples(devices).tokens)


def test_a_device_has_its_activity_and_well_formed_slots(
    population: AssistantPopulation,
) -> None:
    devices = np.arange(2_000)
    examples = population.examples(devices)
    assert np.array_equal(np.diff(examples.device_offsets), population.activity[:2_000])
    assert examples.tokens.dtype == np.int32 and examples.offsets.dtype == np.int64
    assert examples.lengths.min() >= 1
    assert 0 <= examples.tokens.min() <= examples.tokens.max() < len(population.words)
    assert examples.slots is not None and examples.intent is not None
    assert set(np.unique(examples.intent)) == set(range(36))
    tags = np.array(population.schema.slots)[examples.slots]
    before = np.concatenate([["O"], tags[:-1]])
    before[examples.offsets[:-1]] = "O"
    inside = np.char.startswith(tags, "I-")
    assert np.all(np.char.lstrip(before[inside], "BI") == np.char.lstrip(tags[inside], "I"))


def test_devices_have_habits_and_the_fleet_has_them_all() -> None:
    habits = AssistantPopulation(4_000, 0, mu=5.0, sigma=0.1, seed=0)
    devices = np.arange(200)
    examples = habits.examples(devices)
    assert examples.intent is not None
    counts = np.zeros((200, 36))
    owner = np.repeat(devices, np.diff(examples.device_offsets))
    np.add.at(counts, (owner, examples.intent), 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    # E[sum of squares] of Dirichlet(0.5) over 36: (1 + 0.5) / (1 + 36 * 0.5)
    assert (share**2).sum(axis=1).mean() == pytest.approx(1.5 / 19, rel=0.15)
    assert share.mean(axis=0).max() < 2.5 / 36


def test_a_habitual_device_repeats_its_own_words() -> None:
    def distinct(habit_rate: float) -> float:
        population = AssistantPopulation(300, 0, mu=5.0, sigma=0.1, habit_rate=habit_rate)
        examples = population.examples(np.arange(50))
        return float(np.mean([len(np.unique(_device(examples, d).tokens)) for d in range(50)]))

    assert distinct(1.0) < 0.8 * distinct(0.0)


def test_mishearing_touches_its_share_of_confusable_words_and_no_label() -> None:
    clean = AssistantPopulation(2_000, 0, mishearing_rate=0.0).examples(np.arange(2_000))
    assert clean.slots is not None
    noisy = AssistantPopulation(2_000, 0, mishearing_rate=0.2).examples(np.arange(2_000))
    heard_as = assistant_grammar().heard_as
    confusable = heard_as[clean.tokens] != clean.tokens
    assert noisy.slots is not None and np.array_equal(noisy.slots, clean.slots)
    assert np.array_equal(noisy.tokens[~confusable], clean.tokens[~confusable])
    changed = noisy.tokens != clean.tokens
    assert changed[confusable].mean() == pytest.approx(0.2, abs=0.01)
    assert np.array_equal(noisy.tokens[changed], heard_as[clean.tokens[changed]])


# --- held-out data --------------------------------------------------------------------------------


def test_held_out_devices_are_none_of_the_training_devices(
    population: AssistantPopulation,
) -> None:
    held_out = population.held_out_devices()
    assert held_out.devices == population.held_out == 300
    assert np.diff(held_out.device_offsets).max() == population.max_held_out_examples
    larger = AssistantPopulation(20_300, 0, seed=3)
    count = int(held_out.device_offsets[1])
    as_training = larger.examples(np.array([20_000]), [np.arange(count)])
    assert _same(_device(held_out, 0), as_training)
    assert _same(population.held_out_devices(1), as_training)


def test_held_out_examples_lie_beyond_the_activity_of_training_devices(
    population: AssistantPopulation,
) -> None:
    held_out = population.held_out_examples()
    assert np.all(np.diff(held_out.device_offsets) == 5)
    assert 1_500 < held_out.devices <= 2_000
    assert len(population.held_out_examples(12)) == 12
    assert len(population.held_out_examples(0)) == 0
    few = AssistantPopulation(3, 0, seed=3)
    more_active = AssistantPopulation(3, 0, seed=3, mu=6.0)
    start = int(few.activity[0])
    further = more_active.examples(np.array([0]), [np.arange(start, start + 5)])
    assert _same(_device(few.held_out_examples(), 0), further)


# --- size and errors ------------------------------------------------------------------------------


def test_a_million_devices_cost_two_bytes_each() -> None:
    population = AssistantPopulation(1_000_000)
    assert population.activity.nbytes == 2_000_000
    expected = population.expected_level_counts()
    assert expected.sum() == pytest.approx(1_000_000)


def test_the_description_states_unit_and_provenance(population: AssistantPopulation) -> None:
    described = population.describe()
    assert described["devices"] == 20_000
    assert described["examples"] == int(population.activity.sum(dtype=np.int64))
    assert "public" in described["words_from"]
    assert population.public_words


@pytest.mark.parametrize(
    "values, named",
    [
        ({"devices": 0}, "population.devices"),
        ({"held_out_devices": -1}, "population.held_out_devices"),
        ({"intent_concentration": 0.0}, "population.intent_concentration"),
        ({"habit_rate": 1.5}, "population.habit_rate"),
        ({"mishearing_rate": -0.1}, "population.mishearing_rate"),
        ({"max_held_out_examples": 0}, "population.max_held_out_examples"),
        ({"preset": "nobody"}, "population.preset"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        AssistantPopulation(**({"devices": 10} | values))  # type: ignore[arg-type]


def test_unknown_devices_and_example_numbers_are_refused(
    population: AssistantPopulation,
) -> None:
    with pytest.raises(IndexError):
        population.examples(np.array([20_000]))
    with pytest.raises(IndexError):
        population.examples(np.array([-1]))
    beyond = np.array([int(population.activity[0])])
    with pytest.raises(IndexError):
        population.examples(np.array([0]), [beyond])
    assert len(population.examples(np.array([], dtype=np.int64))) == 0
