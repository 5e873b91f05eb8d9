"""How far an index is, as a bar on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class IndexProgress:
    """A bar while an index is built; silent where not `enabled` or where stderr is no terminal."""

    def __init__(self, enabled: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("indexing: {task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=1.0)
        self._phase = ""

    def __call__(self, phase: str, done: float) -> None:
        """Show that `done` (0 to 1) of a phase is done."""
        if self._bar is None:
            return
        if phase != self._phase:
            self._bar.reset(self._task, description=phase)
            self._phase = phase
        self._bar.update(self._task, completed=done)

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

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
