"""The audit of a finished run: its attacks against the claims of its ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sottovoce.client.errors import RunError
from sottovoce.privacy.audit.attacks import ATTACKS, Attack, choose_attacks
from sottovoce.privacy.audit.canary_attacks import CANARY_ATTACKS
from sottovoce.privacy.audit.canary_claims import implied_claims, utility_beside
from sottovoce.privacy.audit.canary_view import canaries_of
from sottovoce.privacy.audit.claims import ZERO_OUT, Claim, read_claims
from sottovoce.privacy.audit.device_attacks import DEVICE_ATTACKS, record_of_run
from sottovoce.privacy.audit.device_checks import run_checks
from sottovoce.privacy.audit.leakage import Leakage, Probe
from sottovoce.privacy.audit.material import FinishedRun, Material
from sottovoce.privacy.audit.outcome import AttackResult, Audit, RoundPoint, claim_of, weigh
from sottovoce.privacy.audit.probes import carried_out, choose_probes, other_names
from sottovoce.privacy.audit.settings import DEFAULT_DELTA, AuditConfig, design_of
from sottovoce.privacy.audit.verdict import judge, judge_claim

THREAT_MODEL = (
    "The attacker knows the released models, the population and every candidate's data, and asks "
    "of each candidate: was it in the training data? It sees no update, no sum and no noise."
)
DEVICE_NAMES = [attack.name for attack in DEVICE_ATTACKS]
ATTACKS.update({attack.name: attack for attack in (*CANARY_ATTACKS, *DEVICE_ATTACKS)})
UPDATES = " Probes of updates are of another attacker, who reads what single devices send."


def load_run(folder: Path) -> FinishedRun:
    """The run in `folder`, as `sottovoce.server.runs.load_run` opens it."""
    from sottovoce.server import runs

    return runs.load_run(folder)


def audit_run(
    folder: Path,
    cfg: AuditConfig,
    *,
    load: Callable[[Path], FinishedRun] = load_run,
    probes: Sequence[Probe] = (),
) -> Audit:
    """Attack the run in `folder` and judge its claims; nothing is printed or written.

    `probes`: attacks that read data back, besides those that `cfg.attacks` chooses.
    """
    from sottovoce.privacy import epsilon

    started = time.perf_counter()
    run = load(folder)
    chosen, lacking = choose_probes(cfg.attacks, run)
    probes = [*chosen, *probes]
    named = other_names(cfg.attacks, list(ATTACKS))
    attacks = choose_attacks(named, run, costly=cfg.reference_models > 0) if named else []
    skipped = {attack.name: why for attack in ATTACKS.values() if (why := attack.missing(run))}
    skipped |= {
        attack.name: "off by default, for its cost: reference_models=2 turns it on"
        for attack in ATTACKS.values()
        if attack.optional and attack not in attacks and attack.name not in skipped
    }
    if canaries_of(run) is None:
        ours = {attack.name for attack in CANARY_ATTACKS}
        skipped = {name: why for name, why in skipped.items() if name not in ours}
    if record_of_run(run) is None:  # no attack on canary devices was to be expected
        skipped = {name: why for name, why in skipped.items() if name not in DEVICE_NAMES}
    skipped |= lacking | {probe.name: why for probe in probes if (why := probe.missing(run))}
    if not attacks and not probes:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise RunError(f"{folder} cannot be attacked: {reasons}")
    claims = read_claims(run.ledger, run.summary, epsilon)
    notes: list[str] = []
    if canaries_of(run) is not None:
        claims, notes = implied_claims(claims)
    material = Material(run, devices=cfg.devices, seed=cfg.seed, references=cfg.reference_models)
    tests = max(1, sum(attack.not_comparable(run) is None for attack in attacks))
    results = tuple(carry_out(attack, material, claims, cfg, tests) for attack in attacks)
    findings = [result.finding for result in results]
    record = record_of_run(run)
    checks = () if record is None else run_checks(record, run.ledger)
    leakage = tuple(
        carried_out(probe, run, seed=cfg.seed, confidence=cfg.confidence)
        for probe in probes
        if probe.name not in skipped
    )
    audit = Audit(
        source=folder,
        judgement=judge(claims, findings, checks),
        claims=tuple(claims),
        by_claim=tuple(judge_claim(claim, findings, checks) for claim in claims),
        results=results,
        skipped=skipped,
        confidence=cfg.confidence,
        seed=cfg.seed,
        seconds=time.perf_counter() - started,
        threat_model=threat_model(leakage),
        leakage=leakage,
        checks=checks,
        utility=utility_beside(run.summary, cfg.without),
        notes=tuple(notes),
    )
    return _with_rounds(audit, folder)


def threat_model(leakage: Sequence[Leakage]) -> str:
    """Who attacks, in words."""
    watched = any(found.observer == "fleet" for found in leakage)
    return THREAT_MODEL + (UPDATES if watched else "")


def carry_out(
    attack: Attack, material: Material, claims: Sequence[Claim], cfg: AuditConfig, tests: int
) -> AttackResult:
    """One attack, timed. `tests`: attacks whose bounds are compared, and so hold together."""
    started = time.perf_counter()
    scored = attack.scored(material)
    claim = claim_of(attack, claims)
    design = design_of(cfg, gaussian=claim is not None and claim.gaussian)
    if attack.coins:
        design = replace(design, coins=True)
        if claim is not None and claim.relation == ZERO_OUT:  # who is out says nothing there
            attack = replace(attack, relation=ZERO_OUT)
    return weigh(
        attack, scored, claims,
        delta=_delta(attack.unit, claims),
        confidence=cfg.confidence,
        tests=tests,
        design=design,
        generator=material.generator("coins of " + attack.name),
        invalid=attack.not_comparable(material.run),
        seconds=time.perf_counter() - started,
    )


def _delta(unit: str, claims: Sequence[Claim]) -> float:
    """The delta of the unit's claim; without one, the smallest claimed, else `DEFAULT_DELTA`."""
    stated = {claim.unit: claim.delta for claim in claims if claim.delta is not None}
    return stated.get(unit, min(stated.values(), default=DEFAULT_DELTA))


def _with_rounds(audit: Audit, folder: Path) -> Audit:
    """The audit with the headline claim's epsilon by round, as far as the run recorded it."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return audit
    records: list[dict[str, Any]] = [
        record for record in found if isinstance(record, dict) and "round" in record
    ]
    name = f"epsilon_{audit.headline.unit}"
    known = [(r["round"], r[name]) for r in records if isinstance(r.get(name), int | float)]
    strongest = audit.headline_result
    proved = None
    if strongest is not None and strongest.membership is not None:
        proved = strongest.membership.bound.epsilon
    points = [RoundPoint(int(at), float(theory)) for at, theory in known]
    if points:
        points[-1] = replace(points[-1], bound=proved)
    return replace(audit, rounds=tuple(points))
