"""An audit as data (`audit.json`) and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.verdict import Claim, Judgement, Verdict, epsilon_text

COLOURS = {
    Verdict.VIOLATION: "red",
    Verdict.NO_VIOLATION_FOUND: "green",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.INVALID: "red",
}
NATURAL = "natural data are weak canaries: this finds gross leaks and certifies little"
THREAT_MODEL = (
    "The attacker knows the released models, the population and every candidate's data, and asks "
    "of each candidate: was it in the training data? It sees no update, no sum and no noise."
)


def audit_record(audit: Audit) -> dict[str, Any]:
    """What `audit.json` holds; infinite or unknown figures are null."""
    judged = list(zip(audit.claims, audit.by_claim, strict=True))
    claims = [_claim(claim, judgement) for claim, judgement in judged]
    return {
        "verdict": str(audit.judgement.verdict),
        "exit_code": audit.judgement.verdict.exit_code,
        "reason": audit.judgement.reason,
        "claim": claims[audit.claims.index(audit.headline)],
        "claims": claims,
        "attacks": [_attack(result, audit.confidence) for result in audit.results],
        "skipped": audit.skipped,
        "threat_model": THREAT_MODEL,
        "confidence": audit.confidence,
        "bounds_hold": "together over all compared attacks: each at the Bonferroni level",
        "run": str(audit.run),
        "seed": audit.seed,
        "seconds": round(audit.seconds, 3),
        "version": metadata.version("sottovoce"),
    }


def _claim(claim: Claim, judgement: Judgement) -> dict[str, Any]:
    return {
        "unit": claim.unit,
        "observer": claim.observer,
        "epsilon": _finite(claim.epsilon),
        "delta": claim.delta,
        "published_epsilon": _finite(claim.published),
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
    }


def _attack(result: AttackResult, confidence: float) -> dict[str, Any]:
    attack, found = result.attack, result.membership
    record: dict[str, Any] = {
        "name": attack.name,
        "unit": attack.unit,
        "observer": attack.observer,
        "sees": attack.sees,
        "cost": attack.cost,
        "valid": result.invalid is None,
        "note": result.invalid or NATURAL,
        "n_members": result.members,
        "n_non_members": result.non_members,
        "seconds": round(result.seconds, 3),
        "confidence": confidence,
    }
    if found is None:
        unknown = ("auc", "auc_ci", "epsilon_lower_bound", "ceiling", "method")
        return {**record, **dict.fromkeys(unknown), "tpr_at_fpr": {}}
    bound, guesses = found.bound, found.guesses
    return {
        **record,
        "auc": found.auc,
        "auc_ci": list(found.auc_interval),
        "auc_ci_method": "DeLong, logit scale",
        "tpr_at_fpr": {f"{f:g}": rate for f, (rate, _) in found.tpr_at_fpr.items()},
        "tpr_ci": {f"{f:g}": list(interval) for f, (_, interval) in found.tpr_at_fpr.items()},
        "epsilon_lower_bound": bound.epsilon,
        "method": bound.method,
        "assumes": bound.assumes,
        "ceiling": bound.ceiling,
        "test_confidence": bound.confidence,
        "canaries": guesses.canaries,
        "guesses": guesses.as_members + guesses.as_non_members,
        "correct": guesses.correct,
        "epsilon_estimate": _finite(found.estimate.epsilon),
        "estimate_method": found.estimate.method + "; an estimate, not a bound",
    }


def audit_table(audit: Audit) -> Iterator[RenderableType]:
    """The verdict and the table of attacks, theory beside practice."""
    verdict = audit.judgement.verdict
    yield Text(f"{verdict}", style=f"bold {COLOURS[verdict]}")
    yield Text(f"{audit.judgement.reason}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("attack\nunit, observer, seconds", no_wrap=True)
    for heading in ("ε\nclaimed", "ε at\nleast", "ceiling", "AUC", "TPR at\n1 % FPR"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in audit.results:
        name, unit, observer, claimed, proved, ceiling, auc, rate, seconds = attack_cells(
            audit, result
        )
        about = f"{name}\n  {unit}, {observer}, {seconds} s"
        two_lines = (cell.replace(" [", "\n[") for cell in (auc, rate))
        table.add_row(about, claimed, proved, ceiling, *two_lines)
    yield table
    yield Text("\n" + "\n".join(audit_notes(audit)), style="dim")


def attack_cells(audit: Audit, result: AttackResult) -> list[str]:
    """An attack in words: name, unit, observer, claim, bound, ceiling, AUC, rate, seconds."""
    attack, found = result.attack, result.membership
    claim = next(c for c in audit.claims if c.unit == attack.unit)
    claimed = epsilon_text(claim.epsilon) if result.invalid is None else "–"
    cells = [attack.name, attack.unit, attack.observer, claimed]
    if found is None:
        return [*cells, *["–"] * 4, f"{result.seconds:.1f}"]
    low, high = found.auc_interval
    rate, (least, most) = found.tpr_at_fpr[0.01]
    return [
        *cells,
        str(found.bound),
        f"{math.floor(found.bound.ceiling * 100) / 100:.2f}",
        f"{found.auc:.3f} [{low:.2f}, {high:.2f}]",
        f"{rate:.3f} [{least:.2f}, {most:.2f}]",
        f"{result.seconds:.1f}",
    ]


def audit_notes(audit: Audit) -> list[str]:
    """What a reader of the table must know."""
    percent = f"{100 * audit.confidence:g} %"
    notes = [
        f"Lower bounds hold together with {percent} confidence, each interval alone.",
        "Ceiling: what a perfect attack on as many canaries would certify.",
        "Observer release sees every released model, nothing else of the training.",
        f"{NATURAL[0].upper()}{NATURAL[1:]}.",
    ]
    notes += [f"{r.attack.name}: not compared, {r.invalid}." for r in audit.results if r.invalid]
    notes += [f"{name}: left out, {why}." for name, why in audit.skipped.items()]
    return notes


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
