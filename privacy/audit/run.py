"""`sottovoce audit run=RUN`: attack a finished run and put the number beside the theory.

Loads the run folder, lets the attacks score members and non-members, turns scores into lower
bounds on epsilon, compares them with what the ledger claims, and writes `audit.json` and
`audit.html` into the folder. The exit code is the verdict's (`sottovoce.privacy.audit.verdict`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.privacy.audit.attacks import ATTACKS, Attack, choose_attacks
from sottovoce.privacy.audit.material import FinishedRun, Material
from sottovoce.privacy.audit.membership import measure
from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.record import audit_record, audit_table
from sottovoce.privacy.audit.verdict import Claim, judge, judge_claim, read_claims

DEFAULT_DELTA = 1e-6


@dataclass
class AuditConfig:
    """`run`: the folder of a finished run. `attacks`: "default" or names from `ATTACKS`.

    `devices`: at most so many members and non-members each. `seed` draws them and the coins.
    """

    run: str | None = None
    attacks: Any = "default"
    format: str = "table"
    devices: int = 1000
    confidence: float = 0.95
    seed: int = 0


def run_audit(
    cfg: AuditConfig, *, load: Callable[[Path], FinishedRun] | None = None
) -> int:
    """Audit the run in `cfg.run`, print the outcome, write `audit.json` and `audit.html`.

    `load` opens a run folder (default: `sottovoce.server.runs.load_run`). Returns the exit code:
    0 no violation found, 2 violation, 3 invalid, 4 inconclusive. Raises ConfigError for impossible
    settings and RunError for a folder that is not a finished run.
    """
    from sottovoce.privacy.audit.page import render_page

    folder = check_config(cfg)
    result = audit((load or _load_run)(folder), folder, cfg)
    record = audit_record(result)
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    _write(folder / "audit.json", text)
    _write(folder / "audit.html", render_page(result))
    if cfg.format == "json":
        print(text, end="")
    else:
        console = Console()
        for part in audit_table(result):
            console.print(part)
    return result.judgement.verdict.exit_code


def audit(run: FinishedRun, folder: Path, cfg: AuditConfig) -> Audit:
    """Attack `run` and judge its claims; nothing is printed or written."""
    from sottovoce.privacy import epsilon

    started = time.perf_counter()
    attacks = choose_attacks(cfg.attacks, run)
    skipped = {name: why for name, a in ATTACKS.items() if (why := a.missing(run)) is not None}
    if not attacks:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise RunError(f"{folder} cannot be attacked: {reasons}")
    claims = read_claims(run.ledger, run.summary, epsilon)
    material = Material(run, devices=cfg.devices, seed=cfg.seed)
    tests = max(1, sum(attack.not_comparable(run) is None for attack in attacks))
    results = [carry_out(a, material, claims, cfg.confidence, tests) for a in attacks]
    findings = [result.finding for result in results]
    return Audit(
        run=folder,
        judgement=judge(claims, findings),
        claims=tuple(claims),
        by_claim=tuple(judge_claim(claim, findings) for claim in claims),
        results=tuple(results),
        skipped=skipped,
        confidence=cfg.confidence,
        seed=cfg.seed,
        seconds=time.perf_counter() - started,
    )


def carry_out(
    attack: Attack, material: Material, claims: Sequence[Claim], confidence: float, tests: int
) -> AttackResult:
    """One attack, timed. `tests`: attacks whose bounds are compared, and so hold together."""
    started = time.perf_counter()
    members, non_members = attack.scores(material)
    invalid = attack.not_comparable(material.run)
    membership = None
    try:
        membership = measure(
            members,
            non_members,
            delta=_delta(attack.unit, claims),
            confidence=confidence,
            generator=material.generator("coins of " + attack.name),
            tests=tests,
        )
    except ValueError as error:
        invalid = str(error)
    return AttackResult(
        attack=attack,
        membership=membership,
        invalid=invalid,
        members=len(members),
        non_members=len(non_members),
        seconds=time.perf_counter() - started,
    )


def check_config(cfg: AuditConfig) -> Path:
    """The run folder. Raises ConfigError or RunError naming the value and the remedy."""
    if not cfg.run:
        raise ConfigError("run= is missing: give the folder of a finished run, run=runs/…")
    if cfg.format not in ("table", "json"):
        raise ConfigError(f"format={cfg.format} is unknown: choose table or json")
    if cfg.devices < 1:
        raise ConfigError(f"devices={cfg.devices} must be at least 1: 1000 is usual")
    if not 0 < cfg.confidence < 1:
        raise ConfigError(f"confidence={cfg.confidence} must be between 0 and 1: 0.95 is usual")
    if cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed} must be 0 or more")
    folder = Path(cfg.run).expanduser()
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is not a run folder (no config.yaml): give one that "
                       "`sottovoce simulate` wrote")
    for name in ("model.safetensors", "ledger.json", "summary.json"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} is not finished (no {name}): "
                           f"`sottovoce simulate resume={folder}` ends it")
    return folder


def _load_run(folder: Path) -> FinishedRun:
    from sottovoce.server.runs import load_run

    return load_run(folder)


def _delta(unit: str, claims: Sequence[Claim]) -> float:
    """The delta of the unit's claim; without one, the smallest claimed, else `DEFAULT_DELTA`."""
    stated = {claim.unit: claim.delta for claim in claims if claim.delta is not None}
    return stated.get(unit, min(stated.values(), default=DEFAULT_DELTA))


def _write(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
