"""The device's own record of what it took part in, written before anything leaves the device.

Every participation is on the disk, with its cost, before the first byte of its update is sent: if
the power fails in between, epsilon was counted for an update that nobody got, never the other way
round. Entries are neither changed nor forgotten, whatever becomes of the examples; their order is
that of their rows, and times are for people to read only, so a clock may jump.

*Guarantee*: `costs` lists at least every participation of which anything was sent, under each cost
that it was begun with.
*Assumes*: `begin` returns before an update is sent; the disk keeps what it says it has written.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from sottovoce.client.agent.database import Database, Kind
from sottovoce.client.errors import RunError

KIND = Kind(
    name="a device's journal",
    application=0x5356_4A31,
    schema="""
        CREATE TABLE declared (
            run TEXT PRIMARY KEY, level INTEGER NOT NULL, snapshot INTEGER NOT NULL,
            time REAL NOT NULL
        );
        CREATE TABLE participations (
            id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL UNIQUE, run TEXT NOT NULL,
            round INTEGER NOT NULL, noise_multiplier REAL, sampling_rate REAL NOT NULL,
            steps INTEGER NOT NULL, begun REAL NOT NULL, outcome TEXT, finished REAL
        )
    """,
    remedy="restore it from a backup, or join anew with an empty store: without it nobody knows "
    "the epsilon that was spent",
)

BEGUN = "begun"
"""State of a participation whose outcome is not known."""


@dataclass(frozen=True)
class StepCost:
    """What one participation costs an example: Poisson-subsampled Gaussians.

    `noise_multiplier`: deviation over the sensitivity of a step's sum under add/remove of one
    example; None: no noise on the device. `sampling_rate`: probability that an example enters a
    step. `steps`: of the participation. ValueError for impossible values.
    """

    noise_multiplier: float | None
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        if noise is not None and not (0 < noise < math.inf):
            raise ValueError(f"noise_multiplier={noise} must be above 0 and finite, or None")
        if not 0 <= self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate} must be from 0 to 1")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be 0 or more")


@dataclass(frozen=True)
class Declared:
    """What a device fixed for a run: its activity level and the last example that counts."""

    level: int
    snapshot: int


@dataclass(frozen=True)
class Participation:
    """One line of the journal. `begun`: seconds since 1970. `state`: `BEGUN` or an outcome."""

    task: str
    run: str
    round: int
    cost: StepCost
    begun: float
    state: str


class Journal:
    """Participations and declarations of one device, in `folder`/journal.sqlite.

    Raises DataError for a damaged or foreign file, RunError where it has vanished from a store that
    had one: epsilon that is not known is not taken for zero.
    """

    def __init__(self, folder: Path) -> None:
        path, mark = folder / "journal.sqlite", folder / "journal.begun"
        if mark.exists() and not (path.exists() and path.stat().st_size):
            raise RunError(
                f"{path} has vanished, and with it the epsilon that was spent: restore it from a "
                "backup, or join anew with an empty store"
            )
        self._database = Database(path, KIND)
        self._database.check()
        if not mark.exists():
            _touch(mark)

    def declared(self, run: str) -> Declared | None:
        """What was fixed for `run`, or None."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT level, snapshot FROM declared WHERE run = ?", (run,)
            ).fetchone()
        return None if row is None else Declared(*row)

    def declare(self, run: str, level: int, snapshot: int) -> Declared:
        """Fix level and snapshot for `run`; only the first call of a run counts."""
        with self._database.writing() as connection:
            connection.execute(
                "INSERT INTO declared VALUES (?, ?, ?, ?) ON CONFLICT (run) DO NOTHING",
                (run, int(level), int(snapshot), time.time()),
            )
        found = self.declared(run)
        assert found is not None
        return found

    def begin(self, task_id: str, run: str, round: int, cost: StepCost) -> None:
        """Count a participation, on the disk when this returns; again for the same task: nothing.

        RunError where the task was begun at another cost: one task id stands for one piece of work.
        """
        values = (
            task_id, run, int(round), cost.noise_multiplier, cost.sampling_rate, int(cost.steps)
        )
        with self._database.writing() as connection:
            connection.execute(
                "INSERT INTO participations"
                " (task, run, round, noise_multiplier, sampling_rate, steps, begun)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task) DO NOTHING",
                (*values, time.time()),
            )
            kept = connection.execute(
                "SELECT task, run, round, noise_multiplier, sampling_rate, steps"
                " FROM participations WHERE task = ?",
                (task_id,),
            ).fetchone()
        if kept != values:
            raise RunError(
                f"task {task_id} was begun as {kept[1:]} and comes again as {values[1:]}: "
                "it is not done twice"
            )

    def finished(self, task_id: str, outcome: str) -> None:
        """Note what became of a participation; RunError where it was never begun."""
        with self._database.writing() as connection:
            changed = connection.execute(
                "UPDATE participations SET outcome = ?, finished = ? WHERE task = ?",
                (outcome, time.time(), task_id),
            ).rowcount
        if not changed:
            raise RunError(f"task {task_id} was never begun: it cannot end as {outcome}")

    def state(self, task_id: str) -> str | None:
        """None, `begun`, or the outcome."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT outcome FROM participations WHERE task = ?", (task_id,)
            ).fetchone()
        return None if row is None else row[0] or BEGUN

    def costs(self) -> list[tuple[StepCost, int]]:
        """All that was ever begun: each distinct cost and how often."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT noise_multiplier, sampling_rate, steps, count(*) FROM participations"
                " GROUP BY 1, 2, 3 ORDER BY min(id)"
            ).fetchall()
        return [(StepCost(noise, rate, steps), count) for noise, rate, steps, count in rows]

    def participations(self, latest: int | None = None) -> list[Participation]:
        """The journal's lines in order, or the `latest` of them."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT task, run, round, noise_multiplier, sampling_rate, steps, begun, outcome"
                " FROM participations ORDER BY id DESC LIMIT ?",
                (-1 if latest is None else latest,),
            ).fetchall()
        return [
            Participation(task, run, number, StepCost(noise, rate, steps), begun, state or BEGUN)
            for task, run, number, noise, rate, steps, begun, state in reversed(rows)
        ]

    def close(self) -> None:
        self._database.close()


def _touch(path: Path) -> None:
    try:
        path.touch(mode=0o600)
    except OSError as error:
        raise RunError(f"{path} cannot be made ({error.strerror}): free some space") from None
