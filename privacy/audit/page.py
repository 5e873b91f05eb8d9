"""`audit.html`: one self-contained page, the verdict first, its evidence below."""

from __future__ import annotations

import math
from importlib import metadata, resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sottovoce.privacy.audit.membership import Membership
from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.plots import histograms, roc_curves
from sottovoce.privacy.audit.record import (
    THREAT_MODEL,
    attack_cells,
    audit_notes,
)
from sottovoce.privacy.audit.verdict import Verdict, epsilon_text

TONES = {
    Verdict.VIOLATION: "bad",
    Verdict.NO_VIOLATION_FOUND: "good",
    Verdict.INCONCLUSIVE: "open",
    Verdict.INVALID: "bad",
}
COLUMNS = (
    "attack", "unit", "observer", "ε claimed", "ε at least", "ceiling", "AUC (interval)",
    "true positives at 1 % false (interval)", "seconds",
)


def render_page(audit: Audit) -> str:
    """The page as HTML: no script, no link, no file beside it."""
    source = resources.files("sottovoce.privacy.audit").joinpath("page.html.j2")
    engine = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    measured = [(r, r.membership) for r in audit.results if r.membership is not None]
    return engine.from_string(source.read_text(encoding="utf-8")).render(
        folder=audit.run.name,
        verdict=str(audit.judgement.verdict),
        tone=TONES[audit.judgement.verdict],
        reason=audit.judgement.reason,
        cards=_cards(audit),
        threat_model=THREAT_MODEL,
        assumes=next((found.bound.assumes for _, found in measured), ""),
        method=next((found.bound.method for _, found in measured), ""),
        columns=COLUMNS,
        rows=[attack_cells(audit, result) for result in audit.results],
        guesses=[_guess_cells(result, found) for result, found in measured],
        notes=audit_notes(audit),
        claims=[
            (claim.unit, epsilon_text(claim.epsilon), judgement.verdict, judgement.reason)
            for claim, judgement in zip(audit.claims, audit.by_claim, strict=True)
        ],
        curves=Markup(roc_curves(audit)) if measured else "",
        histograms=Markup(histograms(audit)) if measured else "",
        version=metadata.version("sottovoce"),
        seed=audit.seed,
        seconds=f"{audit.seconds:.1f}",
    )


def _cards(audit: Audit) -> list[tuple[str, str, str]]:
    """Claim, strongest bound and ceiling for the headline claim: (name, value, note)."""
    claim = audit.headline
    delta = "no delta stated" if claim.delta is None else f"δ = {_power(claim.delta)}"
    cards = [(
        f"Claimed ε per {claim.unit}",
        epsilon_text(claim.epsilon),
        f"theory: {delta}, observer: {claim.observer}",
    )]
    bounds = [
        r.finding.bound for r in audit.results
        if r.finding.bound is not None and r.invalid is None and r.attack.unit == claim.unit
    ]
    if bounds:
        strongest = max(bounds, key=lambda bound: bound.epsilon)
        ceiling = max(bound.ceiling for bound in bounds)
        cards += [
            ("Proved by attack", str(strongest),
             f"with {100 * audit.confidence:g} % confidence, over all attacks"),
            ("Ceiling of this audit", f"{math.floor(ceiling * 100) / 100:.2f}",
             "what a perfect attack would have proved"),
        ]
    return cards


def _guess_cells(result: AttackResult, found: Membership) -> list[str]:
    made = found.guesses.as_members + found.guesses.as_non_members
    return [
        result.attack.name,
        f"{result.members:,} / {result.non_members:,}",
        f"{found.guesses.canaries:,}",
        f"{found.guesses.correct:,} of {made:,}",
        str(found.estimate),
        result.attack.cost,
    ]


def _power(value: float) -> str:
    """A small number as `1e-7`, without the padded exponent."""
    return f"{value:g}".replace("e-0", "e-")
