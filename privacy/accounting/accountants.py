"""Epsilon of a ledger: for one unit, one observer, one activity level or the worst of all.

`pld`  privacy loss distributions by Google's dp-accounting (connect-the-dots, Doroshenko et al.
       2022, arXiv:2207.04380), pessimistic estimates only: the figure that is reported. The exact
       one of Balle and Wang 2018, arXiv:1805.06530, where nothing is sampled.
`rdp`  Renyi DP by dp-accounting (Mironov et al. 2019, arXiv:1908.10530): looser, independent.
`prv`  Opacus' PRV accountant (Gopi et al. 2021, arXiv:2106.02848): a second opinion.

Poisson sampling. For a unit drawn by a secret coin of probability q the pair is (1-q) N(0) + q N(1)
against N(0), for removing its contribution as for zeroing it, *as long as the noise does not depend
on whether the unit takes part*. A device that adds noise of its own when it takes part breaks that:
over many coordinates the spread of the sum shows that it took part, the sample is no secret, and
the amplification is gone. In the worst case the coin c is seen, and the pair is (c, N(c)) against
(c, N(0)): with probability 1-q nothing, with probability q a plain Gaussian. This pair dominates
under zero-out: given c = 1 and own noise n, the outputs N(n + s(n)) and N(n) are no further apart
than N(1) and N(0), and divergences are jointly convex over n. So `zero_out` with Poisson sampling
is accounted by it. A mechanism whose total noise is the same whoever takes part (own noise topped
up to a constant) has the first pair and may record `add_remove`.

Poisson sampling under replace-one: dp-accounting's pair, (1-q) N(0) + q N(1) against (1-q) N(0) +
q N(-1), by `pld` only. Fixed size without replacement, under replace-one with twice the
sensitivity: `rdp` by Wang et al. 2019, arXiv:1808.00087, theorem 27; `pld` is the smaller of that
bound and of composition without any amplification.

A randomised report of pure epsilon is no likelier to tell two values apart than one coin that lies
with probability 1 / (1 + e^epsilon) (Kairouz et al. 2015, arXiv:1311.0776): that pair is composed.

Groups of devices (gateways) with nothing in common compose in parallel: the worst group counts.

*Guarantee*: with the noise and rates of the events, what was released is (epsilon, delta)-DP for
the unit, relation and observer asked for: `pld` and `rdp` are upper bounds (rounding of `pld` is
covered by a measured margin, see `sottovoce.privacy.accounting.losses`); `prv` is a cross-check.
*Assumes*: the events tell what was run: secret independent coins at public rates, fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.composition import (
    NON_PRIVATE,
    Composition,
    Place,
    Tally,
    dominates,
)
from sottovoce.privacy.accounting.events import (
    Event,
    GaussianEvent,
    NonPrivateRelease,
    RandomisedReport,
)
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.losses import pld_epsilon, prv_epsilon, rdp_epsilon

Accountant = Literal["pld", "rdp", "prv"]
ACCOUNTANTS: tuple[Accountant, ...] = get_args(Accountant)
Source = Ledger | Event | Iterable[Event]

NEARLY = 1e-3
"""Tolerance of figures that must be quick: never too small, at most about 0.1 % too large."""


def epsilon(
    source: Source,
    delta: float,
    *,
    unit: str | None = None,
    observer: str | None = None,
    accountant: str = "pld",
    level: int | None = None,
) -> float:
    """Epsilon of all that a ledger (or some events) released, at `delta`.

    `unit`: `device` or `example`; may be left out where all events are about one. `observer`:
    `release`, `server` or `fleet`; where left out, the only one that events name, else `release`.
    `level`: of devices at that activity level; where left out, at the worst level.

    0 where nothing was released, yet or ever; inf where something came without noise, or where
    nothing was recorded that protects `unit` against `observer`. A ledger that states a delta for a
    unit promises to record whatever is released about it.

    Raises ConfigError for delta outside (0, 1), unknown names, or units that would be mixed.
    """
    check_delta(delta)
    tally = source.tally if isinstance(source, Ledger) else Tally(events_of(source))
    unit, observer = tally.resolve(unit, observer)
    if untouched(source, tally, unit, observer):
        return 0.0
    return worst(tally.compositions(unit, observer, level), delta, accountant)[0]


def untouched(source: Source, tally: Tally, unit: str, observer: str) -> bool:
    """Whether `source` is a ledger that protects `unit` but has no release about it so far."""
    promised = isinstance(source, Ledger) and unit in source.deltas
    return promised and not tally.touched(unit, observer)


def by_level(
    ledger: Ledger,
    delta: float,
    unit: str | None = None,
    observer: str | None = None,
    accountant: str = "pld",
) -> list[dict[str, Any]]:
    """`{level, devices, sampling_rate, epsilon}` for each activity level, lightest first.

    Levels are those that the ledger counts devices at, and the worst one; where it counts none,
    those that its events list, with `devices` None. The worst level's epsilon is the headline's;
    others may be up to 0.1 % too large.
    """
    check_delta(delta)
    tally = ledger.tally
    unit, observer = tally.resolve(unit, observer)
    levels = sorted(tally.levels(unit) | set(ledger.levels))
    if not levels or untouched(ledger, tally, unit, observer):
        return []
    found: dict[Place, Composition] = {}
    for level in levels:
        found |= tally.compositions(unit, observer, level)
    highest, at = worst(found, delta, accountant)
    worst_level = at[0] if at else None
    shown = [lv for lv in levels if not ledger.levels or lv in ledger.levels or lv == worst_level]
    return [
        {
            "level": level,
            "devices": ledger.levels.get(level),
            "sampling_rate": tally.rate(unit, level),
            "epsilon": highest
            if level == worst_level
            else min(highest, _nearly(level, found, delta, accountant)),
        }
        for level in shown
    ]


def _nearly(
    level: int, found: Mapping[Place, Composition], delta: float, accountant: str
) -> float:
    """Epsilon of the worst group at `level`, at most about 0.1 % too large."""
    return max(
        composition_epsilon(steps, delta, accountant, NEARLY)
        for (at, _), steps in found.items()
        if at == level
    )


def worst(
    found: Mapping[Place, Composition], delta: float, accountant: str, tolerance: float = 0.0
) -> tuple[float, Place | None]:
    """The largest epsilon of several levels, and its place (None where there are none).

    A level that plainly costs no more than one already seen is passed over, and so is one whose
    RDP bound is below: usually one PLD is computed for all.
    """
    if NON_PRIVATE in found.values():
        return math.inf, next(place for place, steps in found.items() if steps == NON_PRIVATE)
    ceiling = {place: _ceiling(steps, delta, accountant) for place, steps in found.items()}
    best, at = -1.0, None
    for place in sorted(found, key=lambda key: ceiling[key], reverse=True):
        if at is not None and (ceiling[place] <= best or dominates(found[at], found[place])):
            continue
        value = composition_epsilon(found[place], delta, accountant, tolerance)
        if value > best:
            best, at = value, place
    return max(best, 0.0), at


@lru_cache(maxsize=4096)
def composition_epsilon(
    steps: Composition, delta: float, accountant: str = "pld", tolerance: float = 0.0
) -> float:
    """Epsilon of one composition. `tolerance`: see `pld_epsilon`."""
    if not steps:
        return 0.0
    if steps == NON_PRIVATE:
        return math.inf
    if accountant == "pld":
        return pld_epsilon(steps, delta, tolerance)
    if accountant == "rdp":
        return rdp_epsilon(steps, delta)
    if accountant == "prv":
        return prv_epsilon(steps, delta)
    raise ConfigError(f"accountant={accountant!r} is unknown: use one of {', '.join(ACCOUNTANTS)}")


def check_delta(delta: float) -> None:
    """Raise ConfigError unless 0 < delta < 1."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta={delta} must be above 0 and below 1, best below 1/devices")


@lru_cache(maxsize=4096)
def _ceiling(steps: Composition, delta: float, accountant: str) -> float:
    """A quick bound that `accountant`'s figure stays below; inf where there is none."""
    if not steps:
        return 0.0
    return math.inf if accountant == "prv" else rdp_epsilon(steps, delta, quick=True)


def events_of(source: Source) -> Iterable[Event]:
    """The events of a ledger, of an iterable, or the one event."""
    single = isinstance(source, GaussianEvent | RandomisedReport | NonPrivateRelease)
    return (source,) if single else source  # type: ignore[return-value]
