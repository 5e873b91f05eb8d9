"""`report.html`: one self-contained page that says what a run learned and what privacy it cost."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sottovoce.server.claims import NO_GUARANTEE, Claim
from sottovoce.server.cost_tables import cost_table
from sottovoce.server.drawing import bounds
from sottovoce.server.plots import plots
from sottovoce.server.report_tables import (
    audit_table,
    evaluation_table,
    level_table,
    population_facts,
    run_facts,
    seconds,
    versions,
)
from sottovoce.server.run_record import Record, RunRecord, read_run, setting
from sottovoce.server.statement import PrivacyStatement, privacy_statement
from sottovoce.server.wording import (
    METRICS,
    count_text,
    duration_text,
    epsilon_text,
    evaluated_on,
    label,
    metric_text,
    number,
    small_text,
    words,
)

TEMPLATE = "report_template.html.j2"
STATUS = {
    "finished": ("Finished", "good"),
    "budget_spent": ("Stopped: privacy budget spent", "good"),
    "interrupted": ("Interrupted: resume to go on", "bad"),
}
UNFINISHED = ("Not finished: no summary.json", "bad")


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from the run in `folder`, whole or not at all; returns its path.

    Raises RunError naming the folder where it is not a run.
    """
    page = render_report(read_run(folder))
    target = folder / "report.html"
    partial = folder / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def render_report(run: RunRecord) -> str:
    """The page for `run`, as HTML."""
    source = resources.files("sottovoce.server").joinpath(TEMPLATE).read_text(encoding="utf-8")
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                         lstrip_blocks=True)
    statement = privacy_statement(run.summary, run.ledger, run.config)
    status, tone = STATUS.get(str(run.summary.get("status")), UNFINISHED)
    return engine.from_string(source).render(
        title=title(run),
        folder=run.folder.name,
        status=status,
        tone=tone,
        cards=cards(run, statement),
        statement=statement,
        disclosure=str(run.summary.get("statement") or ""),
        plots=[{"title": p.title, "note": p.note, "svg": Markup(p.svg)} for p in plots(run)],
        levels=level_table(run, statement.claims),
        evaluations=evaluation_table(run),
        audit=audit_table(run.audit),
        cost=cost_table(run),
        facts=[("The run", run_facts(run)), ("Population", population_facts(run)),
               ("Environment", list(versions(run).items()))],
        config=run.config_text.strip(),
    )


def title(run: RunRecord) -> str:
    """Task, model and population in a few words."""
    model = run.summary.get("model") or setting(run.config, "model.name")
    parts = [run.task or run.summary.get("task"), model, setting(run.config, "population.name")]
    return " · ".join(words(p) for p in parts if p) or "a federated run"


def cards(run: RunRecord, statement: PrivacyStatement) -> list[Record]:
    """The figures of the first screen: {name, value, notes, tone}."""
    devices = setting(run.summary, "population.devices") or setting(run.config,
                                                                    "population.devices")
    rounds = number(run.summary.get("rounds"))
    done = rounds if rounds is not None else (run.metrics[-1]["round"] if run.metrics else 0)
    found = [_utility_card(run)]
    found += [_epsilon_card(run, c) for c in statement.claims]
    if not statement.claims:
        found.append({"name": "Privacy", "value": "ε = ∞", "tone": "bad",
                      "notes": [NO_GUARANTEE]})
    found.append({"name": "Rounds", "value": f"{count_text(done)} of {run.planned_rounds:,}",
                  "tone": "", "notes": [duration_text(seconds(run))]})
    found.append({"name": "Devices", "value": count_text(devices), "tone": "",
                  "notes": [f"{count_text(sum(run.participations.values()))} participations"]})
    return found


def _utility_card(run: RunRecord) -> Record:
    metric = run.headline
    others = [f"{label(m, run.task)} {metric_text(m, v)}" for m in METRICS
              if m not in (metric, "loss") and (v := run.final(m)) is not None]
    start = [r for r in run.evaluations if r["round"] == 0]
    notes = [f"on {evaluated_on(run.summary)}", *others]
    if start and len(run.evaluations) > 1:
        notes.append(f"{metric_text(metric, start[0][metric])} before training")
    name = label(metric, run.task)
    return {"name": name[:1].upper() + name[1:], "tone": "lead", "notes": notes,
            "value": metric_text(metric, run.final(metric))}


def _epsilon_card(run: RunRecord, claim: Claim) -> Record:
    notes = [NO_GUARANTEE] if claim.infinite else [f"at δ = {small_text(claim.delta)}"]
    notes += [f"{word} {epsilon_text(bound)}" for word, bound in bounds(run, claim.unit)]
    if len(claim.by_level) > 1:
        notes.append("worst activity level")
    return {"name": f"Privacy, {claim.unit} level", "value": f"ε = {epsilon_text(claim.epsilon)}",
            "notes": notes, "tone": "bad" if claim.infinite else "lead"}
