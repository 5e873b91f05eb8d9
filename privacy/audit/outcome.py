"""What an audit found, before it is shown: one result per attack, and the judgement over them.

Attacks end in one of two ways. Membership attacks score candidates, and scores become a lower bound
(`AttackResult`). Attacks that read data back, and probes, find a `Leakage`, which no verdict holds
against an epsilon. Both name unit and observer, and what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sottovoce.privacy.audit.checks import Check
from sottovoce.privacy.audit.claims import REPLACE_ONE, Claim
from sottovoce.privacy.audit.design import Design
from sottovoce.privacy.audit.membership import Membership, measure
from sottovoce.privacy.audit.power import Power, half_noise_power
from sottovoce.privacy.audit.roc import Scores
from sottovoce.privacy.audit.verdict import Finding, Judgement, headline

if TYPE_CHECKING:
    from sottovoce.privacy.audit.leakage import Leakage

NATURAL = "natural data are weak canaries: this finds gross leaks and certifies little"


@dataclass(frozen=True)
class Facts:
    """What is said of an attack beside its figures.

    `unit`: whose membership. `observer`: who sees as much as the attack needs. `sees`, `cost`: the
    same in words for the report. `relation`: the neighbours that its members and non-members are.
    `coins`: whether each candidate had a fair coin of its own.
    """

    name: str
    unit: str
    observer: str
    sees: str
    cost: str
    relation: str = REPLACE_ONE
    note: str = NATURAL
    coins: bool = False


@dataclass(frozen=True)
class Scored:
    """Scores of members and non-members, higher for "member", with an id for each."""

    members: Scores
    non_members: Scores
    member_ids: Sequence[str | int]
    non_member_ids: Sequence[str | int]


@dataclass(frozen=True)
class AttackResult:
    """What one attack found. `membership` is None where its scores could not be measured.

    `claimed`: the epsilon that its bound is held against, None where there is none. `invalid`: why
    its bound may not be held against a claim, None where it may.
    """

    attack: Facts
    scored: Scored
    membership: Membership | None
    claimed: float | None
    invalid: str | None
    power: Power | None
    seconds: float

    @property
    def members(self) -> int:
        return len(self.scored.members)

    @property
    def non_members(self) -> int:
        return len(self.scored.non_members)

    @property
    def finding(self) -> Finding:
        bound = None if self.membership is None else self.membership.bound
        return Finding(
            self.attack.name, self.attack.unit, self.attack.observer, bound, self.invalid,
            self.attack.relation, self.power,
        )


@dataclass(frozen=True)
class RoundPoint:
    """Epsilon by theory after a round, and what attacks proved there, None where none was made."""

    round: int
    theory: float
    bound: float | None = None


@dataclass(frozen=True)
class Utility:
    """A metric of the run as it was, and of the same run without canaries."""

    metric: str
    with_canaries: float
    without: float


@dataclass(frozen=True)
class Audit:
    """A whole audit. `confidence` holds for all its bounds together.

    `source`: the run's folder or the file of scores. `rounds`: theory against practice over the
    run. `leakage`: what extraction and probes found. `utility`: what canaries cost.
    `checks`: of what the claims take for granted.
    """

    source: Path
    judgement: Judgement
    claims: tuple[Claim, ...]
    by_claim: tuple[Judgement, ...]
    results: tuple[AttackResult, ...]
    skipped: dict[str, str]
    confidence: float
    seed: int
    seconds: float
    threat_model: str
    rounds: tuple[RoundPoint, ...] = ()
    leakage: tuple[Leakage, ...] = ()
    utility: tuple[Utility, ...] = ()
    notes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def headline(self) -> Claim:
        return headline(self.claims, [result.finding for result in self.results])

    @property
    def headline_result(self) -> AttackResult | None:
        """The usable attack on the headline claim that proves most."""
        claim = self.headline
        sound = [
            r for r in self.results
            if r.membership is not None and r.invalid is None and claim_of(r.attack, [claim])
        ]
        return max(sound, key=_proved, default=None)


def _proved(result: AttackResult) -> float:
    assert result.membership is not None
    return result.membership.bound.epsilon


def claim_of(facts: Facts, claims: Sequence[Claim]) -> Claim | None:
    """The claim for the attack's unit and observer, None where there is none."""
    same = (c for c in claims if (c.unit, c.observer) == (facts.unit, facts.observer))
    return next(same, None)


def weigh(
    facts: Facts,
    scored: Scored,
    claims: Sequence[Claim],
    *,
    delta: float,
    confidence: float,
    tests: int,
    design: Design,
    generator: np.random.Generator,
    invalid: str | None,
    seconds: float,
) -> AttackResult:
    """What an attack's scores amount to, beside its claim.

    `tests`: attacks whose bounds are compared, and so hold together. `invalid`: a reason known
    beforehand not to compare; scores that cannot be measured are another.
    """
    claim = claim_of(facts, claims)
    claimed = None if claim is None else claim.for_relation(facts.relation)
    if invalid is None and claim is not None and claimed is None:
        invalid = "its bound is about other neighbours than the claim"
    found, power = None, None
    try:
        found = measure(
            scored.members, scored.non_members, delta=delta, confidence=confidence,
            generator=generator, tests=tests, design=design,
        )
    except ValueError as error:
        invalid = str(error)
    if found is not None and invalid is None and claimed is not None:
        power = half_noise_power(
            canaries=found.guesses.drawn, claimed=claimed, delta=delta,
            confidence=found.bound.confidence, separation=found.separation, design=design,
        )
    return AttackResult(facts, scored, found, claimed, invalid, power, seconds)
