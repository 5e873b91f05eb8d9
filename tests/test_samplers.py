"""Laws of sampling: inclusion frequencies are the probabilities that the accountant is told."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.counts import exact_counts, model_counts, noised_counts
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels, representative_size
from sottovoce.strategies.rates import ActivityWeight, rates_from_counts
from sottovoce.strategies.samplers import (
    ActivitySampler,
    FixedSizeSampler,
    Sampler,
    UniformSampler,
    make_sampler,
)


def heavy_tailed(devices: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).lognormal(2.3, 1.3, devices)
    return activity_levels(np.clip(np.round(draws), 1, 5000).astype(np.uint16))


def samplers(devices: int = 400, cohort: int = 40) -> list[Sampler]:
    levels = heavy_tailed(devices)
    return [
        UniformSampler(devices, cohort, seed=3),
        FixedSizeSampler(devices, cohort, seed=3),
        ActivitySampler(levels, cohort, seed=3),
        ActivitySampler(levels, cohort, weight="log", uniform_mix=0.3, max_rate=0.2, seed=3),
    ]


def by_name(sampler: Sampler) -> str:
    return type(sampler).__name__


@pytest.mark.parametrize("sampler", samplers(), ids=by_name)
def test_devices_are_included_as_often_as_their_probability_says(sampler: Sampler) -> None:
    rounds, levels = 3000, heavy_tailed(400)
    seen = np.zeros(sampler.devices)
    for at in range(rounds):
        seen[sampler.sample(at)] += 1
    rates = sampler.inclusion_probabilities()
    expected = rounds * np.array([rates[level] for level in levels.tolist()])
    variance = expected * (1 - expected / rounds)
    scores = (seen - expected)[variance > 0] / np.sqrt(variance[variance > 0])
    assert np.abs(scores).max() < 4.9
    chi_square, freedom = float((scores**2).sum()), len(scores)
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_poisson_inclusions_are_independent() -> None:
    """Pairs meet as often as independent coins say, and cohort sizes vary as their sum does."""
    sampler = samplers()[2]
    rounds, levels = 6000, heavy_tailed(400)
    member = np.zeros((rounds, sampler.devices), dtype=bool)
    for at in range(rounds):
        member[at, sampler.sample(at)] = True
    p = np.array([sampler.rates[level] for level in levels.tolist()])
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() - p.sum()) < 4.5 * math.sqrt((p * (1 - p)).sum() / rounds)
    assert sizes.var() == pytest.approx((p * (1 - p)).sum(), rel=0.1)
    first, second = np.argsort(np.abs(p - 0.4))[:2]
    together = (member[:, first] & member[:, second]).mean()
    truth = p[first] * p[second]
    assert abs(together - truth) < 4.5 * math.sqrt(truth * (1 - truth) / rounds)


@pytest.mark.parametrize("sampler", samplers(), ids=by_name)
def test_a_sample_is_sorted_unique_and_in_range(sampler: Sampler) -> None:
    for at in range(20):
        devices = sampler.sample(at)
        assert devices.dtype == np.int64
        assert (np.diff(devices) > 0).all()
        assert len(devices) == 0 or (devices[0] >= 0 and devices[-1] < sampler.devices)


@pytest.mark.parametrize("index", range(4))
def test_a_sample_is_a_function_of_seed_and_round(index: int) -> None:
    one, two = samplers()[index], samplers()[index]
    for at in (5, 1, 3):
        one.sample(at + 100)
        np.testing.assert_array_equal(one.sample(at), two.sample(at))
    assert not np.array_equal(one.sample(1), one.sample(2))
    two.seed += 1
    assert not np.array_equal(one.sample(1), two.sample(1))


def test_fresh_seeds_differ() -> None:
    assert UniformSampler(1000, 100).seed != UniformSampler(1000, 100).seed


def test_fixed_size_is_fixed_and_poisson_may_be_empty() -> None:
    assert {len(FixedSizeSampler(50, 7, seed=1).sample(at)) for at in range(50)} == {7}
    sizes = [len(UniformSampler(50, 1, seed=1).sample(at)) for at in range(50)]
    assert 0 in sizes and max(sizes) > 1


def test_a_thin_population_is_drawn_whole() -> None:
    assert FixedSizeSampler(5, 5, seed=0).sample(0).tolist() == [0, 1, 2, 3, 4]
    assert UniformSampler(5, 5, seed=0).sample(0).tolist() == [0, 1, 2, 3, 4]


# -- rates -----------------------------------------------------------------------------------------

weights = st.builds(
    ActivityWeight,
    weight=st.sampled_from(["linear", "power", "log", "uniform"]),
    power=st.floats(0, 2),
    uniform_mix=st.floats(0, 1),
    max_rate=st.floats(0.2, 1),
)


@settings(deadline=None)
@given(weights, st.lists(st.integers(0, 500), min_size=1, max_size=MAX_LEVEL + 1), st.data())
def test_rates_are_probabilities_that_grow_with_activity_and_add_up_to_the_cohort(
    weight: ActivityWeight, counts: list[int], data: st.DataObject
) -> None:
    devices = sum(counts)
    if devices == 0:
        return
    most = weight.max_rate * devices * 0.999
    cohort = data.draw(st.floats(min(1.0, most / 2), most))
    known = exact_counts(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
    found = rates_from_counts(weight, known, cohort)
    rates = [found.by_level[level] for level in range(MAX_LEVEL + 1)]
    assert all(0 <= rate <= weight.max_rate for rate in rates)
    assert all(low <= high * (1 + 1e-12) for low, high in zip(rates, rates[1:], strict=False))
    total = sum(n * rate for n, rate in zip(counts, rates, strict=False))
    assert total == pytest.approx(cohort, rel=1e-6)
    assert found.expected_cohort == pytest.approx(total)
    assert found.capped == tuple(lv for lv, rate in enumerate(rates) if rate >= weight.max_rate)


def test_linear_rates_are_proportional_to_the_level_size() -> None:
    sampler = ActivitySampler(heavy_tailed(10_000), 10, seed=0)
    rates = [sampler.rates[level] for level in range(sampler.top + 1)]
    sizes = [representative_size(level) for level in range(sampler.top + 1)]
    np.testing.assert_allclose(np.array(rates) / rates[0], np.array(sizes) / sizes[0])
    assert representative_size(0) == 1.0 and representative_size(2) == 5.5


def test_levels_that_hardly_exist_do_not_set_the_highest_rate() -> None:
    counts = np.zeros(MAX_LEVEL + 1)
    counts[[0, 3, 12]] = 900, 100, 0.01
    sampler = ActivitySampler(np.zeros(1000, np.uint8), 10, counts=model_counts(counts), seed=0)
    assert sampler.top == 3
    assert {sampler.rates[level] for level in range(4, 16)} == {sampler.rates[3]}


def test_a_cap_moves_the_cohort_to_lighter_devices() -> None:
    levels = heavy_tailed(10_000)
    free, capped = (ActivitySampler(levels, 300, max_rate=cap, seed=0) for cap in (1.0, 0.05))
    assert max(free.rates.values()) > 0.05 >= max(capped.rates.values())
    assert capped.rates[0] > free.rates[0]
    assert capped.expected_cohort_size == pytest.approx(300)
    assert capped.note is not None and "max_rate=0.05" in capped.note
    assert free.note is None
    assert capped.describe()["capped_levels"] == list(capped.capped)


def test_a_mixture_lifts_light_devices() -> None:
    levels = heavy_tailed(10_000)
    plain, mixed = (ActivitySampler(levels, 300, uniform_mix=m, seed=0) for m in (0.0, 0.5))
    assert mixed.rates[0] > plain.rates[0]
    assert mixed.rates[mixed.top] < plain.rates[plain.top]


def test_a_declared_total_weight_fixes_the_rates_whatever_the_devices() -> None:
    some, others = heavy_tailed(1000, seed=0), heavy_tailed(1000, seed=1)
    rates = [ActivitySampler(lv, 20, total_weight=3e4, seed=0).rates for lv in (some, others)]
    assert rates[0] == rates[1]
    assert rates[0][0] == pytest.approx(20 / 3e4)
    assert ActivitySampler(some, 20, total_weight=3e4).public_rates
    assert not ActivitySampler(some, 20).public_rates


def test_events_list_every_level() -> None:
    for sampler in samplers():
        levels = [level for level, _, count in sampler.by_level if count == 1]
        assert levels == list(range(MAX_LEVEL + 1))
        assert dict((lv, rate) for lv, rate, _ in sampler.by_level) == sampler.rates


# -- what the rates may rest on --------------------------------------------------------------------


class Source:
    """A population as far as samplers read it."""

    def __init__(self, expected: np.ndarray | None = None) -> None:
        levels = heavy_tailed(4000)
        self.activity = (1 << levels.astype(np.int64)).astype(np.uint32)
        self.levels = levels
        self.expected = expected

    def __len__(self) -> int:
        return len(self.activity)

    def expected_level_counts(self) -> np.ndarray | None:
        return self.expected


def settings_of(**changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "sampler": "activity", "activity_weight": "linear", "activity_power": 0.5,
            "uniform_mix": 0.0, "max_rate": 1.0, "total_weight": None,
        } | changes  # fmt: skip
    )


def made(population: Source, private: bool, seed: int = 0, **changes: Any) -> Sampler:
    return make_sampler(
        settings_of(**changes),
        population,  # type: ignore[arg-type]
        40,
        source=NoiseSource.from_seed(seed),
        private=private,
    )


def test_a_public_model_costs_nothing_and_ignores_the_devices() -> None:
    expected = np.bincount(heavy_tailed(4000, seed=9), minlength=MAX_LEVEL + 1).astype(float)
    sampler = made(Source(expected), private=True)
    assert sampler.events == ()
    assert sampler.describe()["level_counts"] == "model"
    most = sampler.most_devices_by_level
    assert all(most[level] >= expected[level] for level in most)
    assert sampler.expected_cohort_size == pytest.approx(40)


def test_real_data_pays_for_its_level_counts_where_devices_are_protected() -> None:
    population = Source()
    sampler = made(population, private=True)
    (event,) = sampler.events
    assert event.noise_multiplier == 10.0 and event.unit == "device" and event.sampling == "none"
    exact = np.bincount(population.levels, minlength=MAX_LEVEL + 1)
    assert all(sampler.most_devices_by_level[level] >= n for level, n in enumerate(exact))
    assert sampler.rates == made(population, private=True).rates, "a resumed run pays once"
    assert sampler.rates != made(population, private=True, seed=1).rates
    open_sampler = made(population, private=False)
    assert open_sampler.events == () and open_sampler.describe()["level_counts"] == "exact"
    assert open_sampler.devices_by_level == {lv: int(n) for lv, n in enumerate(exact) if n}


def test_uniform_samplers_need_no_counts_and_pay_for_none() -> None:
    for name, kind in (("uniform", UniformSampler), ("fixed_size", FixedSizeSampler)):
        sampler = made(Source(), private=True, sampler=name)
        assert isinstance(sampler, kind)
        assert sampler.events == () and sampler.devices_by_level == {}
        assert sampler.most_devices_by_level == {MAX_LEVEL: 4000}
        assert sum(made(Source(), private=False, sampler=name).devices_by_level.values()) == 4000


def test_noised_counts_have_the_noise_that_their_event_states() -> None:
    levels = np.repeat(np.arange(4, dtype=np.uint8), 100_000)
    found = [noised_counts(levels, np.random.default_rng(at)) for at in range(400)]
    noise = found[0].events[0].noise_multiplier
    assert noise == pytest.approx(2e-4 * len(levels))
    errors = np.array([[one.counts[level] - 100_000 for level in range(4)] for one in found])
    assert errors.std() == pytest.approx(noise, rel=0.08)
    assert abs(errors.mean()) < 4.5 * noise / math.sqrt(errors.size)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [0, -3, math.nan, math.inf, 401])
def test_impossible_cohorts_are_refused_in_one_line(cohort: float) -> None:
    levels = heavy_tailed(400)
    for build in (
        lambda: UniformSampler(400, cohort),
        lambda: FixedSizeSampler(400, cohort),
        lambda: ActivitySampler(levels, cohort),
    ):
        with pytest.raises(ConfigError, match="cohort_size") as caught:
            build()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"weight": "square"}, "weight='square'"),
        ({"power": -1.0, "weight": "power"}, "power=-1.0"),
        ({"uniform_mix": 1.5}, "uniform_mix=1.5"),
        ({"max_rate": 0.0}, "max_rate=0.0"),
        ({"max_rate": 0.01}, "max_rate=0.01 allows"),
        ({"total_weight": -1.0}, "total_weight=-1.0"),
        ({"total_weight": math.nan}, "total_weight=nan"),
    ],
)
def test_impossible_weights_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ActivitySampler(heavy_tailed(400), 40, **fields)


def test_odd_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole number"):
        FixedSizeSampler(400, 2.5)
    with pytest.raises(ConfigError, match="level 16"):
        ActivitySampler(np.full(10, 16, np.uint8), 2)
    with pytest.raises(ConfigError, match="level counts"):
        model_counts(np.array([1.0, -2.0]))
    with pytest.raises(ConfigError, match="sampler='loudest'"):
        made(Source(), private=False, sampler="loudest")
    few = noised_counts(np.zeros(20, np.uint8), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="total_weight"):
        ActivitySampler(np.zeros(20, np.uint8), 2, counts=few)


# -- size ------------------------------------------------------------------------------------------


def test_ten_million_devices_are_indexed_with_four_bytes_each() -> None:
    levels = np.tile(heavy_tailed(100_000), 100)
    sampler = ActivitySampler(levels, 500, seed=0)
    assert sum(members.nbytes for members in sampler._members) == 4 * len(levels)
    sizes = [len(sampler.sample(at)) for at in range(30)]
    assert abs(np.mean(sizes) - 500) < 4.5 * math.sqrt(500 / 30)


@pytest.mark.parametrize(("devices", "cohort", "cap"), [(20_000, 100, 0.05), (300, 200, 1.0)])
def test_without_a_cap_of_its_own_a_run_caps_at_ten_times_the_uniform_rate(
    devices: int, cohort: int, cap: float
) -> None:
    from sottovoce.server.settings import compose
    from sottovoce.simulations.populations import make_population

    config = compose([f"population.devices={devices}", f"cohort_size={cohort}"])
    sampler = make_sampler(
        config.strategy,
        make_population(config.population),
        config.cohort_size,
        source=NoiseSource.from_seed(0),
        private=True,
    )
    assert sampler.expected_cohort_size == pytest.approx(cohort, rel=0.02)
    assert max(sampler.rates.values()) == pytest.approx(cap, rel=1e-6) or cap == 1.0
    assert max(sampler.rates.values()) <= cap
