"""Devices' randomness drawn for many at once: normals, coins and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sottovoce.client.batch_draws import draw_visits
from sottovoce.client.batches import BatchPlan, draw_batches, largest
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams
from sottovoce.privacy.mechanisms.philox import philox
from sottovoce.strategies.levels import activity_levels

KEYS = [bytes([k + 1]) * KEY_BYTES for k in range(5)]
words = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(key=st.tuples(words, words), counter=st.tuples(words, words, words, words))
def test_philox_gives_the_words_of_numpys_generator(
    key: tuple[int, int], counter: tuple[int, int, int, int]
) -> None:
    known = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )
    low = (counter[0] + 1) % 2**64  # numpy counts on before it draws
    carried = [low, *counter[1:]]
    for place in range(1, 4):
        if carried[place - 1] != 0:
            break
        carried[place] = (carried[place] + 1) % 2**64
    assert known.random_raw(4).tolist() == philox(key, tuple(carried)).tolist()


def test_streams_are_standard_normal_to_the_far_tail() -> None:
    drawn = NoiseStreams(KEYS).draw([800_000] * 5).double().flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    for size in (1.0, 2.0, 3.0, 3.6, 3.65, 3.7, 4.0, 4.5):  # words end at 3.67
        for share in ((drawn > size).mean(), (drawn < -size).mean()):
            expected = stats.norm.sf(size)
            assert share == pytest.approx(expected, abs=6 * (expected / len(drawn)) ** 0.5)
    tail = np.abs(drawn[np.abs(drawn) > 3.75])
    values = stats.norm.cdf(-tail) / stats.norm.cdf(-3.75)
    assert stats.kstest(values, "uniform").pvalue > 1e-6


def test_what_a_stream_draws_does_not_depend_on_the_others() -> None:
    counts = [[7, 0, 1000, 3, 12], [40_000, 5, 0, 5, 5]]
    together = NoiseStreams(KEYS)
    asked = [together.draw(some) for some in counts]
    for k, key in enumerate(KEYS):
        alone = NoiseStreams([key])
        for some, found in zip(counts, asked, strict=True):
            assert torch.equal(found[k, : some[k]], alone.draw([some[k]])[0])
            assert not found[k, some[k] :].any()


def test_draws_are_scaled_for_all_or_stream_by_stream() -> None:
    plain = NoiseStreams(KEYS).draw([50] * 5)
    each = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.0])
    torch.testing.assert_close(NoiseStreams(KEYS).draw([50] * 5, 2.0), 2 * plain)
    torch.testing.assert_close(NoiseStreams(KEYS).draw([50] * 5, each), each[:, None] * plain)


def test_streams_of_different_keys_and_later_draws_are_not_correlated() -> None:
    streams = NoiseStreams(KEYS)
    rows = torch.cat([streams.draw([40_000] * 5), streams.draw([40_000] * 5)]).double()
    products = rows @ rows.t() / rows.shape[1] - torch.eye(10)
    assert float(products.abs().max()) < 7 * 2**0.5 / rows.shape[1] ** 0.5


# -- local batches ---------------------------------------------------------------------------------

plans = st.builds(
    BatchPlan, batch_size=st.integers(1, 9), local_epochs=st.integers(1, 3),
    max_examples=st.integers(1, 40), poisson=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(plan=plans, counts=st.lists(st.integers(1, 90), min_size=1, max_size=8), seed=words)
def test_a_devices_batches_do_not_depend_on_its_company(
    plan: BatchPlan, counts: list[int], seed: int
) -> None:
    sizes, devices = np.array(counts), np.arange(len(counts)) * 1000 + 7
    levels = activity_levels(sizes)
    visits, steps = draw_visits(plan, devices, levels, sizes, (seed, 1))
    for k in range(len(counts)):
        one = slice(k, k + 1)
        alone, own = draw_visits(plan, devices[one], levels[one], sizes[one], (seed, 1))
        mine = visits.owner == k
        assert int(own[0]) == int(steps[k]) == plan.steps(int(levels[k]), counts[k])
        assert np.array_equal(visits.step[mine], alone.step)
        assert np.array_equal(visits.row[mine], alone.row)


@settings(deadline=None, max_examples=60)
@given(plan=plans, count=st.integers(1, 90), seed=words)
def test_batches_are_as_large_as_those_of_one_device_drawn_by_itself(
    plan: BatchPlan, count: int, seed: int
) -> None:
    level = int(activity_levels(np.array([count]))[0])
    visits, _ = draw_visits(
        plan, np.array([3]), np.array([level], np.uint8), np.array([count]), (seed, 2)
    )
    known = draw_batches(plan, level, count, np.random.default_rng(1))
    sizes = np.bincount(visits.step, minlength=len(known))
    assert len(sizes) == len(known)
    for step in range(len(known)):
        rows = visits.row[visits.step == step]
        assert len(set(rows.tolist())) == len(rows) and np.all(rows < count)
    if not plan.poisson:
        assert sizes.tolist() == [len(batch) for batch in known]
        per_epoch = len(known) // plan.local_epochs
        for epoch in range(plan.local_epochs):
            seen = visits.row[visits.step // per_epoch == epoch]
            assert len(set(seen.tolist())) == len(seen) == min(count, plan.max_examples)


def test_coins_of_poisson_batches_fall_at_their_rate() -> None:
    plan = BatchPlan(batch_size=8, local_epochs=1, max_examples=64, poisson=True)
    devices, counts = np.arange(4000), np.full(4000, 40)
    levels = activity_levels(counts)
    visits, steps = draw_visits(plan, devices, levels, counts, (5, 6))
    trials, rate = int((steps * counts).sum()), 8 / largest(int(levels[0]))
    assert len(visits.row) / trials == pytest.approx(rate, abs=6 * (rate / trials) ** 0.5)
    for example in (0, 39):  # no place in the device's data is favoured
        share = (visits.row == example).sum() / steps.sum()
        assert share == pytest.approx(rate, abs=6 * (rate / steps.sum()) ** 0.5)


def test_every_order_of_an_epoch_is_as_likely() -> None:
    plan = BatchPlan(batch_size=1, local_epochs=1, max_examples=3, poisson=False)
    counts = np.full(6000, 3)
    visits, _ = draw_visits(plan, np.arange(6000), activity_levels(counts), counts, (7, 8))
    orders = visits.row.reshape(-1, 3) @ np.array([9, 3, 1])
    found = np.unique(orders, return_counts=True)[1]
    assert len(found) == 6 and stats.chisquare(found).pvalue > 1e-6


@given(numbers=st.lists(st.integers(0, 2**62), max_size=5), size=st.integers(1, 64))
def test_many_digests_are_each_ones_own(numbers: list[int], size: int) -> None:
    source = NoiseSource.from_seed(3)
    known = [source.digest("noise", 7, number, size=size) for number in numbers]
    assert source.digests("noise", 7, numbers=numbers, size=size) == known
