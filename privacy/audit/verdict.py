"""The verdict: an attack's lower bound against the epsilon claimed for the same unit and observer.

VIOLATION            a lower bound is above a claim: at least one of the two is wrong; or a check
                     refutes what the claim rests on, such as its noise
NO VIOLATION FOUND   the headline claim could have been refuted by this audit, and was not
INCONCLUSIVE         it could not: even a perfect attack on so many canaries stays below the claim,
                     or no finite epsilon is claimed at all (nothing lies above infinity)
INVALID              the audit cannot be trusted, and says why

None of them says that a model is private. Attacks give lower bounds: what they miss may exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sottovoce.privacy.audit.checks import Check
from sottovoce.privacy.audit.claims import RELATIONS, Claim
from sottovoce.privacy.audit.claims import read_claims as read_claims
from sottovoce.privacy.audit.figures import LowerBound
from sottovoce.privacy.audit.power import Power


class Verdict(StrEnum):
    VIOLATION = "VIOLATION"
    NO_VIOLATION_FOUND = "NO VIOLATION FOUND"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        return {"VIOLATION": 2, "NO VIOLATION FOUND": 0, "INCONCLUSIVE": 4, "INVALID": 3}[self]


@dataclass(frozen=True)
class Finding:
    """One attack's bound beside its claim. `invalid`: why the two may not be compared, or None.

    `relation`: the neighbours that the bound is about. `power`: against half the noise.
    """

    attack: str
    unit: str
    observer: str
    bound: LowerBound | None
    invalid: str | None
    relation: str = "add_remove"
    power: Power | None = None


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str


def headline(claims: Sequence[Claim], findings: Sequence[Finding]) -> Claim:
    """The claim that leads: the first finite one that was attacked, devices before examples."""
    attacked = {finding.unit for finding in findings}
    finite = [claim for claim in claims if claim.finite]
    return next((claim for claim in finite if claim.unit in attacked), (finite or list(claims))[0])


def judge_claim(
    claim: Claim, findings: Sequence[Finding], checks: Sequence[Check] = ()
) -> Judgement:
    """What the findings for the claim's unit and observer say about it."""
    mine = [f for f in findings if (f.unit, f.observer) == (claim.unit, claim.observer)]
    if not claim.finite and claim.contradiction is not None:
        return Judgement(Verdict.INVALID, claim.contradiction)
    if not claim.finite:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"no finite epsilon is claimed per {claim.unit}: there is nothing to refute",
        )
    if claim.projection is not None:
        return Judgement(Verdict.INVALID, claim.projection)
    broken = [
        c for c in checks if c.flagged and (c.unit, c.observer) == (claim.unit, claim.observer)
    ]
    refuting = [check for check in broken if check.violates]
    if refuting:
        return Judgement(Verdict.VIOLATION, f"what the claim rests on is refuted: {refuting[0]}")
    if not mine and not broken:
        return Judgement(Verdict.INCONCLUSIVE, f"no attack per {claim.unit} was run")
    sound = [one for one in (_against(claim, finding) for finding in mine) if one is not None]
    worst = max(sound, key=lambda one: one.bound.epsilon - one.claimed, default=None)
    if worst is not None and worst.bound.epsilon > worst.claimed:
        return Judgement(
            Verdict.VIOLATION,
            f"the attack {worst.attack} certifies epsilon {worst.bound} per {claim.unit}, above "
            f"the claimed {worst.claim_text}: claim or implementation is wrong",
        )
    if broken:
        return Judgement(Verdict.INVALID, f"the run is not what its ledger describes: {broken[0]}")
    if claim.contradiction is not None:
        return Judgement(Verdict.INVALID, claim.contradiction)
    if worst is None:
        why = next((f.invalid for f in mine if f.invalid), "its bound is about other neighbours")
        return Judgement(Verdict.INVALID, f"no usable attack per {claim.unit}: {why}")
    nearest = max(sound, key=lambda one: one.bound.ceiling - one.claimed)
    if nearest.bound.ceiling < nearest.claimed:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"even a perfect attack on so few canaries certifies only {nearest.bound.ceiling:.3g} "
            f"per {claim.unit}, below the claimed {nearest.claim_text}: audit with more canaries, "
            "or a stronger claim",
        )
    strongest = max(sound, key=lambda one: one.bound.epsilon)
    power = "" if strongest.power is None else f"; {strongest.power}"
    return Judgement(
        Verdict.NO_VIOLATION_FOUND,
        f"the strongest attack certifies epsilon {strongest.bound} per {claim.unit}, the claim is "
        f"{strongest.claim_text}{power}; absence of a finding is not proof",
    )


@dataclass(frozen=True)
class _Compared:
    """A usable bound beside the epsilon claimed for its neighbours."""

    attack: str
    bound: LowerBound
    claimed: float
    claim_text: str
    power: Power | None


def _against(claim: Claim, finding: Finding) -> _Compared | None:
    """The finding's bound and what it is held against; None where there is nothing to compare."""
    claimed = claim.for_relation(finding.relation)
    if finding.bound is None or finding.invalid is not None or claimed is None:
        return None
    text = epsilon_text(claimed)
    if finding.relation != claim.relation:
        text += f" ({RELATIONS[finding.relation].format(unit=claim.unit)})"
    return _Compared(finding.attack, finding.bound, claimed, text, finding.power)


def judge(
    claims: Sequence[Claim], findings: Sequence[Finding], checks: Sequence[Check] = ()
) -> Judgement:
    """A violation of any claim if there is one, else what holds for the headline claim.

    No finding counts where summary and ledger disagree about any unit.
    """
    judgements = {claim.unit: judge_claim(claim, findings, checks) for claim in claims}
    for judgement in judgements.values():
        if judgement.verdict is Verdict.VIOLATION:
            return judgement
    for claim in claims:
        if claim.contradiction is not None:
            return judgements[claim.unit]
    return judgements[headline(claims, findings).unit]


def epsilon_text(epsilon: float) -> str:
    """A claimed epsilon, rounded up: a claim may not look better than it is."""
    return f"{math.ceil(epsilon * 100 - 1e-6) / 100:.2f}" if math.isfinite(epsilon) else "∞"
