"""`sottovoce audit`: put what leaks beside the epsilon that was claimed.

`run=RUN` attacks a finished run (`attack_run`); `scores=FILE` weighs scores that any other system
made (`attack_scores`), for which no torch is loaded. Both end in `audit.json`, `audit.html`, a
table and the verdict's exit code (`sottovoce.privacy.audit.verdict`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.audit.outcome import Audit
from sottovoce.privacy.audit.record import audit_record, json_text, raw_scores
from sottovoce.privacy.audit.settings import AuditConfig as AuditConfig
from sottovoce.privacy.audit.settings import check_config, target_folder
from sottovoce.privacy.audit.table import audit_table

if TYPE_CHECKING:
    from sottovoce.privacy.audit.material import FinishedRun


def run_audit(
    cfg: AuditConfig, *, load: Callable[[Path], FinishedRun] | None = None
) -> int:
    """Audit what `cfg` names, print the outcome, write `audit.json` and `audit.html`.

    `load` opens a run folder (default: `sottovoce.server.runs.load_run`). Returns the exit code:
    0 no violation found, 2 violation, 3 invalid, 4 inconclusive. Raises ConfigError for impossible
    settings, RunError for a folder that is not a finished run, DataError for a broken file.
    """
    from sottovoce.privacy.audit.page import render_page

    source = check_config(cfg)
    folder = target_folder(cfg, source)
    audit = audit_source(source, cfg, load)
    record = audit_record(audit)
    _make(folder)
    _write(folder / "audit.json", json_text({**record, "scores": raw_scores(audit)}))
    _write(folder / "audit.html", render_page(audit))
    if cfg.format == "json":
        print(json_text(record), end="")
    else:
        console = Console()
        for part in audit_table(audit):
            console.print(part)
        if cfg.scores or cfg.output:
            place = f"\nreport: {folder / 'audit.html'}"
            console.print(place, soft_wrap=True, highlight=False, markup=False)
    return audit.judgement.verdict.exit_code


def audit_source(
    source: Path, cfg: AuditConfig, load: Callable[[Path], FinishedRun] | None = None
) -> Audit:
    """The audit of the run folder or score file `source`."""
    if cfg.scores:
        from sottovoce.privacy.audit.attack_scores import audit_scores

        return audit_scores(source, cfg)
    from sottovoce.privacy.audit.attack_run import audit_run, load_run

    return audit_run(source, cfg, load=load or load_run)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be made: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; choose a folder with output="
        ) from error
