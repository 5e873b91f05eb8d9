"""An audit in words, for the terminal and for the page: the verdict, and theory beside practice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sottovoce.privacy.audit.claims import RELATIONS, Claim
from sottovoce.privacy.audit.leakage import ABSENCE, Leakage
from sottovoce.privacy.audit.outcome import AttackResult, Audit, claim_of
from sottovoce.privacy.audit.verdict import Verdict, epsilon_text

COLOURS = {
    Verdict.VIOLATION: "red",
    Verdict.NO_VIOLATION_FOUND: "green",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.INVALID: "red",
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
        name, unit, observer, claimed, proved, ceiling, auc, rate, _, seconds = attack_cells(result)
        short = name if len(name) <= 24 else f"{name[:23]}…"
        about = f"{short}\n  {unit}, {observer}, {seconds} s"
        two_lines = (cell.replace(" [", "\n[") for cell in (auc, rate))
        table.add_row(escape(about), claimed, proved, ceiling, *map(escape, two_lines))
    yield table
    if audit.checks:
        yield Text("\n" + "\n".join(str(check) for check in audit.checks))
    if audit.leakage:
        yield Text("")
        yield leakage_table(audit.leakage)
        yield Text(f"\nNo bound on any ε; {ABSENCE}.", style="dim")
    yield Text("\n" + "\n".join(audit_notes(audit)), style="dim")


def leakage_table(leakage: Sequence[Leakage]) -> Table:
    """What was read back, against guessing."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("read back\nunit, observer, seconds", no_wrap=True)
    table.add_column("found")
    for heading in ("by\nchance", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in leakage:
        about = f"{found.name}\n  {found.unit}, {found.observer}, {found.seconds:.1f} s"
        value, *rest = leakage_cells(found)
        table.add_row(escape(about), escape(value.replace(" [", "\n[")), *rest)
    return table


def leakage_cells(found: Leakage) -> list[str]:
    """What was found with its interval, by chance, p-value."""
    if found.not_applicable is not None:
        return [f"does not apply: {found.not_applicable}", "–", "–"]
    value = "–" if found.value is None else f"{found.headline} {found.value:.3g}"
    if found.interval is not None:
        value += f" [{found.interval[0]:.3g}, {found.interval[1]:.3g}]"
    chance = "–" if found.chance is None else f"{found.chance:.3g}"
    return [value, chance, "–" if found.p_value is None else f"{found.p_value:.2g}"]


def attack_cells(result: AttackResult) -> list[str]:
    """Name, unit, observer, claim, bound, ceiling, AUC, rate, power at half noise, seconds."""
    attack, found = result.attack, result.membership
    comparable = result.invalid is None and result.claimed is not None
    cells = [attack.name, attack.unit, attack.observer]
    cells.append(epsilon_text(result.claimed or 0.0) if comparable else "–")
    if found is None:
        return [*cells, *["–"] * 5, f"{result.seconds:.1f}"]
    low, high = found.auc_interval
    rate, (least, most) = found.tpr_at_fpr[0.01]
    power = result.power
    return [
        *cells,
        str(found.bound),
        f"{math.floor(found.bound.ceiling * 100) / 100:.2f}",
        f"{found.auc:.3f} [{low:.2f}, {high:.2f}]",
        f"{rate:.3f} [{least:.2f}, {most:.2f}]",
        "–" if power is None else f"{power.perfect:.2f} / {power.this:.2f}",
        f"{result.seconds:.1f}",
    ]


def audit_notes(audit: Audit) -> list[str]:
    """What a reader of the table must know."""
    percent = f"{100 * audit.confidence:g} %"
    notes = [_sentence(note) for note in audit.notes]
    notes += [
        f"Lower bounds hold together with {percent} confidence, each interval alone.",
        "Ceiling: what a perfect attack on as many canaries would certify.",
    ]
    if any(result.attack.observer == "release" for result in audit.results):
        notes.append("Observer release sees every released model, nothing else of the training.")
    notes += [_sentence(note) for note in dict.fromkeys(r.attack.note for r in audit.results)]
    notes += [_exchange(claim) for claim in audit.claims if _is_exchanged(audit, claim)]
    notes += [f"{r.attack.name}: not compared, {r.invalid}." for r in audit.results if r.invalid]
    for why in dict.fromkeys(audit.skipped.values()):
        names = ", ".join(name for name, reason in audit.skipped.items() if reason == why)
        notes.append(f"{names}: left out, {why}.")
    return notes


def relation_text(claim: Claim) -> str:
    """The neighbours that a claim tells apart, in words."""
    return RELATIONS[claim.relation].format(unit=claim.unit)


def _is_exchanged(audit: Audit, claim: Claim) -> bool:
    """Whether an attack is held against another epsilon than the one that is published."""
    return claim.finite and any(
        claim_of(result.attack, [claim]) and result.attack.relation != claim.relation
        for result in audit.results
    )


def _exchange(claim: Claim) -> str:
    exchanged = epsilon_text(math.inf if claim.exchanged is None else claim.exchanged)
    return (
        f"Claimed per {claim.unit}: {epsilon_text(claim.epsilon)}, {relation_text(claim)}. Where "
        f"held-out data are the non-members, one {claim.unit} is exchanged for another, which "
        f"costs {exchanged}: that is what those bounds are held against."
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
