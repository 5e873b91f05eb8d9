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

*Guarantee*: with the noise and rates of the events, what was released is (epsilon, delta)-DP for
the unit, relation and observer asked for: `pld` and `rdp` are upper bounds (rounding of `pld` is
covered by a measured margin, see `sottovoce.privacy.losses`); `prv` is a cross-check only.
*Assumes*: the events tell what was run: secret independent coins at public rates, fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, get_args

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.composition import NON_PRIVATE, Composition, Tally, dominates
from sottovoce.privacy.events import Event, GaussianEvent, NonPrivateRelease
from sottovoce.privacy.ledger import Ledger
from sottovoce.privacy.losses import pld_epsilon, prv_epsilon, rdp_epsilon

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

    0 where nothing was released; inf where something came without noise, or where nothing was
    recorded that protects `unit` against `observer`.

    Raises ConfigError for delta outside (0, 1), unknown names, or units that would be mixed.
    """
    check_delta(delta)
    tally = Tally(events_of(source))
    unit, observer = tally.resolve(unit, observer)
    found = tally.compositions(unit, observer)
    if level is not None:
        found = {level: tally.composition(unit, observer, level)}
    return worst(found, delta, accountant)[0]


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
    tally = Tally(ledger)
    unit, observer = tally.resolve(unit, observer)
    levels = sorted(tally.levels(unit) | set(ledger.levels))
    if not levels:
        return []
    found: dict[int | None, Composition] = {
        level: tally.composition(unit, observer, level) for level in levels
    }
    highest, at = worst(found, delta, accountant)
    devices: dict[int | None, int] = {level: count for level, count in ledger.levels.items()}
    if devices:
        found = {lv: steps for lv, steps in found.items() if lv in devices or lv == at}
    return [
        {
            "level": level,
            "devices": devices.get(level),
            "sampling_rate": tally.rate(unit, level),
            "epsilon": highest
            if level == at
            else min(highest, composition_epsilon(steps, delta, accountant, NEARLY)),
        }
        for level, steps in found.items()
    ]


def worst(
    found: Mapping[int | None, Composition], delta: float, accountant: str, tolerance: float = 0.0
) -> tuple[float, int | None]:
    """The largest epsilon of several levels, and its level.

    A level that plainly costs no more than one already seen is passed over, and so is one whose
    RDP bound is below: usually one PLD is computed for all.
    """
    if NON_PRIVATE in found.values():
        return math.inf, next(level for level, steps in found.items() if steps == NON_PRIVATE)
    ceiling = {level: _ceiling(steps, delta, accountant) for level, steps in found.items()}
    best, at = -1.0, None
    for level in sorted(found, key=lambda key: ceiling[key], reverse=True):
        if best >= 0 and (ceiling[level] <= best or dominates(found[at], found[level])):
            continue
        value = composition_epsilon(found[level], delta, accountant, tolerance)
        if value > best:
            best, at = value, level
    return best, at


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
    return (source,) if isinstance(source, GaussianEvent | NonPrivateRelease) else source
