"""The verdict: an attack's lower bound against the epsilon claimed for the same unit and observer.

VIOLATION            a lower bound is above a claim: at least one of the two is wrong
NO VIOLATION FOUND   the headline claim could have been refuted by this audit, and was not
INCONCLUSIVE         it could not: even a perfect attack on so many canaries stays below the claim,
                     or no finite epsilon is claimed at all (nothing lies above infinity)
INVALID              the audit cannot be trusted, and says why

None of them says that a model is private. Attacks give lower bounds: what they miss may exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sottovoce.privacy.audit.bounds import LowerBound

UNITS = ("device", "example")
OBSERVER = "release"
_MOST_DISAGREEMENT = 0.02

Accountant = Callable[..., float]


class Verdict(StrEnum):
    VIOLATION = "VIOLATION"
    NO_VIOLATION_FOUND = "NO VIOLATION FOUND"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        return {"VIOLATION": 2, "NO VIOLATION FOUND": 0, "INCONCLUSIVE": 4, "INVALID": 3}[self]


@dataclass(frozen=True)
class Claim:
    """What a run claims for one unit and observer. `epsilon` is inf where nothing is claimed.

    `published`: the epsilon in the run's summary, None where it states none. The ledger's is what
    counts; a summary that promises less than its own ledger makes the audit invalid.
    """

    unit: str
    observer: str
    epsilon: float
    delta: float | None
    published: float | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.epsilon)

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


@dataclass(frozen=True)
class Finding:
    """One attack's bound beside its claim. `invalid`: why the two may not be compared, or None."""

    attack: str
    unit: str
    observer: str
    bound: LowerBound | None
    invalid: str | None


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str


def read_claims(ledger: Any, summary: dict[str, Any], epsilon: Accountant) -> list[Claim]:
    """The claims of a run, device first, for who sees every released model.

    `ledger`: a `sottovoce.privacy.Ledger`. `epsilon(ledger, delta, unit=, observer=)` is the
    accountant. A unit that no event of the ledger names, or without a delta, has no claim.
    """
    claims = []
    for unit in UNITS:
        stated = (summary.get("epsilon") or {}).get(unit) or {}
        delta = stated.get("delta") or ledger.deltas.get(unit)
        if delta is None or unit not in ledger.units:
            claims.append(Claim(unit, OBSERVER, math.inf, delta))
            continue
        spent = float(epsilon(ledger, float(delta), unit=unit, observer=OBSERVER))
        published = stated.get("epsilon")
        stands = None if published is None else float(published)
        claims.append(Claim(unit, OBSERVER, spent, float(delta), stands))
    return claims


def headline(claims: Sequence[Claim], findings: Sequence[Finding]) -> Claim:
    """The claim that leads: the first finite one that was attacked, devices before examples."""
    attacked = {finding.unit for finding in findings}
    finite = [claim for claim in claims if claim.finite]
    return next((claim for claim in finite if claim.unit in attacked), (finite or list(claims))[0])


def judge_claim(claim: Claim, findings: Sequence[Finding]) -> Judgement:
    """What the findings for the claim's unit and observer say about it."""
    mine = [f for f in findings if (f.unit, f.observer) == (claim.unit, claim.observer)]
    sound = [(f.attack, f.bound) for f in mine if f.bound is not None and f.invalid is None]
    sound.sort(key=lambda pair: -pair[1].epsilon)
    if not claim.finite:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"no finite epsilon is claimed per {claim.unit}: there is nothing to refute",
        )
    if not mine:
        return Judgement(Verdict.INCONCLUSIVE, f"no attack per {claim.unit} was run")
    if sound and sound[0][1].epsilon > claim.epsilon:
        attack, bound = sound[0]
        return Judgement(
            Verdict.VIOLATION,
            f"the attack {attack} certifies epsilon {bound} per {claim.unit}, above the claimed "
            f"{epsilon_text(claim.epsilon)}: claim or implementation is wrong",
        )
    if claim.contradiction is not None:
        return Judgement(Verdict.INVALID, claim.contradiction)
    if not sound:
        why = next(f.invalid for f in mine if f.invalid)
        return Judgement(Verdict.INVALID, f"no usable attack per {claim.unit}: {why}")
    ceiling = max(bound.ceiling for _, bound in sound)
    if ceiling < claim.epsilon:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"even a perfect attack on so few canaries certifies only {ceiling:.3g} per "
            f"{claim.unit}, below the claimed {epsilon_text(claim.epsilon)}: raise devices=, or "
            "audit a stronger claim",
        )
    return Judgement(
        Verdict.NO_VIOLATION_FOUND,
        f"the strongest attack certifies epsilon {sound[0][1]} per {claim.unit}, the claim is "
        f"{epsilon_text(claim.epsilon)}; absence of a finding is not proof",
    )


def judge(claims: Sequence[Claim], findings: Sequence[Finding]) -> Judgement:
    """A violation of any claim if there is one, else what holds for the headline claim."""
    judgements = {claim.unit: judge_claim(claim, findings) for claim in claims}
    for judgement in judgements.values():
        if judgement.verdict is Verdict.VIOLATION:
            return judgement
    return judgements[headline(claims, findings).unit]


def epsilon_text(epsilon: float) -> str:
    """A claimed epsilon, rounded up: a claim may not look better than it is."""
    return f"{math.ceil(epsilon * 100 - 1e-6) / 100:.2f}" if math.isfinite(epsilon) else "∞"
