"""Which node of a grid hosts which devices of a cohort.

Simulated devices lie on any node: every one can make them. Real ones are reached through the
gateway where they enrolled, and only while it is connected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from sottovoce.client.errors import RunError


@dataclass(frozen=True)
class Share:
    """A node's part of a cohort.

    `node`: None where nobody hosts these devices at the moment: they are asked in vain. `rows`:
    their places in the cohort. `members`: (rows,) their numbers on the node, None where they have
    no others than the run's.
    """

    node: int | None
    rows: NDArray[np.int64]
    members: NDArray[np.int64] | None = None


class Placement(Protocol):
    """Where the devices of a cohort are."""

    def shares(self, devices: NDArray[np.int64], grid: Grid) -> list[Share]:
        """The parts of a cohort (sorted), none of them empty. RunError where no node is there."""


class AnyNode:
    """Simulated devices: device d is trained by node d modulo the number of nodes."""

    def shares(self, devices: NDArray[np.int64], grid: Grid) -> list[Share]:
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise RunError("no fleet is connected: start at least one node")
        parts = [np.flatnonzero(devices % len(nodes) == place) for place in range(len(nodes))]
        return [Share(node, rows) for node, rows in zip(nodes, parts, strict=True) if len(rows)]
