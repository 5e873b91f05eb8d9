"""Mechanisms of known epsilon that score canaries, for `audit_coverage.py`.

Each takes the canaries' coins, releases something, and hands out the scores that its best attacker
gives them. Only what is released depends on the coins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.audit import gaussian_epsilon

DELTA = 1e-5
SAMPLED = "sampled Gaussian, q 0.1, σ 0.5, 4 rounds"
Array = NDArray[np.float64]
Coins = NDArray[np.bool_]


@dataclass(frozen=True)
class Mechanism:
    """`release(coins, generator)` scores canaries. `epsilon`: its own, at `delta`.

    `gaussian`: its trade-off curve is a Gaussian one. `independent`: scores depend on nothing but
    their own canary.
    """

    name: str
    epsilon: float
    release: Callable[[Coins, np.random.Generator], Array]
    delta: float = DELTA
    gaussian: bool = False
    independent: bool = True


def null(coins: Coins, generator: np.random.Generator) -> Array:
    return generator.standard_normal(len(coins))


def randomised_response(epsilon: float) -> Callable[[Coins, np.random.Generator], Array]:
    def release(coins: Coins, generator: np.random.Generator) -> Array:
        kept = generator.random(len(coins)) < 1 / (1 + math.exp(-epsilon))
        return np.where(kept, coins, ~coins) + 1e-9 * generator.standard_normal(len(coins))

    return release


def laplace(epsilon: float) -> Callable[[Coins, np.random.Generator], Array]:
    return lambda coins, generator: coins + generator.laplace(0, 1 / epsilon, len(coins))


def gaussian(mu: float) -> Callable[[Coins, np.random.Generator], Array]:
    return lambda coins, generator: mu * coins + generator.standard_normal(len(coins))


def correlated(mu: float) -> Callable[[Coins, np.random.Generator], Array]:
    """A noised sum of canaries' random directions, of fewer dimensions than there are canaries."""
    def release(coins: Coins, generator: np.random.Generator) -> Array:
        directions = generator.standard_normal((len(coins), max(8, len(coins) // 4)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        noise = generator.standard_normal(directions.shape[1]) / mu
        return directions @ (coins.astype(float) @ directions + noise)

    return release


def shared_shift(mu: float) -> Callable[[Coins, np.random.Generator], Array]:
    """All scores of a trial move together, far more than any canary moves its own."""
    return lambda coins, generator: gaussian(mu)(coins, generator) + 5 * generator.standard_normal()


def sampled(rate: float, mu: float, rounds: int) -> Callable[[Coins, np.random.Generator], Array]:
    """Poisson-sampled Gaussian rounds, each canary in a round by its own secret coin."""
    def release(coins: Coins, generator: np.random.Generator) -> Array:
        total = np.zeros(len(coins))
        for _ in range(rounds):
            took_part = generator.random(len(coins)) < rate
            seen = mu * (coins & took_part) + generator.standard_normal(len(coins))
            total += np.log1p(rate * np.expm1(mu * seen - mu * mu / 2))  # its log-likelihood ratio
        return total

    return release


def exchanged(epsilon: float) -> Callable[[Coins, np.random.Generator], Array]:
    """A training set of fixed size: who is left out has another, drawn at random, in its place.

    Each place releases a public attribute, +1 or -1, with Laplace noise: epsilon if its holder is
    removed, twice that if another has its place.
    """
    def release(coins: Coins, generator: np.random.Generator) -> Array:
        own, other = generator.choice([-1.0, 1.0], (2, len(coins)))
        held = np.where(coins, own, other)
        return own * (held + generator.laplace(0, 1 / epsilon, len(coins)))

    return release


def mechanisms() -> list[Mechanism]:
    """Every mechanism, from the one that releases nothing."""
    weak, strong = 0.5, 1.2
    return [
        Mechanism("null", 0.0, null, gaussian=True),
        Mechanism("randomised response, ε 1", 1.0, randomised_response(1.0), 0.0),
        Mechanism("randomised response, ε 3", 3.0, randomised_response(3.0), 0.0),
        Mechanism("Laplace, ε 1", 1.0, laplace(1.0), 0.0),
        Mechanism("Laplace, ε 4", 4.0, laplace(4.0), 0.0),
        Mechanism("Gaussian, μ 0.5", gaussian_epsilon(weak, DELTA), gaussian(weak), gaussian=True),
        Mechanism("Gaussian, μ 1.2", gaussian_epsilon(strong, DELTA), gaussian(strong),
                  gaussian=True),
        Mechanism("correlated Gaussian, μ 1.2", gaussian_epsilon(strong, DELTA),
                  correlated(strong), gaussian=True, independent=False),
        Mechanism("Gaussian, one shift for all, μ 0.5", gaussian_epsilon(weak, DELTA),
                  shared_shift(weak), gaussian=True, independent=False),
        Mechanism(SAMPLED, _sampled_epsilon(), sampled(0.1, 2, 4)),
        Mechanism("fixed size, one exchanged, ε 4", 4.0, exchanged(2.0), 0.0),
    ]


@lru_cache(maxsize=1)
def _sampled_epsilon() -> float:
    """Epsilon of the sampled Gaussian rounds by the accountant."""
    from sottovoce.privacy import GaussianEvent, epsilon

    event = GaussianEvent(noise_multiplier=0.5, count=4, sampling="poisson", sampling_rate=0.1)
    return epsilon(event, DELTA)
