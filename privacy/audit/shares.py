"""Which shares of the canaries to call members and non-members, chosen on canaries not tested.

Any choice keeps the bound valid; a good one makes it tight. Chosen is the pair of shares whose
guesses prove most on the canaries that choose: at delta = 0 in general, as mu of a Gaussian
mechanism where it is one (for pairs of equal shares, between counts by interpolation).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from sottovoce.privacy.audit.bounds import pure_one_run_bound
from sottovoce.privacy.audit.gaussian import one_run_mu

# Below one half each: coins never come out exactly even, so the middle is left alone.
FRACTIONS = np.array([0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45])
GRID = 17  # counts between half and all right

Counts = NDArray[np.int64]


def sizes(fractions: NDArray[np.float64], canaries: int) -> Counts:
    """How many canaries each share is."""
    return np.floor(fractions * canaries).astype(np.int64)


def best_pair(
    canaries: int,
    guessed: Counts,
    right_top: Counts,
    right_bottom: Counts,
    significance: float,
    gaussian: bool,
) -> tuple[int, int]:
    """Indices of the shares of `canaries` to call members and non-members.

    `guessed`: (shares,) canaries in each share; `right_top`, `right_bottom`: (shares,) members
    among so many top scores, non-members among so many bottom ones. Where nothing is proved, the
    pair that beats chance by the most standard deviations.
    """
    made = guessed[:, None] + guessed[None, :]
    right = right_top[:, None] + right_bottom[None, :]
    if gaussian:
        proved = np.zeros(made.shape)
        counts = zip(np.diag(made), np.diag(right), strict=True)
        mus = [_mu(canaries, int(n), int(v), significance) for n, v in counts]
        np.fill_diagonal(proved, mus)
    else:
        proved = pure_one_run_bound(made, right, significance)
    luck = (right - made / 2) / np.sqrt(np.maximum(made, 1) / 4)
    row, column = np.unravel_index(np.lexsort((luck.ravel(), proved.ravel()))[-1], made.shape)
    return int(row), int(column)


def precision(share: float, mu: float) -> float:
    """Share of members among the top `share` of scores, half of them N(mu, 1) and half N(0, 1)."""
    def beyond(threshold: float) -> float:
        return float(special.ndtr(-threshold) + special.ndtr(mu - threshold)) / 2 - share

    threshold = float(optimize.brentq(beyond, -10.0, mu + 10.0))
    return float(special.ndtr(mu - threshold)) / 2 / share


def _mu(canaries: int, guesses: int, right: int, significance: float) -> float:
    """About `one_run_mu`."""
    if guesses == 0 or 2 * right <= guesses:
        return 0.0
    counts, mus = _mus(canaries, guesses, significance)
    return float(np.interp(right, counts, mus))


@lru_cache(maxsize=1024)
def _mus(canaries: int, guesses: int, significance: float) -> tuple[Counts, NDArray[np.float64]]:
    counts = np.unique(np.linspace(guesses / 2, guesses, GRID).astype(np.int64))
    return counts, np.array([one_run_mu(canaries, guesses, int(v), significance) for v in counts])
