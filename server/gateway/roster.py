"""The roster of a live run: which devices are in it, at which public level, behind which gateway.

It is closed before round 1 and kept in the run folder: sampling rates, the accountant's counts and
a device's number in the run rest on it. Devices that come later take part in the next run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from sottovoce.client.errors import RunError
from sottovoce.client.messages import read_roster, roster_query
from sottovoce.server.checkpoints import write_atomic
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.placement import Share

ROSTER_FILE = "roster.json"
POLL_S = 0.5


@dataclass(frozen=True)
class Roster:
    """The devices of a run, in the order of their numbers in it.

    `gateways`: names. `gateway`: (devices,) place in `gateways`. `members`: (devices,) numbers at
    the gateway. `levels`: (devices,) uint8, as declared.
    """

    gateways: tuple[str, ...]
    gateway: NDArray[np.int64]
    members: NDArray[np.int64]
    levels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.members)

    def save(self, path: Path) -> None:
        """Write it for the run's resume."""
        values = {
            "gateways": list(self.gateways), "gateway": self.gateway.tolist(),
            "members": self.members.tolist(), "levels": self.levels.tolist(),
        }
        write_atomic(path, json.dumps(values).encode())

    @classmethod
    def load(cls, path: Path) -> Roster:
        """What `save` wrote. RunError where it is gone or damaged."""
        try:
            values = json.loads(path.read_bytes())
            found = cls(
                tuple(map(str, values["gateways"])),
                np.array(values["gateway"], dtype=np.int64),
                np.array(values["members"], dtype=np.int64),
                np.array(values["levels"], dtype=np.uint8),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} cannot be read ({error}): without its roster a live run cannot go on; "
                "start a new run"
            ) from None
        if not len(found.gateway) == len(found.members) == len(found.levels) > 0:
            raise RunError(f"{path} is no roster: its columns differ in length or are empty")
        return found


def gather(answers: list[tuple[str, NDArray[np.int64], NDArray[np.uint8]]]) -> Roster:
    """The roster of what gateways answered, by name, so that their order does not matter.

    RunError where two nodes are the same gateway or a level is impossible.
    """
    answers = sorted(answers, key=lambda answer: answer[0])
    names = [name for name, _, _ in answers]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two nodes say that they are gateway {name!r}: give gateways own names")
    levels = np.concatenate([np.zeros(0, dtype=np.uint8), *(found for _, _, found in answers)])
    if len(levels) and int(levels.max()) > MAX_LEVEL:
        raise RunError(f"a gateway names level {int(levels.max())}; the last is {MAX_LEVEL}")
    sizes = [len(members) for _, members, _ in answers]
    return Roster(
        tuple(names),
        np.repeat(np.arange(len(names)), sizes),
        np.concatenate([np.zeros(0, dtype=np.int64), *(members for _, members, _ in answers)]),
        levels,
    )


def ask(grid: Grid, run: str) -> dict[int, tuple[str, NDArray[np.int64], NDArray[np.uint8]]]:
    """What every connected node answers: name, members and levels; those that fail are left out."""
    messages = [
        Message(roster_query(run), node, "query", group_id="roster")
        for node in sorted(grid.get_node_ids())
    ]
    found = {}
    for reply in grid.send_and_receive(messages) if messages else []:
        if not reply.has_error():
            found[reply.metadata.src_node_id] = read_roster(reply.content)
    return found


def close_roster(
    grid: Grid,
    run: str,
    *,
    devices: int,
    wait_s: float,
    gateways: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Roster:
    """The devices of `run` once `devices` of them are there, behind `gateways` gateways.

    RunError where they are not within `wait_s`.
    """
    deadline, told = time.monotonic() + wait_s, -1
    while True:
        answers = ask(grid, run)
        there = sum(len(members) for _, members, _ in answers.values())
        if there != told:
            say(f"{there} of at least {devices} devices are there")
            told = there
        if there >= devices and len(answers) >= gateways:
            return gather(list(answers.values()))
        if time.monotonic() > deadline:
            raise RunError(
                f"{there} of population.min_devices={devices} devices declared themselves within "
                f"population.wait_s={wait_s:g}: enrol more, wait longer or lower min_devices"
            )
        time.sleep(POLL_S)


class RosterPlacement:
    """Devices where they enrolled. Which node is which gateway is asked anew when nodes change."""

    def __init__(self, roster: Roster, run: str) -> None:
        self.roster, self.run = roster, run
        self._nodes: frozenset[int] = frozenset()
        self._names: dict[str, int] = {}

    def shares(self, devices: NDArray[np.int64], grid: Grid) -> list[Share]:
        """Each gateway's part of a cohort; that of a gateway which is not there has no node."""
        self._learn(grid)
        parts = []
        gateway = self.roster.gateway[devices]
        for place, name in enumerate(self.roster.gateways):
            rows = np.flatnonzero(gateway == place)
            if len(rows):
                members = self.roster.members[devices[rows]]
                parts.append(Share(self._names.get(name), rows, members))
        return parts

    def _learn(self, grid: Grid) -> None:
        nodes = frozenset(grid.get_node_ids())
        if nodes == self._nodes and self._names:
            return
        known = {node: name for name, node in self._names.items() if node in nodes}
        if set(known) != nodes:
            known |= {node: answer[0] for node, answer in ask(grid, self.run).items()}
        self._nodes, self._names = nodes, {name: node for node, name in known.items()}


def describe(roster: Roster) -> dict[str, Any]:
    """Counts for people: devices by gateway and by level."""
    return {
        "devices": len(roster),
        "by_gateway": {
            name: int((roster.gateway == place).sum())
            for place, name in enumerate(roster.gateways)
        },
        "by_level": {
            str(level): count
            for level, count in enumerate(np.bincount(roster.levels).tolist()) if count
        },
    }
