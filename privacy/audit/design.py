"""How the canaries of a membership test came to be members, and how guesses about them are fixed.

One run certifies what its coins allow (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846): given
everything else, each canary's membership must be a fair coin, and the neighbours that its two sides
make are those that the bound is about. Canaries with coins of their own test add/remove. Of data
that was merely split, training part and held-out part are a finite pool: a coin that falls
otherwise puts somebody else into the training data, and the neighbours exchange one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sottovoce.privacy.audit.bounds import one_run_lower_bound
from sottovoce.privacy.audit.gaussian import one_run_gaussian_lower_bound
from sottovoce.privacy.audit.roc import Scores

LEAST_LIKELY_COINS = 1e-9
METHOD = "one run (Steinke et al. 2023)"
GAUSSIAN_METHOD = "one run, Gaussian (Mahloujifar et al. 2024)"
COINS = "each candidate was put into the training data, or not, by its own fair coin"
SPLIT = (
    "which candidates were in the training data was decided at random, whatever they hold, and as "
    "many of either side as fair coins give are drawn; a training set of fixed size has another in "
    "the place of each one left out, so that the bound is about exchanging one"
)
GAUSSIAN = "the mechanism is Gaussian and nothing was sampled"


@dataclass(frozen=True)
class Design:
    """How membership came about and how guesses are fixed.

    `coins`: every candidate had its own fair coin and all were kept; otherwise a random split of
    some finite pool, of which as many are drawn as coins would give. `declared`: shares of the
    canaries to call members and, as many, non-members, fixed in advance; where there are none, a
    share `holdout` of the canaries chooses them and is not tested. `gaussian`: the mechanism is
    known to be Gaussian, so that the tighter bound holds.
    """

    coins: bool = False
    holdout: float = 0.5
    declared: tuple[float, ...] = ()
    gaussian: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must be above 0 and below 1: 0.5 is usual")
        for share in self.declared:
            if not 0 < share < 0.5:
                raise ValueError(f"guesses={share:g} must be above 0 and below 0.5, on each side")

    @property
    def relation(self) -> str:
        """With its own coin a candidate is there or not; in a split another takes its place."""
        return "add_remove" if self.coins else "replace_one"

    @property
    def method(self) -> str:
        how = f"chosen on {100 * self.holdout:g} % of the canaries, tested on the rest"
        if self.declared:
            how = f"declared in advance ({', '.join(f'{share:g}' for share in self.declared)})"
        return f"{GAUSSIAN_METHOD if self.gaussian else METHOD}, guesses {how}"

    @property
    def assumes(self) -> str:
        return (COINS if self.coins else SPLIT) + (f"; {GAUSSIAN}" if self.gaussian else "")

    def certify(
        self, canaries: int, guesses: int, correct: int, delta: float, confidence: float
    ) -> float:
        """The bound of these counts."""
        return _certified(self.gaussian, canaries, guesses, correct, delta, confidence)


DEFAULT_DESIGN = Design()


def all_coins(
    members: Scores, non_members: Scores, generator: np.random.Generator
) -> tuple[Scores, NDArray[np.bool_]]:
    """All candidates in random order with their coins; ValueError where those cannot be fair."""
    inside, canaries = len(members), len(members) + len(non_members)
    chance = 2 * float(special.bdtr(min(inside, canaries - inside), canaries, 0.5))
    if chance < LEAST_LIKELY_COINS:
        raise ValueError(
            f"{inside} of {canaries} candidates are members: fair coins give that with "
            f"probability {chance:.0e}, so leave coins=false"
        )
    order = generator.permutation(canaries)
    return np.concatenate([members, non_members])[order], (np.arange(canaries) < inside)[order]


def flip_coins(
    members: Scores, non_members: Scores, generator: np.random.Generator
) -> tuple[Scores, NDArray[np.bool_]]:
    """Canaries in random order with their coins, True for a member.

    The number of members is binomial, as fair coins would have it, and which ones is random: given
    who was drawn, who of them trained is a fair coin each. Their training set would be as large had
    a coin fallen otherwise, as somebody else was drawn into it: neighbours exchange one. Four
    standard deviations are kept in reserve on the smaller side, so that it runs out with
    probability below 1e-4.
    """
    pool = min(len(members), len(non_members))
    canaries = max(1, math.floor(2 * (pool - 4 * math.sqrt(pool / 2))))
    inside = int(generator.binomial(canaries, 0.5))
    inside = min(max(inside, canaries - len(non_members)), len(members))
    scores = np.concatenate([
        generator.choice(members, inside, replace=False),
        generator.choice(non_members, canaries - inside, replace=False),
    ])
    coins = np.arange(canaries) < inside
    order = generator.permutation(canaries)
    return scores[order], coins[order]


@lru_cache(maxsize=65_536)
def _certified(
    gaussian: bool, canaries: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    bound = one_run_gaussian_lower_bound if gaussian else one_run_lower_bound
    return bound(canaries, guesses, correct, delta, confidence)
