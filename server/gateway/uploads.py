"""Reading an update from its stream, with a bound on what all streams hold together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sottovoce.client.protocol.device_pb2 import UploadHead, UploadPart
from sottovoce.server.gateway.rounds import OPEN, DeviceTask, Round
from sottovoce.server.gateway.validation import BYTES, MALFORMED, Refused

MIN_BYTES_PER_S = 8 * 1024  # of an upload on average, once it is let in
SMALLEST_PART = 4 * 1024  # on average, beyond a few parts for each tensor


class Broken(Exception):
    """An upload that ended before it was whole: nothing of it is kept, it may be sent again."""


class InFlight:
    """Bytes of updates that are being read, at most `limit`; in turn where they do not fit.

    One upload is always read, however large. The others are not read from, so that their devices
    are held back by the transport's own flow control.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taking(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes, waiting for them if need be."""
        if self._waiting or not self._fits(size):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)
                else:
                    self._waiting.remove((size, turn))
                raise
        else:
            self.used += size
        try:
            yield
        finally:
            self._give_back(size)

    def _fits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self.limit

    def _give_back(self, size: int) -> None:
        self.used -= size
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.used += size
                turn.set_result(None)


async def receive(
    current: Round,
    task: DeviceTask,
    head: UploadHead,
    parts: AsyncIterator[UploadPart | None],
    in_flight: InFlight,
    *,
    stall_s: float,
    allowed: Callable[[], bool],
    count: Callable[[float], object],
) -> bool:
    """Read the rest of an upload of `task` and bring it before its round.

    Whether this stream decided on the task. `allowed`: asked once more before the update counts.
    `count`: told of received bytes. Raises Broken where the stream stalls, ends early, or is let
    go of while the round goes on.
    """
    try:
        current.expected.check(head)
        with current.streaming(task, stall_s) as limit:
            async with limit:
                limit.reschedule(current.deadline)
                async with in_flight.taking(current.expected.total_bytes):
                    data = await _data(current, head, parts, limit, stall_s, count)
                    if not allowed():
                        raise Broken("no open session")
                    limit.reschedule(None)
                    return await current.take_in(task, head, data)
    except Refused as refused:
        return current.refuse(task, refused.reason)
    except TimeoutError:
        if current.closed or task.state != OPEN:
            return False
        raise Broken("upload stalled") from None


async def _data(
    current: Round,
    head: UploadHead,
    parts: AsyncIterator[UploadPart | None],
    limit: asyncio.Timeout,
    stall_s: float,
    count: Callable[[float], object],
) -> bytearray:
    """The data of an upload, of just the size that its head says."""
    total = current.expected.total_bytes
    parts_left = 16 + 2 * len(head.tensors) + total // SMALLEST_PART
    slowest = asyncio.get_running_loop().time() + stall_s + total / MIN_BYTES_PER_S
    data = bytearray()
    while True:
        limit.reschedule(min(slowest, current.next_limit(stall_s)))
        part = await anext(parts, None)
        if part is None:
            break
        parts_left -= 1
        if part.WhichOneof("part") != "data" or parts_left < 0:
            raise Refused(MALFORMED)
        count(len(part.data))
        current.result.bytes_up += len(part.data)
        if len(data) + len(part.data) > total:
            raise Refused(BYTES)
        data += part.data
    if len(data) < total:  # a lost connection looks the same: the device may send it again
        raise Broken("the upload ended early")
    return data
