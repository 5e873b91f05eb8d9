"""`audit.html`: one self-contained page, the verdict first, its evidence below."""

from __future__ import annotations

import math
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sottovoce.privacy.audit.checks import Check
from sottovoce.privacy.audit.claims import RELATIONS, Claim
from sottovoce.privacy.audit.membership import Membership
from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.plots import epsilon_by_round, histograms, roc_curves
from sottovoce.privacy.audit.power import MODEL
from sottovoce.privacy.audit.table import (
    attack_cells,
    audit_notes,
    leakage_cells,
    relation_text,
)
from sottovoce.privacy.audit.verdict import Verdict, epsilon_text

if TYPE_CHECKING:
    from sottovoce.privacy.audit.leakage import Leakage

MOST_ROWS = 40
OBSERVERS = {
    "release": "sees every released model",
    "server": "sees each round's sum before central noise",
    "fleet": "sees each device's update",
}
TONES = {
    Verdict.VIOLATION: "bad",
    Verdict.NO_VIOLATION_FOUND: "good",
    Verdict.INCONCLUSIVE: "open",
    Verdict.INVALID: "bad",
}
COLUMNS = (
    "attack", "unit", "observer", "ε claimed", "ε at least", "ceiling", "AUC (interval)",
    "true positives at 1 % false (interval)", "power at half the noise: perfect / this",
)
LEAKAGE = ("attack", "unit", "observer", "found", "by chance", "p-value", "what it sees")


def render_page(audit: Audit) -> str:
    """The page as HTML: no script, no link, no file beside it."""
    source = resources.files("sottovoce.privacy.audit").joinpath("page.html.j2")
    engine = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    measured = [(r, r.membership) for r in audit.results if r.membership is not None]
    return engine.from_string(source.read_text(encoding="utf-8")).render(
        source=audit.source.name,
        verdict=str(audit.judgement.verdict),
        tone=TONES[audit.judgement.verdict],
        reason=audit.judgement.reason,
        cards=_cards(audit),
        facts=_facts(audit),
        columns=COLUMNS,
        rows=[attack_cells(result)[:-1] for result in audit.results],
        notes=audit_notes(audit),
        claims=[
            (claim.unit, claim.observer, relation_text(claim), epsilon_text(claim.epsilon),
             _exchanged(claim), judgement.verdict, judgement.reason)
            for claim, judgement in zip(audit.claims, audit.by_claim, strict=True)
        ],
        curves=Markup(roc_curves(audit)) if measured else "",
        histograms=Markup(histograms(audit)) if measured else "",
        rounds=Markup(epsilon_by_round(audit)) if len(audit.rounds) > 1 else "",
        checks=[_check_cells(check) for check in audit.checks],
        leakage_columns=LEAKAGE,
        leakage=[
            [f.name, f.unit, f.observer, *leakage_cells(f), f.sees] for f in audit.leakage
        ],
        secrets=[_secrets(found) for found in audit.leakage if found.rows],
        utility=[
            (u.metric, f"{u.with_canaries:.4g}", f"{u.without:.4g}",
             f"{u.with_canaries - u.without:+.2g}") for u in audit.utility
        ],
        methods=list(dict.fromkeys(found.bound.method for _, found in measured)),
        model=MODEL,
        guesses=[_guess_cells(result, found) for result, found in measured],
        costs=_costs(audit),
        version=metadata.version("sottovoce"),
        seed=audit.seed,
        seconds=f"{audit.seconds:.1f}",
    )


def _cards(audit: Audit) -> list[tuple[str, str, str]]:
    """Claim, strongest bound, ceiling and power for the headline claim: (name, value, note)."""
    claim, strongest = audit.headline, audit.headline_result
    delta = "no δ stated" if claim.delta is None else f"δ = {_power(claim.delta)}"
    cards = [(
        f"Claimed ε per {claim.unit}", epsilon_text(claim.epsilon),
        f"theory, {delta}, {relation_text(claim)}",
    )]
    if strongest is None or strongest.membership is None:
        return cards
    bound = strongest.membership.bound
    held = ""
    if strongest.claimed is not None and strongest.claimed != claim.epsilon:
        held = f"; to be held against {epsilon_text(strongest.claimed)}"
    cards += [
        ("Proved by attack", str(bound),
         f"with {100 * audit.confidence:g} % confidence, over all attacks{held}"),
        ("Ceiling of this audit", f"{math.floor(bound.ceiling * 100) / 100:.2f}",
         "what a perfect attack would have proved"),
    ]
    if (power := strongest.power) is not None:
        cards.append((
            "Power at half the noise", f"{power.perfect:.2f} / {power.this:.2f}",
            "chance of a violation shown by a perfect attack / by this one",
        ))
    return cards


def _facts(audit: Audit) -> list[tuple[str, str]]:
    """The threat model, a fact a line."""
    claim, strongest = audit.headline, audit.headline_result
    facts = [
        ("Threat model", audit.threat_model),
        ("Unit", f"{claim.unit}: what is protected is whatever one {claim.unit} holds"),
        ("Observer", f"{claim.observer}: {OBSERVERS[claim.observer]}"),
        ("Neighbours", f"the claim: {relation_text(claim)}"),
    ]
    if strongest is not None and strongest.membership is not None:
        tested = RELATIONS[strongest.attack.relation].format(unit=claim.unit)
        facts[-1] = ("Neighbours", f"the claim: {relation_text(claim)}; the attack: {tested}")
        facts.append(("The bound assumes", strongest.membership.bound.assumes))
    return facts


def _exchanged(claim: Claim) -> str:
    return "–" if claim.exchanged is None else epsilon_text(claim.exchanged)


def _guess_cells(result: AttackResult, found: Membership) -> list[str]:
    return [
        result.attack.name,
        f"{result.members:,} / {result.non_members:,}",
        f"{found.guesses.canaries:,}",
        f"{found.guesses.correct:,} of {found.guesses.made:,}",
        str(found.bound),
        str(found.estimate),
    ]


def _check_cells(check: Check) -> list[str]:
    if check.p_value is None or check.statistic is None:
        return [check.name, str(check.outcome), check.why or "", "–", check.fault, check.sees]
    found = f"{check.measures} {check.statistic:.3g}, expected {check.expected:.3g}"
    return [
        check.name, str(check.outcome), found, f"{check.p_value:.2g}", check.fault, check.sees
    ]


def _secrets(found: Leakage) -> dict[str, Any]:
    """The first rows of what one attack read back, as a table."""
    columns = list(found.rows[0])
    rows = [[_cell(row.get(column)) for column in columns] for row in found.rows[:MOST_ROWS]]
    left = len(found.rows) - len(rows)
    return {"name": found.name, "columns": columns, "rows": rows, "left": left, "note": found.note}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " ".join(_cell(item) for item in value)
    return "–" if value is None else str(value)


def _costs(audit: Audit) -> list[tuple[str, str, str]]:
    made = [(r.attack.name, r.attack.cost, f"{r.seconds:.1f}") for r in audit.results]
    return made + [(f.name, f.cost or "–", f"{f.seconds:.1f}") for f in audit.leakage]


def _power(value: float) -> str:
    """A small number as `1e-7`, without the padded exponent."""
    return f"{value:g}".replace("e-0", "e-")
