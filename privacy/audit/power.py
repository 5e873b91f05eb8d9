"""What an audit would have found: its chance of flagging a run that had half the noise it claims.

The model is Gaussian. The claim is read as the mu whose Gaussian mechanism has its (epsilon,
delta) (Dong et al. 2019, arXiv:1905.02383); half the noise doubles mu. An attack that sees all
there is tells each canary from its absence as N(2 mu, 1) from N(0, 1), independently of the others;
one that sees less, as its own scores are apart, twice over. The audit's own test is then made on
simulated counts: the same number of canaries, the same level, shares chosen as it chooses them.

A sampled mechanism with half its noise leaks more than this says. A power is a computation under
this model, neither a bound nor a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.audit.bounds import one_run_p_value
from sottovoce.privacy.audit.design import Design
from sottovoce.privacy.audit.gaussian import gaussian_mu, refutes_mu
from sottovoce.privacy.audit.shares import FRACTIONS, Counts, best_pair, precision, sizes

MODEL = (
    "the claim read as a Gaussian mechanism's mu, doubled by half the noise, faced with the same "
    "test on as many canaries, simulated"
)
TRIALS = 400  # a standard error of at most 0.025


@dataclass(frozen=True)
class Power:
    """Chance of VIOLATION at half the noise: of a `perfect` attack, of `this` one as measured."""

    perfect: float
    this: float

    def __str__(self) -> str:
        return (
            f"had the noise been half, a perfect attack would have shown it with probability "
            f"{self.perfect:.2f}, this one (twice its separation) with {self.this:.2f}"
        )


def half_noise_power(
    *,
    canaries: int,
    claimed: float,
    delta: float,
    confidence: float,
    separation: float,
    design: Design,
) -> Power | None:
    """Power against half the noise of an audit of `canaries`, chosen on and tested.

    `separation`: of the attack's scores as measured, in standard deviations. None where the claim
    fits no Gaussian mechanism.
    """
    if not (delta > 0 and 0 <= claimed < math.inf):
        return None
    most = gaussian_mu(claimed, delta)
    test = _Test(canaries, claimed, delta, 1 - confidence, design)
    return Power(_power(2 * most, test), _power(2 * min(max(separation, 0.0), most), test))


@dataclass(frozen=True)
class _Test:
    """The claim that would be refuted, and how."""

    canaries: int
    claimed: float
    delta: float
    significance: float
    design: Design

    @property
    def chosen_on(self) -> int:
        return 0 if self.design.declared else math.floor(self.canaries * self.design.holdout)

    @property
    def tested(self) -> int:
        return self.canaries - self.chosen_on

    def fewest_right(self, guesses: int) -> int:
        """The fewest right ones of `guesses` that refute the claim; guesses + 1 where none do."""
        level = self.significance / max(1, len(self.design.declared))
        mu = gaussian_mu(self.claimed, self.delta) if self.design.gaussian else 0.0
        low, high = 0, guesses + 1
        while low < high:
            middle = (low + high) // 2
            if self.design.gaussian:
                refuted = refutes_mu(self.tested, guesses, middle, mu, level)
            else:
                chance = one_run_p_value(self.tested, guesses, middle, self.claimed, self.delta)
                refuted = chance <= level
            low, high = (low, middle) if refuted else (middle + 1, high)
        return low


@lru_cache(maxsize=256)
def _power(mu: float, test: _Test) -> float:
    """Share of simulated audits of N(mu, 1) against N(0, 1) that refute the claim."""
    generator = np.random.default_rng(0)
    shares = np.array(test.design.declared) if test.design.declared else FRACTIONS[1:]
    made, tops, bottoms = _counts(mu, shares, test.tested, generator)
    fewest = cache(test.fewest_right)
    if test.design.declared:
        needed = np.array([fewest(int(2 * n)) for n in made])
        return float(((tops + bottoms) >= needed).any(axis=1).mean())
    sample = _counts(mu, shares, test.chosen_on, generator)
    guessed, flagged = _with_none(made), 0
    for trial in range(TRIALS):
        top, bottom = best_pair(
            test.chosen_on, _with_none(sample[0]), _with_none(sample[1][trial]),
            _with_none(sample[2][trial]), test.significance, test.design.gaussian,
        )
        right = _with_none(tops[trial])[top] + _with_none(bottoms[trial])[bottom]
        flagged += bool(right >= fewest(int(guessed[top] + guessed[bottom])))
    return flagged / TRIALS


def _counts(
    mu: float, shares: NDArray[np.float64], canaries: int, generator: np.random.Generator
) -> tuple[Counts, Counts, Counts]:
    """(shares,) canaries in each share, (trials, shares) right ones at the top and at the bottom.

    Shares hold each other, so that right guesses are added up band by band.
    """
    order = np.argsort(shares)
    made = sizes(shares, canaries)
    inside = np.diff(made[order], prepend=0)
    held = [share * precision(float(share), mu) for share in shares[order]]
    rates = np.diff(held, prepend=0.0) / np.diff(shares[order], prepend=0.0)
    found = []
    for _ in ("top", "bottom"):
        right = np.empty((TRIALS, len(shares)), np.int64)
        draws = generator.binomial(inside, np.clip(rates, 0, 1), (TRIALS, len(shares)))
        right[:, order] = np.cumsum(draws, axis=1)
        found.append(right)
    return made, found[0], found[1]


def _with_none(counts: Counts) -> Counts:
    """The counts with those of the share 0 in front, as `FRACTIONS` has it."""
    return np.concatenate([[0], counts])
