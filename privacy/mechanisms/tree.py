"""Binary tree aggregation: noise on the nodes of a tree over the rounds.

A prefix of t rounds is the sum of at most log2(t) + 1 complete nodes. C has a row for every node
that is complete by the last round (no other node is ever looked at) with ones at its leaves.

Sources: Dwork et al. 2010; Chan et al. 2011; DP-FTRL: Kairouz et al. 2021, arXiv:2103.00039, with
the variance reduction of Honaker 2015 as its appendix B; restricted participation: Xu et al. 2023,
arXiv:2305.18465.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.privacy.mechanisms.series import Floats

MOST_STATES = 3_000
"""Blocks times participations up to which the worst schedule is searched for exactly."""

_Option = tuple[int, int]  # last participation's place, sum over nodes of squared counts


def squared_sensitivity(schedule: Schedule) -> int:
    """Largest sum over nodes of (participations below it)^2: |C u|^2 for unit contributions.

    C has no negative entries, so contributions in one direction are the worst. Exact where the
    search is small; else for a separation rounded down to a power of two: an upper bound, as it
    allows more schedules.
    """
    rounds, apart, most = schedule.rounds, schedule.min_separation, schedule.participations
    block = 1 << (apart.bit_length() - 1)
    if apart != block and math.ceil(rounds / block) * most <= MOST_STATES:
        return _worst(rounds, apart, most)
    return int(_free(rounds, block, most).max())


def node_counts(rounds: int, taken: tuple[int, ...]) -> int:
    """The sum over complete nodes of (participations below)^2 for one set of rounds (from 0)."""
    total, size = 0, 1
    while size <= rounds:
        counts = np.bincount([at // size for at in taken if at // size < rounds // size] or [0])
        total += int((counts**2).sum()) if taken else 0
        size *= 2
    return total


def strategy_matrix(rounds: int) -> Floats:
    """(nodes, rounds) C: nodes in the order in which they are completed, children first."""
    rows = []
    for end in range(1, rounds + 1):
        size = 1
        while end % size == 0:
            row = np.zeros(rounds)
            row[end - size : end] = 1.0
            rows.append(row)
            size *= 2
    return np.array(rows)


def honaker(rounds: int) -> tuple[Floats, Floats]:
    """By height: weight of a node's own noise in its estimate, and the estimate's variance.

    A node's noise has variance 1, the sum of its children's estimates 2 v; weights are inverse to
    them.
    """
    variances = [1.0]
    for _ in range(rounds.bit_length() - 1):
        variances.append(1 / (1 + 1 / (2 * variances[-1])))
    return np.array([1.0, *variances[1:]]), np.array(variances)


def prefix_variances(rounds: int) -> Floats:
    """(rounds,) variance of each prefix sum's noise, for nodes of unit variance."""
    _, variances = honaker(rounds)
    bits = np.arange(1, rounds + 1)[:, None] >> np.arange(len(variances))[None, :] & 1
    found: Floats = bits @ variances
    return found


def row_variances(rounds: int) -> Floats:
    """(rounds,) variance of the difference of two neighbouring prefix sums' noise.

    With X_j the estimate of the node of height j that round t completes and P_j the sum of the
    estimates that it replaces: Var(X_j - P_j), by recursion over j from X_j = w z + (1 - w) (L +
    X_{j-1}) and P_j = L + P_{j-1}, L its left child's estimate.
    """
    weights, variances = honaker(rounds)
    crossed, replaced, by_height = 0.0, 0.0, [1.0]
    for height in range(1, len(weights)):
        crossed = (1 - weights[height]) * (variances[height - 1] + crossed)
        replaced += variances[height - 1]
        by_height.append(variances[height] - 2 * crossed + replaced)
    numbers = np.arange(1, rounds + 1)
    heights = np.log2(numbers & -numbers).astype(int)
    found: Floats = np.array(by_height)[heights]
    return found


def _free(rounds: int, block: int, most: int) -> Floats:
    """(most + 1,) the worst sums for 0..most participations, at most one in each whole block.

    That is all that a separation of exactly `block`, a power of two, asks for: every block's first
    round is free whatever came before.
    """
    size = 1 << (rounds - 1).bit_length()
    counts = np.arange(most + 1, dtype=np.float64)
    if size <= block or rounds < block:
        only = np.full(most + 1, -np.inf)
        only[:2] = [0.0, _single(rounds, block)][: most + 1]
        return only
    complete = np.where(counts <= 1, counts * block.bit_length(), -np.inf)
    tail = None  # the worst sums of the rounds after those in complete nodes of this size
    left = rounds % block
    if left:
        tail = np.where(counts <= 1, counts * _single(left, block), -np.inf)
    width = block
    while width < size:
        if rounds // width % 2:
            tail = complete if tail is None else _joined(complete, tail)
        width *= 2
        complete = _joined(complete, complete) + counts**2
    if rounds == size:
        return complete
    assert tail is not None
    return tail


def _single(rounds: int, block: int) -> float:
    """Most complete nodes, no larger than `block`, over one of `rounds` rounds."""
    return float(min(rounds.bit_length(), block.bit_length()))


def _joined(first: Floats, second: Floats) -> Floats:
    """Best sums of two neighbouring parts: max over how the participations are shared out."""
    found = np.full(len(first), -np.inf)
    for here in np.flatnonzero(np.isfinite(first)).tolist():
        found[here:] = np.maximum(found[here:], first[here] + second[: len(first) - here])
    return found


def _worst(rounds: int, apart: int, most: int) -> int:
    """Exact search. A node's options: for each number of participations and each earliest place
    allowed, the (last place, sum) pairs that no other beats in both."""

    @cache
    def options(height: int, present: int, count: int, first: int) -> tuple[_Option, ...]:
        """`present`: how many of the node's 2^height rounds exist. Places count from its first."""
        size = 1 << height
        whole = present == size
        if count == 0:
            return ((-apart, 0),)
        if first >= present:
            return ()
        if height == 0 or (whole and size <= apart):
            return ((first, height + 1),) if count == 1 else ()
        half, found = size // 2, []
        here, there = min(present, half), max(present - half, 0)
        for left in range(count + 1):
            for last, value in options(height - 1, here, left, first):
                start = max(first - half, last + apart - half, 0) if left else max(first - half, 0)
                for end, more in options(height - 1, there, count - left, start):
                    place = end + half if count > left else last
                    found.append((place, value + more + count**2 * whole))
        return _undominated(found)

    height = (rounds - 1).bit_length()
    sums = [v for count in range(most + 1) for _, v in options(height, rounds, count, 0)]
    return max(sums)


def _undominated(options: list[_Option]) -> tuple[_Option, ...]:
    kept: list[_Option] = []
    for place, value in sorted(options, key=lambda option: (option[0], -option[1])):
        if not kept or value > kept[-1][1]:
            kept.append((place, value))
    return tuple(kept)
