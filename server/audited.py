"""The audits of a study's runs: made once, read back, and worded for tables.

Both studies of leakage (`privacy_study`, `mitigations_study`) put the same figures beside utility.
"""

from __future__ import annotations

import io
import sys
import time
from contextlib import redirect_stdout
from typing import Any

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.server.run_record import RunRecord, claim, read_run
from sottovoce.server.study import Result
from sottovoce.server.wording import epsilon_text, metric_text, number

AUDIT = "audit.json"
CODES = 8
PROBES = ("model_inversion", "exposure")
Row = dict[str, Any]


def audited(result: Result) -> RunRecord:
    """The run with its audit, which is made where it is not there yet."""
    place = result.run.folder
    if not (place / AUDIT).is_file():
        began = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            run_audit(AuditConfig(run=str(place), format="json"))
        print(f"audit of {place.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return read_run(place)


def figures(run: RunRecord, unit: str) -> Row:
    """What an audit of `run` found for `unit`, beside utility and theory; None where unknown.

    `epsilon`: claimed; `epsilon_tested`: the same, for the neighbours that the bound is about;
    `epsilon_lower_bound`: the strongest that may be compared, of `attack`; `auc`: the highest of
    these attacks. `digits`: share of code digits read by inversion; `exposure`: mean bits.
    """
    metric = run.headline
    row: Row = {"metric": metric, "utility": run.final(metric)}
    row["epsilon"] = number(claim(run.summary, unit).get("epsilon"))
    row |= dict.fromkeys(
        ("attack", "epsilon_tested", "epsilon_lower_bound", "ceiling", "auc", "auc_low", "auc_high")
    )
    attacks = [
        a for a in run.audit.get("attacks", ())
        if (a["unit"], a["observer"]) == (unit, "release")
        and a["valid"] and a["epsilon_lower_bound"] is not None
    ]
    if attacks:
        best = max(attacks, key=lambda a: (a["epsilon_lower_bound"], a["auc"]))
        widest = max(attacks, key=lambda a: a["auc"])
        row |= {"attack": best["name"], "epsilon_tested": best["epsilon_claimed"]}
        row |= {key: best[key] for key in ("epsilon_lower_bound", "ceiling")}
        row |= {"auc": widest["auc"], "auc_low": widest["auc_ci"][0]}
        row["auc_high"] = widest["auc_ci"][1]
    found = {one["name"]: one for one in run.audit.get("leakage", ())}
    row |= _headline("digits", found.get("model_inversion"))
    row |= _headline("exposure", found.get("exposure"))
    exposed = (found.get("exposure") or {}).get("figures", {})
    row["codes_first"], row["exposure_possible"] = exposed.get("first"), exposed.get("possible")
    return row | {"verdict": run.audit.get("verdict")}


def cells(row: Row) -> list[str]:
    """A row's figures as text, in the order of `HEAD`."""
    bound, ceiling = row["epsilon_lower_bound"], row["ceiling"]
    auc = "–" if row["auc"] is None else (
        f"{row['auc']:.3f} [{row['auc_low']:.2f}, {row['auc_high']:.2f}]"
    )
    return [
        metric_text(row["metric"], row["utility"]),
        "∞" if row["epsilon"] is None else epsilon_text(row["epsilon"]),
        "–" if bound is None else f"≥ {bound:.2f} of {ceiling:.2f}",
        auc,
        _with_interval(row, "digits", 2),
        _with_interval(row, "exposure", 1, interval=False),
        "–" if row["exposure_p"] is None else f"{row['exposure_p']:.1g}",
    ]


HEAD = (
    "utility", "ε, theory", "ε at least (ceiling)", "AUC, best attack",
    "digits read (chance 0.10)", "exposure, bits (chance 1.44)", "p",
)


def check_codes(config: Any) -> int:
    """How many codes the runs of a study get: as set, else `CODES`. ConfigError for none."""
    count = config.audit.codes or CODES
    if count < 1:
        raise ConfigError(f"audit.codes={count} must be at least 1 for this study")
    return int(count)


def _headline(name: str, found: Any) -> Row:
    low, high = (found or {}).get("interval") or (None, None)
    return {
        name: (found or {}).get("value"), f"{name}_low": low, f"{name}_high": high,
        f"{name}_p": (found or {}).get("p_value"),
    }


def _with_interval(row: Row, name: str, digits: int, *, interval: bool = True) -> str:
    if row[name] is None:
        return "–"
    text = f"{row[name]:.{digits}f}"
    if interval:
        text += f" [{row[f'{name}_low']:.{digits}f}, {row[f'{name}_high']:.{digits}f}]"
    return text
