"""What an audit found, before it is shown: one result per attack, and the judgement over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sottovoce.privacy.audit.attacks import Attack
from sottovoce.privacy.audit.membership import Membership
from sottovoce.privacy.audit.verdict import Claim, Finding, Judgement, headline


@dataclass(frozen=True)
class AttackResult:
    """What one attack found. `membership` is None where its scores could not be measured.

    `invalid`: why its bound may not be held against a claim, None where it may.
    """

    attack: Attack
    membership: Membership | None
    invalid: str | None
    members: int
    non_members: int
    seconds: float

    @property
    def finding(self) -> Finding:
        bound = None if self.membership is None else self.membership.bound
        return Finding(
            self.attack.name, self.attack.unit, self.attack.observer, bound, self.invalid
        )


@dataclass(frozen=True)
class Audit:
    """A whole audit. `confidence` holds for all its bounds together."""

    run: Path
    judgement: Judgement
    claims: tuple[Claim, ...]
    by_claim: tuple[Judgement, ...]
    results: tuple[AttackResult, ...]
    skipped: dict[str, str]
    confidence: float
    seed: int
    seconds: float

    @property
    def headline(self) -> Claim:
        return headline(self.claims, [result.finding for result in self.results])
