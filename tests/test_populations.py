"""Laws of the populations: activity, hashing, partitions and JSONL files."""

from __future__ import annotations

import gzip
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples
from sottovoce.simulations.activity import LogNormalActivity, activity_model
from sottovoce.simulations.assistant import AssistantConfig
from sottovoce.simulations.hashing import draws, integers_below, stream, uniforms
from sottovoce.simulations.jsonl import JsonlConfig, JsonlPopulation
from sottovoce.simulations.jsonl_reader import WORD, split_words
from sottovoce.simulations.partition import assign_devices, device_sizes
from sottovoce.simulations.populations import POPULATIONS, make_population
from sottovoce.strategies.levels import activity_levels

DATA = Path(os.environ.get("SOTTOVOCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "snips.train.jsonl.gz").exists(), reason=f"no real data in {DATA}"
)

# --- hashing and activity -------------------------------------------------------------------------


def test_draws_are_uniform_and_streams_are_unrelated() -> None:
    one = uniforms(draws(stream(0, "one"), np.arange(100_000)))
    two = uniforms(draws(stream(0, "two"), np.arange(100_000)))
    assert np.histogram(one, bins=20, range=(0, 1))[0] == pytest.approx(5000, rel=0.06)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.015
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.015


def test_a_draw_depends_on_its_key_and_counter_alone() -> None:
    key = stream(7, "x")
    assert draws(key, np.array([5, 2]))[1] == draws(key, np.arange(3))[2] == draws(key, 2)
    assert draws(stream(8, "x"), 2) != draws(key, 2)


def test_two_choices_from_one_draw_are_independent() -> None:
    first, rest = integers_below(draws(stream(0, "x"), np.arange(60_000)), 5)
    second, _ = integers_below(rest, 4)
    assert np.bincount(first * 4 + second, minlength=20) == pytest.approx(3000, rel=0.1)


@pytest.mark.parametrize("mu, sigma", [(2.3, 1.3), (1.24, 1.54), (2.65, 2.24)])
def test_activity_follows_the_log_normal_quantiles(mu: float, sigma: float) -> None:
    activity = LogNormalActivity(mu, sigma, 60_000).of(0, 200_000, seed=3)
    law = statistics.NormalDist(mu, sigma)
    empty = law.cdf(np.log(0.5))
    for share in (0.1, 0.5, 0.9, 0.99):
        expected = np.exp(law.inv_cdf(empty + share * (1 - empty)))
        assert np.quantile(activity, share) == pytest.approx(expected, rel=0.05, abs=0.51)


def test_every_device_has_an_example_and_none_more_than_the_cap() -> None:
    activity = LogNormalActivity(0.0, 3.0, 50).of(0, 50_000, seed=0)
    assert activity.dtype == np.uint16
    assert activity.min() == 1
    assert activity.max() == 50


def test_activity_of_a_device_does_not_depend_on_the_devices_around_it() -> None:
    model = LogNormalActivity()
    assert np.array_equal(model.of(0, 70_000, 1)[65_000:], model.of(65_000, 5_000, 1))
    assert not np.array_equal(model.of(0, 1000, 1), model.of(0, 1000, 2))


def test_expected_level_counts_match_the_devices_drawn() -> None:
    model, devices = activity_model("chat", None, None, 10_000), 400_000
    expected = model.expected_level_counts(devices)
    drawn = np.bincount(activity_levels(model.of(0, devices, 5)), minlength=len(expected))
    assert expected.sum() == pytest.approx(devices)
    assert np.all(np.abs(drawn - expected) <= 5 * np.sqrt(expected) + 1e-9)


@pytest.mark.parametrize(
    "preset, mu, sigma, cap, named",
    [
        ("nobody", None, None, 10, "preset"),
        ("chat", None, 0.0, 10, "sigma"),
        ("chat", float("nan"), None, 10, "mu"),
        ("chat", -50.0, 1.0, 10, "population.mu"),
        ("chat", None, None, 0, "max_activity"),
    ],
)
def test_impossible_activity_is_refused(
    preset: str, mu: float | None, sigma: float | None, cap: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        activity_model(preset, mu, sigma, cap)


# --- assigned devices -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 400),
    labels=st.integers(1, 12),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0.001, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_a_partition_is_one(
    examples: int, labels: int, share: float, alpha: float, seed: int
) -> None:
    devices = max(1, round(share * examples))
    label = np.random.default_rng(seed).integers(0, labels, examples).astype(np.int32)
    model = LogNormalActivity()
    device = assign_devices(label, devices, alpha=alpha, model=model, seed=seed)
    assert device.shape == (examples,)
    sizes = np.bincount(device, minlength=devices)
    assert len(sizes) == devices and sizes.min() >= 1
    activity = model.of(0, devices, seed).astype(np.float64)
    assert np.array_equal(sizes, device_sizes(activity, examples))
    again = assign_devices(label, devices, alpha=alpha, model=model, seed=seed)
    assert np.array_equal(device, again)


def _label_distance(alpha: float) -> float:
    """Mean total variation between a device's labels and all labels, for devices of 50."""
    label = np.random.default_rng(0).integers(0, 8, 20_000).astype(np.int32)
    device = assign_devices(
        label, 400, alpha=alpha, model=LogNormalActivity(4.0, 0.01), seed=0
    )
    table = np.zeros((400, 8))
    np.add.at(table, (device, label), 1)
    share = table / table.sum(axis=1, keepdims=True)
    return float(np.abs(share - np.bincount(label) / len(label)).sum(axis=1).mean() / 2)


def test_a_large_alpha_makes_devices_alike_and_a_small_one_unlike() -> None:
    by_chance = 4 * math.sqrt(2 / math.pi * 0.125 * 0.875 / 50)  # 50 draws from 8 even labels
    assert _label_distance(1e6) == pytest.approx(by_chance, abs=0.02)
    assert _label_distance(1e6) < _label_distance(1.0) < _label_distance(0.05)
    assert _label_distance(0.05) > 0.6


@pytest.mark.parametrize("devices, alpha", [(0, 1.0), (11, 1.0), (5, 0.0), (5, float("inf"))])
def test_an_impossible_partition_is_refused(devices: int, alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"set population\."):
        assign_devices(
            np.zeros(10, dtype=np.int32), devices, alpha=alpha, model=LogNormalActivity(), seed=0
        )


# --- JSONL ----------------------------------------------------------------------------------------

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(lines: list[Any], name: str = "data.jsonl") -> Path:
        text = "".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
        )
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


def _people(users: int = 20) -> list[dict[str, Any]]:
    """User k says k + 1 things, interleaved with the others."""
    said = [(k, j) for j in range(users) for k in range(users) if j <= k]
    return [{"user_id": f"u{k}", "text": f"Thing {j} of {k}, please!"} for k, j in said]


def _requests(count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "user_id": None,
            "tokens": ["Play", "song", str(k), "now"],
            "slots": ["O", "B-song", "I-song", "O" if k % 2 else "B-time"],
            "intent": ["play", "add", "stop"][k % 3],
        }
        for k in range(count)
    ]


def _texts(population: JsonlPopulation, examples: Examples) -> list[str]:
    words = [population.words[token] for token in examples.tokens]
    bounds = examples.offsets
    return [" ".join(words[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def test_words_are_split_as_documented() -> None:
    assert split_words("Don't go, NOW.") == ["don't", "go", ",", "now", "."]
    assert split_words("Ça va?  l’été…") == ["ça", "va", "?", "l’été", "…"]


@given(text=st.text() | st.text("ab1_é²ßΣ \t\x1c\u2003’'"))
def test_the_short_cut_for_plain_words_splits_like_the_rule(text: str) -> None:
    assert split_words(text) == WORD.findall(text.lower())


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_user_is_a_device_and_keeps_all_its_examples(write: Write, name: str) -> None:
    population = JsonlPopulation(write(_people(), name), held_out_fraction=0.25)
    assert (len(population), population.held_out) == (15, 5)
    everything = population.examples(np.arange(15))
    texts = _texts(population, everything) + _texts(population, population.held_out_devices())
    assert sorted(texts) == sorted(" ".join(split_words(row["text"])) for row in _people())
    for device in range(15):
        own = _texts(population, population.examples(np.array([device])))
        user = own[0].split()[3]
        assert own == [f"thing {j} of {user} , please !" for j in range(int(user) + 1)]
    assert population.expected_level_counts() is None
    assert not population.public_words


def test_a_subset_of_example_numbers_is_the_subset_of_all(write: Write) -> None:
    population = JsonlPopulation(write(_people()), held_out_fraction=0.0)
    assert population.held_out == 0
    devices = np.array([7, 3, 7])
    chosen = population.examples(devices, [np.array([4, 0]), np.array([], int), np.array([2])])
    alone = _texts(population, population.examples(np.array([7])))
    assert _texts(population, chosen) == [alone[4], alone[0], alone[2]]
    assert chosen.device_offsets.tolist() == [0, 2, 2, 3]
    with pytest.raises(IndexError):
        population.examples(np.array([3]), [np.array([999])])
    with pytest.raises(IndexError):
        population.examples(np.array([20]))


def test_held_out_devices_are_chosen_by_the_users_and_the_seed_alone(write: Write) -> None:
    def held_out(rows: list[dict[str, Any]], seed: int) -> set[str]:
        population = JsonlPopulation(write(rows), held_out_fraction=0.3, seed=seed)
        return {text.split()[3] for text in _texts(population, population.held_out_devices())}

    rows = _people()
    assert held_out(rows, 0) == held_out(rows[::-1], 0)
    assert held_out(rows, 0) != held_out(rows, 1)


def test_held_out_examples_leave_out_held_out_users(write: Write) -> None:
    test = [{"user_id": f"u{k}", "text": f"test of {k}"} for k in range(20)]
    population = JsonlPopulation(write(_people()), write(test, "t.jsonl"), held_out_fraction=0.25)
    trained = {t.split()[3] for t in _texts(population, population.examples(np.arange(15)))}
    examples = population.held_out_examples()
    assert examples is not None and len(examples) == examples.devices == 15
    assert {text.split()[2] for text in _texts(population, examples)} == trained
    few = population.held_out_examples(4)
    assert few is not None and _texts(population, few) == _texts(population, examples)[:4]


def test_assigned_devices_share_out_every_example_once(write: Write) -> None:
    population = JsonlPopulation(write(_requests()), devices=10, held_out_fraction=0.2)
    assert (len(population), population.held_out) == (8, 2)
    everything = population.examples(np.arange(8))
    texts = _texts(population, everything) + _texts(population, population.held_out_devices())
    assert sorted(texts) == sorted(f"Play song {k} now" for k in range(60))
    assert population.schema.intents == ("add", "play", "stop")
    assert population.schema.slots == ("O", "B-song", "B-time", "I-song")
    assert everything.intent is not None and everything.slots is not None
    for text, intent, end in zip(
        _texts(population, everything), everything.intent, everything.offsets[1:], strict=True
    ):
        number = int(text.split()[2])
        assert population.schema.intents[intent] == ["play", "add", "stop"][number % 3]
        assert population.schema.slots[everything.slots[end - 1]] == ("O", "B-time")[1 - number % 2]
    counts = population.expected_level_counts()
    assert counts is not None and counts.sum() == 8


def test_at_most_so_many_examples_of_a_held_out_device_are_evaluated(write: Write) -> None:
    population = JsonlPopulation(
        write(_people()), held_out_fraction=0.5, max_held_out_examples=3
    )
    assert np.diff(population.held_out_devices().device_offsets).max() == 3
    assert population.held_out_devices(2).devices == 2


def test_several_files_are_one_population(write: Write) -> None:
    rows = _people()
    one, two = write(rows[:50], "one.jsonl"), write(rows[50:], "two.jsonl.gz")
    apart, together = JsonlPopulation(f"{one}, {two}"), JsonlPopulation(write(rows))
    devices = np.arange(len(together))
    assert _texts(apart, apart.examples(devices)) == _texts(together, together.examples(devices))


def test_test_labels_join_the_schema_and_a_labels_file_rules_it(write: Write) -> None:
    test = [_requests()[0] | {"intent": "skip"}]
    train, other = write(_requests()), write(test, "t.jsonl")
    population = JsonlPopulation(train, other, devices=5)
    assert population.schema.intents == ("add", "play", "skip", "stop")
    assert "treated as public" in population.describe()["labels_from"]
    given = {"intents": ["stop", "skip", "play", "add"], "slots": ["B-song", "I-song", "B-time"]}
    labels = write([given], "labels.json")
    ruled = JsonlPopulation(train, other, devices=5, labels=labels)
    assert ruled.schema.intents == ("stop", "skip", "play", "add")
    assert ruled.schema.slots == ("O", "B-song", "I-song", "B-time")
    assert "labels.json" in ruled.describe()["labels_from"]
    short = write([given | {"intents": ["stop", "play", "add"]}], "short.json")
    with pytest.raises(DataError, match="short.json.*'skip'"):
        JsonlPopulation(train, other, devices=5, labels=short)


GOOD = {"user_id": "a", "text": "hello there"}
NLU = {"tokens": ["a", "b"], "slots": ["O", "O"], "intent": "x"}


MALFORMED: list[tuple[list[Any], str]] = [
    ([], "is empty"),
    ([""], "no example with a word"),
    ([GOOD, '{"text": "oh'], "line 2: not valid JSON .*: fix or remove"),
    ([GOOD, "", "[1]"], "line 3: a list is not a JSON object"),
    ([GOOD, "7"], "line 2: 7 is not a JSON object"),
    ([{"user_id": "a"}], "line 1: neither 'text' nor 'tokens'"),
    ([{"text": 7}], "line 1: text is 7, not a string"),
    ([{"text": "a", "user_id": 7}], "line 1: user_id is 7, not a string"),
    ([NLU | {"tokens": "a b"}], "line 1: tokens is \"a b\", not a list"),
    ([NLU | {"tokens": ["a", 7]}], "line 1: tokens holds 7, not a string"),
    ([NLU | {"intent": 3}], "line 1: intent is 3, not a string"),
    ([NLU, NLU | {"slots": ["O"]}], "line 2: 2 tokens but 1 slots"),
    ([NLU | {"slots": ["O", "I-x"]}], "line 1: slot 2 is 'I-x' after 'O'"),
    ([NLU | {"slots": ["B-y", "I-x"]}], "line 1: slot 2 is 'I-x' after 'B-y'"),
    ([NLU | {"slots": ["O", "song"]}], "line 1: slot 2 is 'song'"),
    ([NLU | {"slots": ["O", None]}], "line 1: slots holds null"),
    ([NLU, {"text": "a b"}], "line 2: 'intent' is missing here"),
    ([GOOD, GOOD | {"intent": "x"}], "line 2: 'intent' is given here"),
    ([NLU, NLU | {"slots": None}], "line 2: 'slots' is missing here"),
    (
        [GOOD, {"user_id": "u7", "text": " "}, {"user_id": "u7", "tokens": []}],
        "line 2: device 'u7' has no examples",
    ),
    ([GOOD, {"text": "no user"}], "line 2: no user_id where other lines have one"),
]


@pytest.mark.parametrize("lines, named", MALFORMED)
def test_a_malformed_file_is_one_clear_line(write: Write, lines: list[Any], named: str) -> None:
    path = write(lines)
    with pytest.raises(DataError, match=named) as error:
        JsonlPopulation(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_test_file_is_read_as_strictly(write: Write) -> None:
    with pytest.raises(DataError, match="t.jsonl line 1: 'intent' is missing"):
        JsonlPopulation(write([NLU]), write([GOOD], "t.jsonl"), devices=1)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, write: Write) -> None:
    whole = write(_people(), "whole.jsonl.gz").read_bytes()
    broken = {
        "cut.jsonl.gz": whole[: len(whole) // 2],
        "plain.jsonl.gz": b'{"text": "a"}\n',
        "bent.jsonl.gz": whole[:40] + b"\0\0\0" + whole[43:],
        "latin.jsonl": '{"text": "caf\xe9"}\n'.encode("latin-1"),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    for name in ["absent.jsonl", "", *broken]:
        with pytest.raises(DataError) as error:
            JsonlPopulation(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_blank_lines_a_byte_order_mark_and_lines_without_words_do_no_harm(write: Write) -> None:
    rows = ["\ufeff" + json.dumps(GOOD), "  ", {"user_id": "a", "text": "..."}]
    population = JsonlPopulation(write([*rows, {"user_id": "a", "text": "\t"}]))
    assert population.activity.tolist() == [2]
    assert population.held_out == 0  # one user cannot be both
    assert population.describe()["lines_without_words"] == 1


def test_natural_users_need_ids_and_assigned_ones_ignore_them(write: Write) -> None:
    with pytest.raises(DataError, match="line 1: no user_id.*users=assigned"):
        JsonlPopulation(write(_requests()), users="natural")
    population = JsonlPopulation(write(_people(6)), users="assigned", devices=4)
    assert (len(population), population.held_out) == (4 - 1, 1)
    assert "no person" in population.describe()["unit"]


@pytest.mark.parametrize(
    "values, named",
    [
        ({"users": "some"}, "auto, natural or assigned"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"max_held_out_examples": 0}, "max_held_out_examples"),
        ({"users": "assigned", "devices": 10**6}, "population.devices"),
        ({"users": "assigned", "sigma": -1.0}, "sigma"),
    ],
)
def test_impossible_settings_are_refused(
    write: Write, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        JsonlPopulation(write(_people()), **values)


# --- by name --------------------------------------------------------------------------------------


def test_populations_are_made_from_configs_and_mappings(write: Write) -> None:
    generated = make_population(AssistantConfig(devices=30, held_out_devices=2, mu=1.0))
    assert (generated.name, len(generated), generated.held_out) == ("assistant", 30, 2)
    path = str(write(_people()))
    real = make_population({"name": "snips", "path": path, "max_examples_per_round": 5})
    assert (real.name, len(real)) == ("snips", 18)
    assert len(make_population(JsonlConfig(path=path, held_out_fraction=0.5))) == 10


@pytest.mark.parametrize(
    "config, named",
    [
        ({"name": "nobody"}, ", ".join(POPULATIONS)),
        ({}, "population.name=None"),
        ({"name": "assistant", "size": 3}, "population.size is no setting"),
        ({"name": "jsonl"}, "population.path is missing"),
        (7, "group of settings"),
    ],
)
def test_an_unknown_population_or_setting_is_refused(config: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_population(config)


@needs_data
@pytest.mark.parametrize("name, intents, slots", [("snips", 7, 39), ("hwu", 64, 54)])
def test_real_requests_load_as_their_readme_says(name: str, intents: int, slots: int) -> None:
    population = JsonlPopulation(
        DATA / f"{name}.train.jsonl.gz", DATA / f"{name}.test.jsonl.gz", users="assigned"
    )
    assert len(population) + population.held_out == 500
    described = population.describe()
    assert (described["intents"], described["slots"]) == (intents, slots)
    assert population.held_out_examples(50) is not None


@needs_data
def test_real_roles_load_as_their_readme_says() -> None:
    population = JsonlPopulation(DATA / "shakespeare.train.jsonl.gz", held_out_fraction=0.0)
    assert len(population) == 1419
    assert int(population.activity.sum()) == 25_706
    assert int(population.activity.max()) == 289
    assert population.schema.intents == population.schema.slots == ()
    assert population.held_out_examples() is None
