"""The coordinator: rounds until the plan or the privacy budget ends.

It owns no arithmetic: the strategy samples, sums and noises; the grid carries messages; callbacks
write files and draw bars. One round is `state -> state, record`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from sottovoce.client.messages import to_record, to_tensors
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.server.checkpoints import RunState
from sottovoce.strategies.noised_sum import NoisedSum

Record = dict[str, Any]


class Callback(Protocol):
    """What happens beside the rounds: files, progress, checkpoints."""

    def on_round(self, state: RunState, record: Record) -> None: ...


class Budget(Protocol):
    """The running cost of a ledger."""

    def spent(self, ledger: Ledger) -> dict[str, float | None]: ...

    def exceeded_by(self, strategy: NoisedSum) -> str | None: ...


@dataclass(frozen=True)
class Plan:
    """When to stop and when to look."""

    rounds: int
    evaluate_every: int


@dataclass
class Coordinator:
    """Runs a strategy over a grid, from a state onwards; the last state is always evaluated.

    `budget` gives the epsilon so far for the records, and the reason not to run another round.
    `on_request` is told a round's number before its first message leaves. `facts`: what a round's
    record says beside its metrics.
    """

    strategy: NoisedSum
    evaluate: Callable[[dict[str, Tensor]], dict[str, Any]]
    budget: Budget
    plan: Plan
    callbacks: Iterable[Callback] = ()
    on_request: Callable[[int], None] | None = None
    facts: Callable[[int], Record] | None = None

    def run(self, grid: Grid, state: RunState) -> tuple[RunState, str | None]:
        """Rounds from `state` on; the last state, and why it ended early (None if it did not)."""
        if state.round == 0:
            self._tell(state, {**self._head(0), **self.evaluate(state.parameters)})
        while state.round < self.plan.rounds:
            reason = self.budget.exceeded_by(self.strategy)
            if reason is not None:
                return state, reason
            state, record = self._round(grid, state)
            self._tell(state, record)
        return state, None

    def _round(self, grid: Grid, state: RunState) -> tuple[RunState, Record]:
        began = time.perf_counter()
        number = state.round + 1
        arrays = to_record(state.parameters)
        messages = self.strategy.configure_train(number, arrays, ConfigRecord(), grid)
        if self.on_request is not None:
            self.on_request(number)
        replies = list(grid.send_and_receive(messages)) if messages else []
        record_arrays, metrics = self.strategy.aggregate_train(number, replies)
        after = RunState(
            round=number,
            parameters=to_tensors(record_arrays),
            optimizer=self.strategy.optimizer.state(),
            participation=self.strategy.participation.state(),
            mechanism=self.strategy.mechanism_state(),
            ledger=self.strategy.ledger,
        )
        record: Record = {**self._head(number), **dict(metrics)}
        if "levels" in record:
            levels = zip(record.pop("levels"), record.pop("devices_by_level"), strict=True)
            record["devices_by_level"] = {str(level): count for level, count in levels}
        record |= self.budget.spent(self.strategy.ledger)
        record["seconds"] = time.perf_counter() - began
        last = number == self.plan.rounds or self.budget.exceeded_by(self.strategy) is not None
        if last or number % self.plan.evaluate_every == 0:
            record |= self.evaluate(after.parameters)
        return after, record

    def _head(self, number: int) -> Record:
        return {"round": number, **({} if self.facts is None else self.facts(number))}

    def _tell(self, state: RunState, record: Record) -> None:
        for callback in self.callbacks:
            callback.on_round(state, record)
