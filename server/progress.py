"""A run as it happens: a bar on a terminal, a line per evaluation elsewhere, a table at the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from sottovoce.server.cost_tables import cost_line
from sottovoce.server.run_record import (
    OBSERVER,
    UNITS,
    Record,
    claim,
    final_metrics,
    level_rows,
)
from sottovoce.server.wording import (
    METRICS,
    count_text,
    duration_text,
    epsilon_text,
    evaluated_on,
    label,
    level_text,
    metric_text,
    number,
    small_text,
)
from sottovoce.strategies.levels import row_text


class Progress:
    """Shows the rounds of a run; use as a context manager and feed it metrics.jsonl's records.

    On a terminal: one bar with loss, headline metric, epsilon so far and seconds a round. Where
    output is piped: one plain line per evaluation and for the last round. Silent when not
    `enabled`. `start_round`: rounds done before (a resumed run).
    """

    def __init__(
        self,
        total_rounds: int,
        start_round: int,
        headline: str,
        enabled: bool,
        console: Console | None = None,
    ) -> None:
        self._total = total_rounds
        self._headline = headline
        self._enabled = enabled
        self._console = console or Console()
        self._latest: Record = {}
        self._bar = self._make_bar(start_round) if enabled and self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: Record) -> None:
        """Show a round's record."""
        self._latest |= {k: v for k, v in record.items() if v is not None}
        evaluated = number(record.get(self._headline)) is not None
        if self._bar is not None:
            done = int(record["round"])
            self._bar.update(self._bar.task_ids[0], completed=done,
                             figures=progress_text(self._latest, self._headline))
        elif self._enabled and (evaluated or record["round"] == self._total):
            shown = self._latest if evaluated else record
            line = f"round {record['round']}/{self._total}  {progress_text(shown, self._headline)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """Show a line of text, above the bar where there is one."""
        if self._enabled:
            shown = self._bar.console if self._bar is not None else self._console
            shown.print(text, markup=False, highlight=False, soft_wrap=True)

    def _make_bar(self, start_round: int) -> Bar:
        bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        bar.add_task("rounds", total=self._total, completed=start_round, figures="starting")
        return bar


def progress_text(record: Record, headline: str) -> str:
    """A record's loss, headline metric, epsilon and seconds as one line."""
    loss = number(record.get("train_loss"))
    parts = [] if loss is None else [f"loss {metric_text('loss', loss)}"]
    if number(record.get(headline)) is not None:
        parts.append(f"{label(headline)} {metric_text(headline, record[headline])}")
    spent = [(u, e) for u in UNITS if (e := number(record.get(f"epsilon_{u}"))) is not None]
    parts += [f"ε {epsilon_text(e)}" + (f" ({u})" if len(spent) > 1 else "") for u, e in spent]
    if (seconds := number(record.get("seconds"))) is not None:
        parts.append(f"{seconds:.1f} s/round")
    return "  ".join(parts)


def final_table(summary: Record, report: Path | None = None) -> RenderableType:
    """What a run prints at its end: utility, epsilon per activity level, where the report is."""
    claims = {unit: claim(summary, unit) for unit in UNITS if claim(summary, unit)}
    parts: list[RenderableType] = ["", _closing_line(summary), "", _utility_table(summary), ""]
    parts += [_claim_line(unit, found) for unit, found in claims.items()]
    if any(level_rows(found) for found in claims.values()):
        parts += [_epsilon_table(claims), ""]
    parts += _warning_lines(summary, claims)
    if line := cost_line(summary.get("cost") or {}):
        parts += [Text(line), ""]
    if report is not None:
        parts.append(Text(f"report: {report}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _closing_line(summary: Record) -> Text:
    status = str(summary.get("status", "not finished")).replace("_", " ")
    rounds, memory = number(summary.get("rounds")), number(summary.get("peak_memory_mb"))
    parts = [status]
    if rounds is not None:
        parts.append(f"{count_text(rounds)} rounds")
    if (seconds := number(summary.get("seconds"))) is not None:
        parts.append(duration_text(seconds))
    if memory is not None:
        parts.append(f"peak memory {count_text(memory)} MB")
    return Text(", ".join(parts), style="bold")


def _utility_table(summary: Record) -> Table:
    table = _table()
    table.add_column(f"on {evaluated_on(summary)}")
    table.add_column("", justify="right")
    found = final_metrics(summary)
    for metric in sorted((m for m in METRICS if m in found),
                         key=lambda m: m != summary.get("headline")):
        name = label(metric, str(summary.get("task", "")))
        table.add_row(name, metric_text(metric, found[metric]))
        worst = f"{metric}_worst_decile"
        if worst in found:
            table.add_row(label(worst, str(summary.get("task", ""))),
                          metric_text(worst, found[worst]))
    return table


def _claim_line(unit: str, found: dict[str, Any]) -> Text:
    return Text(f"{unit}-level ε = {epsilon_text(found.get('epsilon'))}"
                f" at δ = {small_text(found.get('delta'))}"
                f" (observer: {found.get('observer') or OBSERVER[unit]})", style="bold")


def _epsilon_table(claims: dict[str, dict[str, Any]]) -> Table:
    """A row per activity level: its devices, and rate and epsilon for every unit."""
    table = _table()
    rates = {"device": "join rate", "example": "batch rate"}
    heads = [head for unit in claims for head in (rates[unit], f"{unit} ε")]
    for head in ("level", "examples", "devices", *heads):
        table.add_column(head, justify="right")
    by_unit = {unit: {int(r["level"]): r for r in level_rows(found)}
               for unit, found in claims.items()}
    for level in sorted({level for rows in by_unit.values() for level in rows}):
        found = [rows.get(level, {}) for rows in by_unit.values()]
        devices = next((r["devices"] for r in found if "devices" in r), None)
        cells = [cell for r in found
                 for cell in (small_text(r.get("sampling_rate")), epsilon_text(r.get("epsilon")))]
        table.add_row(row_text(level), level_text(level), count_text(devices), *cells)
    return table


def _warning_lines(summary: Record, claims: dict[str, dict[str, Any]]) -> list[RenderableType]:
    lines = [f"warning: {w}" for w in summary.get("warnings") or []
             if "reproducible noise" not in str(w)]
    if "reproducible" in str(summary.get("noise")):
        lines.insert(0, "warning: reproducible noise: simulation only")
    if not claims:
        lines.insert(0, "no privacy guarantee: no noise was added (ε is infinite)")
    return [Text(line, style="red") for line in lines]


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
