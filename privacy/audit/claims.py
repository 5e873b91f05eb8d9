"""What a run claims: an epsilon for a unit, an observer and the neighbours that it tells apart.

An attack's bound is about neighbours too. Canaries that were in or out by their own coins test
add/remove. Training data against held-out data tests exchanging one unit for another, which moves a
clipped sum by up to twice as much: that bound may only be held against the epsilon of the same
releases under replace-one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sottovoce.privacy.audit.settings import UNITS

if TYPE_CHECKING:
    from sottovoce.privacy.accounting.events import Event

OBSERVER = "release"
ADD_REMOVE, REPLACE_ONE, ZERO_OUT = "add_remove", "replace_one", "zero_out"
RELATIONS = {
    ADD_REMOVE: "with or without one {unit}",
    ZERO_OUT: "with or without the data of one {unit}",
    REPLACE_ONE: "one {unit} exchanged for another",
}
_MOST_DISAGREEMENT = 0.02

Accountant = Callable[..., float]


@dataclass(frozen=True)
class Claim:
    """What a run claims for one unit and observer. `epsilon` is inf where nothing is claimed.

    `published`: the epsilon in the run's summary, None where it states none. The ledger's is what
    counts; a summary that promises less than its own ledger makes the audit invalid. `exchanged`:
    epsilon of the same releases if one unit is exchanged for another, None where unknown.
    `gaussian`: all of them are Gaussian mechanisms without sampling. `projection`: why this run
    itself does not have the epsilon that it states, None where it has.
    """

    unit: str
    observer: str
    epsilon: float
    delta: float | None
    published: float | None = None
    relation: str = ADD_REMOVE
    exchanged: float | None = None
    gaussian: bool = False
    projection: str | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.epsilon)

    def for_relation(self, relation: str) -> float | None:
        """The epsilon that a bound about neighbours of `relation` is held against, or None."""
        if relation == self.relation or not self.finite:
            return self.epsilon
        return self.exchanged if relation == REPLACE_ONE else None

    @property
    def contradiction(self) -> str | None:
        """How the summary contradicts the ledger, None where it does not."""
        if self.published is None or not math.isfinite(self.published):
            return None
        if self.epsilon <= self.published * (1 + _MOST_DISAGREEMENT):
            return None
        return (
            f"the summary states epsilon {self.published:.4g} per {self.unit}, the ledger gives "
            f"{self.epsilon:.4g}"
        )


def read_claims(ledger: Any, summary: dict[str, Any], epsilon: Accountant) -> list[Claim]:
    """The claims of a run, device first, for who sees every released model.

    `ledger`: a `sottovoce.privacy.Ledger`. `epsilon(ledger, delta, unit=, observer=)` is the
    accountant. A unit that no event of the ledger names, or without a delta, has no claim.
    """
    return [_read_claim(unit, ledger, summary, epsilon) for unit in UNITS]


def exchanging(events: list[Event], unit: str) -> list[Event]:
    """The events, with those about `unit` under replace-one.

    A Poisson sample under zero-out may be no secret (`sottovoce.privacy.accounting.accountants`):
    it is taken as no sample at all, which can only raise epsilon.
    """
    return [_exchanging(event) if event.unit == unit else event for event in events]


def _exchanging(event: Event) -> Event:
    from sottovoce.privacy.accounting.events import GaussianEvent, NonPrivateRelease

    if isinstance(event, NonPrivateRelease):
        return event
    if not isinstance(event, GaussianEvent):
        return replace(event, relation="replace_one")
    if (event.sampling, event.relation) != ("poisson", "zero_out"):
        return replace(event, relation="replace_one")
    certain = None if event.by_level is None else tuple((at, 1.0, n) for at, _, n in event.by_level)
    return replace(
        event, relation="replace_one", sampling="none", sampling_rate=1.0, by_level=certain
    )


def _read_claim(unit: str, ledger: Any, summary: dict[str, Any], epsilon: Accountant) -> Claim:
    stated = (summary.get("epsilon") or {}).get(unit) or {}
    delta = stated.get("delta") or ledger.deltas.get(unit)
    if delta is None or unit not in ledger.units:
        return Claim(unit, OBSERVER, math.inf, delta, published=_published(stated))
    spent = float(epsilon(ledger, float(delta), unit=unit, observer=OBSERVER))
    exchanged = math.inf
    if math.isfinite(spent):
        events = exchanging(list(ledger.events), unit)
        exchanged = max(spent, float(epsilon(events, float(delta), unit=unit, observer=OBSERVER)))
    return Claim(
        unit, OBSERVER, spent, float(delta),
        published=_published(stated),
        relation=ledger.tally.relation(unit),
        exchanged=exchanged,
        gaussian=_is_gaussian(ledger, unit),
        projection=_projection(ledger),
    )


def _published(stated: dict[str, Any]) -> float | None:
    """The epsilon in the summary, None where it states none."""
    found = stated.get("epsilon")
    return None if found is None else float(found)


def _projection(ledger: Any) -> str | None:
    """What the ledger of a projection (`sottovoce.strategies.projection`) says of itself."""
    said = getattr(ledger, "claims", {}).get("projection")
    if not said:
        return None
    whose = "a larger cohort than was simulated"
    if isinstance(said, dict):
        whose = (f"cohorts of {said['noise_cohort_size']} devices, of which {said['cohort_size']} "
                 "were simulated")
    return (f"projection: noise and epsilon are those of {whose}; this run itself does not have "
            "this epsilon, and no attack on it could test the claim")


def _is_gaussian(ledger: Any, unit: str) -> bool:
    """Whether every level is subjected to Gaussian mechanisms without sampling, and nothing else.

    Their composition is Gaussian (arXiv:1905.02383, Corollary 3.3), whatever each adapts to.
    """
    found = ledger.tally.compositions(unit, OBSERVER).values()
    steps = [step for composition in found for step, _ in composition]
    return bool(steps) and all(step.kind == "none" and step.noise > 0 for step in steps)
