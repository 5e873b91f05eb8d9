"""The device's own bound on epsilon: never below the true one, and close to the libraries'."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.client.agent.journal import StepCost
from sottovoce.client.agent.spending import MANY, epsilon_spent
from sottovoce.client.errors import ConfigError
from sottovoce.privacy import GaussianEvent, epsilon
from sottovoce.privacy.accounting.local_bound import _at_integer, _in_between, epsilon_bound

USUAL = [
    (0.7, 0.25, 8, 1e-5),
    (0.8, 0.05, 200, 1e-5),
    (1.0, 0.01, 1000, 1e-5),
    (1.0, 0.5, 40, 1e-6),
    (1.5, 0.1, 400, 1e-6),
    (2.0, 1.0, 10, 1e-5),
    (5.0, 0.3, 2000, 1e-5),
    (0.5, 0.1, 20, 1e-5),
    (0.6, 0.03, 100, 1e-5),
    (4.0, 0.01, 10_000, 1e-6),
]


def events(steps: list[tuple[float, float, int]]) -> list[GaussianEvent]:
    """The same steps for the project's accountants."""
    return [
        GaussianEvent(
            unit="example", relation="add_remove", observer="fleet",
            sampling="poisson" if rate < 1 else "none", sampling_rate=rate,
            noise_multiplier=noise, count=count, purpose="steps",
        )
        for noise, rate, count in steps
    ]


def slow_epsilon(noise: float, rate: float, count: int, delta: float) -> float:
    """Integer orders only, in plain numbers: the definition."""
    found = []
    for order in range(2, 60):
        moment = sum(
            math.comb(order, k) * (1 - rate) ** (order - k) * rate**k
            * math.exp((k * k - k) / (2 * noise**2))
            for k in range(order + 1)
        )
        rdp = count * math.log(moment) / (order - 1)
        found.append(
            rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        )
    return max(min(found), 0.0)


@pytest.mark.parametrize(("noise", "rate", "count", "delta"), USUAL)
def test_the_bound_lies_between_the_exact_epsilon_and_a_few_percent_above_the_library(
    noise: float, rate: float, count: int, delta: float
) -> None:
    bound = epsilon_bound([(noise, rate, count)], delta)
    source = events([(noise, rate, count)])
    assert bound >= epsilon(source, delta, accountant="pld")
    library = epsilon(source, delta, accountant="rdp")
    assert library * 0.98 <= bound <= library * 1.02


def test_the_bound_of_different_participations_lies_above_the_exact_epsilon() -> None:
    steps = [(0.9, 0.2, 30), (1.3, 0.05, 100), (2.0, 1.0, 2)]
    assert epsilon_bound(steps, 1e-5) >= epsilon(events(steps), 1e-5, accountant="pld")


@given(
    noise=st.floats(2.0, 20.0), rate=st.floats(0.01, 0.9), count=st.integers(1, 50),
    delta=st.floats(1e-9, 1e-3),
)
def test_the_bound_never_exceeds_the_slow_one_over_integer_orders(
    noise: float, rate: float, count: int, delta: float
) -> None:
    assert epsilon_bound([(noise, rate, count)], delta) <= slow_epsilon(
        noise, rate, count, delta
    ) * (1 + 1e-6)


@given(
    noise=st.floats(0.01, 100), rate=st.floats(1e-9, 1), count=st.integers(1, 10**6),
    delta=st.floats(1e-12, 0.5),
)
def test_epsilon_rises_with_rate_and_count_and_falls_with_noise_and_delta(
    noise: float, rate: float, count: int, delta: float
) -> None:
    here = epsilon_bound([(noise, rate, count)], delta)
    assert math.isfinite(here)
    for noise2, rate2, count2, delta2 in (
        (noise / 1.1, rate, count, delta),
        (noise, min(1.0, rate * 1.1), count, delta),
        (noise, rate, count + 1, delta),
        (noise, rate, count, delta / 2),
    ):
        assert epsilon_bound([(noise2, rate2, count2)], delta2) >= here * (1 - 1e-9)


@given(noise=st.floats(0.25, 30), rate=st.floats(1e-6, 0.99))
def test_the_trapezoidal_rule_meets_the_closed_form_at_integer_orders(
    noise: float, rate: float
) -> None:
    for order in (2, 3, 5):
        exact = _at_integer(order, noise, rate)
        assert _in_between(order, noise, rate) == pytest.approx(exact, rel=1e-9)


def test_a_tiny_rate_is_not_rounded_to_nothing() -> None:
    assert 0 <= epsilon_bound([(1e300, 0.5, 10**6)], 1e-5) < 1e-3
    one = epsilon_bound([(10.0, 1e-8, 10**6)], 1e-5)
    assert 0 < one < epsilon_bound([(10.0, 1e-8, 10**12)], 1e-5)


def test_no_noise_is_no_privacy_and_nothing_costs_nothing() -> None:
    assert epsilon_spent([(StepCost(None, 0.1, 5), 1)], 1e-5) == math.inf
    assert epsilon_bound([(0.0, 0.1, 5)], 1e-5) == math.inf
    assert epsilon_spent([], 1e-5) == 0.0
    assert epsilon_spent([(StepCost(1.0, 0.1, 0), 3)], 1e-5) == 0.0


def test_counts_of_participations_multiply_their_steps() -> None:
    spent = epsilon_spent([(StepCost(1.0, 0.1, 4), 6)], 1e-5)
    assert spent == epsilon_bound([(1.0, 0.1, 24)], 1e-5)
    assert spent == pytest.approx(epsilon_spent([(StepCost(1.0, 0.1, 4), 1)] * 6, 1e-5))


def test_many_different_costs_cost_a_little_more_and_never_less() -> None:
    costs = [(StepCost(0.8 + number / 500, 0.1 + number / 5000, 4), 1) for number in range(MANY)]
    further = [(StepCost(3.0 + number / 500, 0.01, 4), 1) for number in range(200)]
    exact = epsilon_bound(
        [(c.noise_multiplier or 0, c.sampling_rate, c.steps) for c, _ in costs + further], 1e-5
    )
    assert exact <= epsilon_spent(costs + further, 1e-5) <= exact * 1.03
    assert epsilon_spent(costs, 1e-5) <= exact
    never = [(StepCost(1.0 + number, 0.0, 4), 1) for number in range(MANY + 1)]
    assert epsilon_spent(never, 1e-5) == 0.0


def test_full_participation_is_the_plain_gaussian() -> None:
    """RDP of a Gaussian is a / (2 sigma^2) at every order: the continuous minimum is close."""
    orders = np.linspace(1.001, 200, 200_000)
    exact = orders / 2 + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
    assert epsilon_bound([(1.0, 1.0, 1)], 1e-5) == pytest.approx(exact.min(), rel=1e-2)


def test_impossible_figures_are_refused() -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon_bound([], 0.0)
    for step in ((-1.0, 0.1, 1), (1.0, 1.1, 1), (math.nan, 0.1, 1), (1.0, 0.1, -1)):
        with pytest.raises(ValueError, match="sampling_rate"):
            epsilon_bound([step], 1e-5)
    for values in ((0.0, 0.1, 1), (math.inf, 0.1, 1), (1.0, math.nan, 1), (1.0, 0.1, -1)):
        with pytest.raises(ValueError, match="must be"):
            StepCost(*values)
