"""An audit as data: `audit.json`, and the raw scores beside it.

A bound is `epsilon_lower_bound`, with method, confidence, ceiling and what it assumes; an estimate
is `epsilon_estimate` and says that it is none. Infinite or unknown figures are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from sottovoce.privacy.audit.claims import Claim
from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.power import MODEL
from sottovoce.privacy.audit.roc import Scores
from sottovoce.privacy.audit.verdict import Judgement


def audit_record(audit: Audit) -> dict[str, Any]:
    """What `audit.json` holds, but for the raw scores."""
    judged = list(zip(audit.claims, audit.by_claim, strict=True))
    claims = [_claim(claim, judgement) for claim, judgement in judged]
    return {
        "verdict": str(audit.judgement.verdict),
        "exit_code": audit.judgement.verdict.exit_code,
        "reason": audit.judgement.reason,
        "claim": claims[audit.claims.index(audit.headline)],
        "claims": claims,
        "attacks": [_attack(result, audit.confidence) for result in audit.results],
        "leakage": [found.record() for found in audit.leakage],
        "checks": [check.record() for check in audit.checks],
        "rounds": [
            {"round": p.round, "epsilon": finite(p.theory), "epsilon_lower_bound": p.bound}
            for p in audit.rounds
        ],
        "utility": [vars(one) for one in audit.utility],
        "skipped": audit.skipped,
        "notes": list(audit.notes),
        "threat_model": audit.threat_model,
        "confidence": audit.confidence,
        "bounds_hold": "together over all compared attacks: each at the Bonferroni level",
        "run": str(audit.source),
        "seed": audit.seed,
        "seconds": round(audit.seconds, 3),
        "version": metadata.version("sottovoce"),
    }


def raw_scores(audit: Audit) -> dict[str, Any]:
    """Every candidate's id and score, by attack: what anybody needs to weigh them again."""
    return {
        result.attack.name: {
            "members": _listed(result.scored.member_ids, result.scored.members),
            "non_members": _listed(result.scored.non_member_ids, result.scored.non_members),
        }
        for result in audit.results
    }


def _listed(ids: Sequence[str | int], scores: Scores) -> dict[str, Any]:
    return {"ids": list(ids), "scores": [finite(score) for score in scores]}


def json_text(value: Any, indent: str = "") -> str:
    """JSON with a line for each key, but one line for a list of plain values."""
    text = _pretty(value, indent)
    return text if indent else text + "\n"


def finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _pretty(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(str(key))}: {_pretty(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        lines = [_pretty(item, deeper) for item in value]
        return "[\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _claim(claim: Claim, judgement: Judgement) -> dict[str, Any]:
    return {
        "unit": claim.unit,
        "observer": claim.observer,
        "relation": claim.relation,
        "epsilon": finite(claim.epsilon),
        "delta": claim.delta,
        "epsilon_replace_one": finite(claim.exchanged),
        "mechanism": "gaussian" if claim.gaussian else "any",
        "published_epsilon": finite(claim.published),
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
    }


def _attack(result: AttackResult, confidence: float) -> dict[str, Any]:
    attack, found = result.attack, result.membership
    record: dict[str, Any] = {
        "name": attack.name,
        "unit": attack.unit,
        "observer": attack.observer,
        "relation": attack.relation,
        "sees": attack.sees,
        "cost": attack.cost,
        "valid": result.invalid is None,
        "note": result.invalid or attack.note,
        "n_members": result.members,
        "n_non_members": result.non_members,
        "seconds": round(result.seconds, 3),
        "confidence": confidence,
        "epsilon_claimed": finite(result.claimed),
    }
    if found is None:
        unknown = ("auc", "auc_ci", "epsilon_lower_bound", "ceiling", "method", "detection_power")
        return {**record, **dict.fromkeys(unknown), "tpr_at_fpr": {}}
    bound, guesses, power = found.bound, found.guesses, result.power
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
        "guesses": guesses.made,
        "correct": guesses.correct,
        "detection_power": None if power is None else {
            "against": "half the noise", "perfect_attack": power.perfect,
            "this_attack": power.this, "model": MODEL,
        },
        "epsilon_estimate": finite(found.estimate.epsilon),
        "estimate_method": found.estimate.method + "; an estimate, not a bound",
    }
