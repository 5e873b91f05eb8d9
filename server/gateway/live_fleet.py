"""The live fleet: real devices behind a gateway, as a Flower node sees them.

The node's part is small: it tells the gateway what a round is, waits, and hands over the sum. The
gateway runs in this process (`sottovoce serve`), or in one of its own that outlives Flower's
short-lived ClientApps and is reached through the socket in its folder.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from flwr.app import UserConfig
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.fleet import Fleet, FleetReply, LocalTraining
from sottovoce.client.task_spec import task_spec
from sottovoce.server.gateway.orders import Member, RoundOrder, RoundResult
from sottovoce.simulations.experiment import Experiment, build_experiment
from sottovoce.strategies.levels import MAX_LEVEL

GATEWAY = "gateway"  # key of the node configuration: the gateway's folder
FAR = 8.0  # deviations that the norm of a device's own noise stays below, but for 1 in 10^13

log = logging.getLogger(__name__)


class Served(Protocol):
    """What a fleet asks of a gateway, here or in another process."""

    def announce(self, run: str) -> None: ...
    def roster(self, run: str) -> list[Member]: ...
    def train(self, order: RoundOrder) -> RoundResult: ...
    def note_privacy(self, unit: str, spent: float, budget: float | None) -> None: ...


_here: dict[str, tuple[str, Served]] = {}  # by folder: name and gateway of this process


def serve_here(folder: Path, name: str, gateway: Served) -> None:
    """Let this process' nodes find the gateway that it runs itself."""
    _here[str(folder.resolve())] = (name, gateway)


def gateways_here() -> list[Served]:
    """The gateways that this process runs."""
    return [gateway for _, gateway in _here.values()]


class Door:
    """A node's way to its gateway. `name`: the gateway's."""

    def __init__(self, name: str, served: Served) -> None:
        self.name, self.served = name, served

    def roster(self, run: str) -> tuple[str, NDArray[np.int64], NDArray[np.uint8]]:
        """The gateway's name, and the devices that declared a level for `run` so far."""
        self.served.announce(run)
        found = sorted(self.served.roster(run), key=lambda member: member.device)
        return (
            self.name,
            np.array([member.device for member in found], dtype=np.int64),
            np.array([member.level for member in found], dtype=np.uint8),
        )


def gateway_of(node_config: UserConfig) -> Door:
    """The gateway of a node. ConfigError where the node has none, RunError where it is not up."""
    if GATEWAY not in node_config:
        raise ConfigError(
            "this node has no gateway: start it with --node-config 'gateway=\"FOLDER\"'"
        )
    folder = Path(str(node_config[GATEWAY])).resolve()
    if str(folder) in _here:
        return Door(*_here[str(folder)])
    from sottovoce.server.gateway.control import GatewayClient

    client = GatewayClient(folder)
    return Door(str(client.status()["name"]), client)


@lru_cache(maxsize=2)
def live_fleet(settings: str, folder: str) -> LiveFleet:
    """The fleet of a node for a run's settings; the last ones are kept for the next round."""
    return LiveFleet(build_experiment(settings), gateway_of({GATEWAY: folder}).served)


class LiveFleet(Fleet):
    """Real devices of an experiment behind `gateway`.

    *Guarantee*: the sum has each accepted device once, and is empty unless `min_cohort` of them
    were accepted. A gateway refuses updates that are longer than an honest device's can be
    (`norm_bounds`): with a bound S and no noise of the devices' own that is S, whoever sends it.
    *Assumes*: with noise of their own, that devices clip their signals; against devices that do
    not, only the norm of the whole update is bounded.
    """

    def __init__(self, experiment: Experiment, gateway: Served) -> None:
        config = experiment.config
        self.gateway, self.training = gateway, experiment.training
        self.settings, self.run = config.population, str(config.population.run)
        self.spec = task_spec(experiment, self.run).to_bytes()
        self.adaptive = config.privacy.device.enabled and (
            config.privacy.device.get("clipping") == "adaptive"
        )
        self._moved = False
        self._members: dict[int, int] = {}

    def set_clip_norm(self, clip_norm: float | None) -> None:
        """As every fleet; devices are told of a bound that moved."""
        self._moved = self._moved or clip_norm is not None
        super().set_clip_norm(clip_norm)

    def call(self, devices: NDArray[np.int64], members: NDArray[np.int64]) -> None:
        """Learn by which numbers the gateway knows the run's `devices`."""
        self._members = dict(zip(devices.tolist(), members.tolist(), strict=True))

    def train(
        self,
        parameters: dict[str, Tensor],
        devices: NDArray[np.int64],
        server_round: int,
        levels: NDArray[np.uint8] | None = None,
    ) -> FleetReply:
        """The sum of the devices' updates once all have answered or the round's time is up."""
        if levels is None:
            raise RunError("real devices are counted under their declared levels: send them")
        training = self.training.at(server_round)
        result = self.gateway.train(RoundOrder(
            run=self.run,
            round=server_round,
            spec=self.spec,
            parameters=parameters,
            devices=np.array([self._members[d] for d in devices.tolist()], dtype=np.int64),
            numbers=devices.tolist(),
            levels=levels,
            clip_norm=training.update_clip_norm if self._moved else None,
            norm_bounds=norm_bounds(training, sum(t.numel() for t in parameters.values())),
            deadline_s=float(self.settings.deadline_s),
            upload_encoding=str(self.settings.upload_encoding),
            download_encoding=str(self.settings.download_encoding),
            counts_clipped=self.adaptive,
        ))
        return self._reply(result, parameters, len(devices), levels)

    def _reply(
        self,
        result: RoundResult,
        parameters: dict[str, Tensor],
        asked: int,
        levels: NDArray[np.uint8],
    ) -> FleetReply:
        log.info(
            "asked %d, accepted %d, declined %d, late %d, silent %d, refused %s",
            asked, result.accepted, result.declined, result.late, result.silent, result.refused,
        )
        absent = {
            "unavailable": float(result.silent),
            "failed": float(result.declined),
            "late": float(result.late),
        }
        if result.accepted < int(self.settings.min_cohort):
            zero = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
            return FleetReply(zero, {}, asked, absent)
        totals = absent | {
            "examples": _expected_visits(self.training, result.accepted_by_level)
        }
        if self.adaptive:
            totals["clipped_devices"] = float(result.clipped)
        sums = {name: result.sums[name].float() for name in parameters}
        return FleetReply(sums, result.accepted_by_level, asked - result.accepted, totals)


def norm_bounds(training: LocalTraining, parameters: int) -> dict[int, float]:
    """Largest norm of an honest device's update, by level; empty where nothing bounds it.

    Beside a signal of norm S passes noise of the device's own: `parameters` independent Gaussians.
    """
    clip_norm = training.update_clip_norm
    if clip_norm is None:
        return {}
    bounds = {}
    for level in range(MAX_LEVEL + 1):
        deviation = math.sqrt(training.noise_variance(level))
        bounds[level] = clip_norm + deviation * (math.sqrt(parameters) + FAR)
    return bounds


def _expected_visits(training: LocalTraining, devices: dict[int, int]) -> float:
    """Examples that the accepted devices visited, by their levels: they do not say how many."""
    plan = training.plan
    return float(sum(
        count * min(plan.local_epochs * plan.max_examples,
                    plan.steps(level, 1 << level) * plan.batch_size)
        for level, count in devices.items()
    ))
