"""One task's life on a device: taken or declined, trained, counted, spooled, handed over.

What the journal says of a task is what may still happen to it:

    nothing, begun    nothing of it was ever sent: it may be trained, again if need be
    sending           the spooled bytes were perhaps sent: they alone may be
    anything else     it is over

*Guarantee*: whatever instruction the process is killed at, no two different updates are sent for a
task, and none is sent that the journal had not counted.
*Assumes*: the journal and the spool keep what they say is on the disk; the noise of a training is
drawn for it alone.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sottovoce.client.agent.connection import (
    Connection,
    Malformed,
    NotKnown,
    OtherProtocol,
    Refused,
    Unreachable,
)
from sottovoce.client.agent.journal import BEGUN, Journal
from sottovoce.client.agent.logs import say
from sottovoce.client.agent.preparation import Declined, Preparation, Prepared
from sottovoce.client.agent.residual import Residuals, compensated, lost
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.agent.threads import in_thread
from sottovoce.client.agent.update_spool import TASK_ID, Spool, Spooled
from sottovoce.client.agent.work import DeviceData, NotFinite, Trained
from sottovoce.client.errors import ConfigError, SottovoceError
from sottovoce.client.protocol import device_pb2 as messages
from sottovoce.client.spec_models import MissingModel
from sottovoce.client.task_spec import TaskSpec
from sottovoce.privacy.mechanisms.noise import NoiseSource

TrainFunction = Callable[[TaskSpec, messages.Task, dict[str, Any], DeviceData], Trained]

SENDING = "sending"
LOST = "lost"
OUTCOMES = {
    messages.ACCEPTED: "accepted", messages.DUPLICATE: "accepted", messages.LATE: "late",
    messages.REFUSED: "refused",
}  # fmt: skip
DONE = ("accepted", "late", "refused", "declined", LOST)
"""What may become of a task: keys of `TaskWork.counts`."""

MOST_ATTEMPTS = 50  # hours at the longest backoff: every round is over by then
LEAST_UPLOAD_S = 30.0


class TaskWork:
    """Does a device's tasks. `unfit`: why it may not work now, or None. `train`, `source`,
    `models`: as of the agent. `transfer_s`: for a download or upload without a deadline.
    """

    def __init__(
        self,
        store: DeviceStore,
        journal: Journal,
        connection: Connection,
        preparation: Preparation,
        unfit: Callable[[], Awaitable[str | None]],
        train: TrainFunction,
        source: NoiseSource | None,
        models: Path | None,
        *,
        transfer_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.journal, self.connection = store, journal, connection
        self.preparation, self.unfit, self.train = preparation, unfit, train
        self.source, self.models, self.transfer_s = source, models, transfer_s
        self.spool = Spool(store.folder / "spool")
        self.residuals = Residuals(store.folder / "spool" / "residual")
        self.counts: Counter[str] = Counter()
        self.training = self.delivering = False
        self._clock, self._attempts = clock, Counter[str]()

    async def take(self, order: messages.Task) -> bool:
        """Do a task, or decline it; whether its update was handed over."""
        if not TASK_ID.fullmatch(order.id):
            raise Refused("the gateway gives a task without a usable id")
        state = self.journal.state(order.id)
        if state not in (None, BEGUN):
            await self._decline(order.id, "failed", "this task is over", note=False)
            return False
        began = self._clock()
        left_s = order.deadline_ms / 1000 or self.transfer_s
        say("task", task=order.id, run=order.run, round=order.round)
        try:
            prepared = await self.preparation.prepare(order, left_s)
            reason = await self.unfit()
            if reason is not None:
                raise Declined("busy", reason)
            trained = await self._trained(prepared)
            late = self._clock() - began > left_s
            spooled = None if late else self._committed(prepared, trained)
        except (Unreachable, NotKnown, OtherProtocol):
            raise
        except Exception as error:
            reason, sentence = refusal(error)
            await self._decline(order.id, reason, sentence)
            return False
        if spooled is None:
            self._over(order.id, "late")
            return False
        await self.deliver(spooled, max(left_s - (self._clock() - began), LEAST_UPLOAD_S))
        return True

    async def _trained(self, prepared: Prepared) -> Trained:
        declared = self.journal.declared(prepared.order.run)
        assert declared is not None
        began = self._clock()
        self.training = True
        try:
            found = await in_thread(lambda: self.train(
                prepared.spec, prepared.order, prepared.parameters,
                DeviceData(
                    self.store.rows(declared.snapshot), declared.level,
                    self.source or NoiseSource.from_system(), self.models,
                ),
            ))  # fmt: skip
        except Exception as error:
            of_machine = isinstance(error, SottovoceError | OSError)  # or of the specification
            if isinstance(error, NotFinite) or not of_machine:  # to say so may tell of the examples
                order = prepared.order
                self.journal.begin(order.id, order.run, order.round, prepared.cost)
            raise
        finally:
            self.training = False
            gc.collect()  # models hold on to themselves: wait for the collector, and they pile up
        say("trained", task=prepared.order.id, seconds=round(self._clock() - began, 3))
        return found

    def _committed(self, prepared: Prepared, trained: Trained) -> Spooled:
        """Count the participation, then put the update on the disk; from then on it may be sent."""
        order, encoding = prepared.order, prepared.order.upload_encoding
        self.journal.begin(order.id, order.run, order.round, prepared.cost)
        update = trained.update
        if encoding != "fp32":
            update = compensated(
                update, self.residuals.of(order.run, update), prepared.clip_norm
            )
            self.residuals.prepare(order.id, lost(update, encoding))
        noised = prepared.spec.training["example"] is not None  # which does not cover that bit
        clipped = trained.clipped and prepared.spec.reports_clipped and not noised
        spooled = self.spool.write(order.id, order.run, update, encoding, clipped=clipped)
        self.journal.finished(order.id, SENDING)
        return spooled

    async def deliver(self, spooled: Spooled, timeout_s: float) -> None:
        """Send a spooled update until there is a receipt. Raises Unreachable to be tried again."""
        began = self._clock()
        if self.journal.state(spooled.task) != SENDING:
            # The process ended between spool and journal: nothing was sent, and it may be now.
            self.journal.finished(spooled.task, SENDING)
        self.delivering = True
        try:
            receipt = await self.connection.upload(spooled.parts, timeout_s)
            outcome = OUTCOMES.get(receipt.outcome, "refused")
            why = receipt.reason[:200]
        except Refused as error:
            outcome, why = "refused", str(error)
        except Unreachable as error:
            self._attempts[spooled.task] += 1
            if self._attempts[spooled.task] < MOST_ATTEMPTS:
                raise
            outcome, why = LOST, str(error)
        finally:
            self.delivering = False
        del self._attempts[spooled.task]
        say(
            "handed over", task=spooled.task, outcome=outcome, why=why, bytes=spooled.sent_bytes,
            seconds=round(self._clock() - began, 3),
        )  # fmt: skip
        self._over(spooled.task, outcome, spooled.run)

    def _over(self, task: str, outcome: str, run: str = "") -> None:
        """A task has ended: the journal first, then its files."""
        if self.journal.state(task) is not None:
            self.journal.finished(task, outcome)
        self.residuals.settle(task, run, accepted=outcome == "accepted")
        self.spool.remove(task)
        self.counts[outcome] += 1

    async def _decline(self, task: str, reason: str, sentence: str, *, note: bool = True) -> None:
        say("declined", task=task, reason=reason, why=sentence[:300])
        if note:
            self._over(task, "declined")
        try:
            await self.connection.decline(task, reason)
        except Refused as error:
            say("not declined", why=str(error))

    def recover(self) -> None:
        """Sort out what an earlier process left in the spool."""
        for task in self.spool.tasks():
            if not TASK_ID.fullmatch(task):
                continue
            state = self.journal.state(task)
            if state not in (BEGUN, SENDING):  # its receipt came, or it was never counted
                self.spool.remove(task)
            elif self.spool.find(task) is None:  # perhaps sent, and not whole any more
                self._over(task, LOST)


def refusal(error: Exception) -> tuple[str, str]:
    """Reason for the gateway and sentence for the log of a task that cannot be done."""
    if isinstance(error, Declined):
        return error.reason, error.sentence
    if isinstance(error, MemoryError):
        return "memory", "there is not enough memory"
    if isinstance(error, MissingModel):
        return "model", str(error)
    if isinstance(error, ConfigError) and "not installed" in str(error):
        return "model", str(error)
    if isinstance(error, SottovoceError | OSError | Refused | Malformed):
        return "failed", str(error)
    return "failed", type(error).__name__  # its text may be of the examples
