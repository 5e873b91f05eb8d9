"""The fast privacy losses are the library's, and never below what is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld import privacy_loss_mechanism as mechanism
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.privacy.accounting.loss_grids import (
    deltas_at,
    epsilon_at,
    epsilon_of,
    gaussian_losses,
)

GRID = 1e-2


@settings(max_examples=15, deadline=None)
@given(st.floats(0.4, 30.0), st.floats(1e-5, 0.999), st.booleans())
def test_deltas_are_the_librarys(noise: float, rate: float, removed: bool) -> None:
    kind = mechanism.AdjacencyType.REMOVE if removed else mechanism.AdjacencyType.ADD
    slow = mechanism.GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=kind)
    epsilons = np.linspace(-3.0, 3.0, 41) + 1e-7
    fast = deltas_at(epsilons, noise, rate, removed=removed)
    assert np.allclose(fast, slow.get_delta_for_epsilon(epsilons), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "noise, rate, count, delta",
    [(1.0, 0.01, 500, 1e-5), (0.6, 1e-4, 2000, 1e-6), (4.0, 0.5, 10, 1e-3), (0.5, 0.9, 3, 1e-5),
     (1.0, 0.9, 1, 0.3), (5.0, 1e-3, 5, 0.1), (2.0, 1.0, 4, 1e-6)],
)  # fmt: skip
def test_compositions_cost_what_they_cost_in_the_library(
    noise: float, rate: float, count: int, delta: float
) -> None:
    slow = pld.from_gaussian_mechanism(
        noise, value_discretization_interval=GRID, sampling_prob=rate
    ).self_compose(count)
    fast = gaussian_losses(noise, rate, GRID).self_compose(count)
    expected = slow.get_epsilon_for_delta(delta)
    assert epsilon_at(fast, delta) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert epsilon_at(slow, delta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fast_and_slow_distributions_compose_with_each_other() -> None:
    plans = [(1.2, 0.02, 50), (0.8, 0.005, 100), (3.0, 0.1, 20)]
    slow, fast = pld.identity(GRID), pld.identity(GRID)
    for noise, rate, count in plans:
        slow = slow.compose(
            pld.from_gaussian_mechanism(
                noise, value_discretization_interval=GRID, sampling_prob=rate
            ).self_compose(count)
        )
        fast = fast.compose(gaussian_losses(noise, rate, GRID).self_compose(count))
    expected = slow.get_epsilon_for_delta(1e-5)
    assert epsilon_at(fast, 1e-5) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=12), st.floats(1e-6, 0.5),
       st.floats(0.0, 0.01))  # fmt: skip
def test_epsilon_is_the_first_at_which_the_divergence_is_delta(
    weights: list[float], delta: float, infinity: float
) -> None:
    masses = np.array(weights) / sum(weights) * (1 - infinity)
    losses = np.linspace(-2.0, 3.0, len(masses))

    def divergence(at: float) -> float:
        above = losses > at
        return infinity + float(masses[above] @ -np.expm1(at - losses[above]))

    found = epsilon_of(losses, masses, infinity, delta)
    if infinity > delta:
        assert found == math.inf
        return
    assert divergence(found) <= delta + 1e-12
    assert found == 0 or divergence(found * (1 - 1e-6) - 1e-9) >= delta - 1e-12
