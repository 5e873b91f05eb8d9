"""How fast anyone may call: token buckets, in a table that does not grow."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

MAX_BUCKETS = 20_000


class Buckets:
    """A bucket for each caller: `burst` calls at once, `per_s` a second from then on.

    Of more than `MAX_BUCKETS` callers the one that was quiet longest is forgotten.
    """

    def __init__(
        self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_s, self.burst, self.clock = per_s, burst, clock
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, caller: Hashable, cost: float = 1.0) -> bool:
        """Whether `caller` may make a call now; if so, it is counted.

        A cost above what is left empties the bucket.
        """
        now = self.clock()
        left, since = self._left.pop(caller, (self.burst, now))
        left = min(self.burst, left + max(0.0, now - since) * self.per_s)
        allowed = left >= 1
        self._left[caller] = (max(0.0, left - cost) if allowed else left, now)
        if len(self._left) > MAX_BUCKETS:
            self._left.popitem(last=False)
        return allowed

    def __len__(self) -> int:
        return len(self._left)


def caller_address(peer: str) -> str:
    """The address in a gRPC peer, without its port; of IPv6 the /64 that one household has.

    "ipv4:10.0.0.7:52114" -> "10.0.0.7"; "unix:" and whatever cannot be read: as they are.
    """
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False).network_address)
    return str(address)
