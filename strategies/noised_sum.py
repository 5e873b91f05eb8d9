"""The strategy: sample devices, sum their clipped updates, noise the sum, step, write it down.

Algorithm (DP-FedAvg, McMahan et al. 2018, arXiv:1710.06963, with known inclusion probabilities):

    cohort  <- sampler(round)                      Poisson by public activity level
    total   <- sum over fleets of clipped updates
    release <- (total + noise) / expected cohort   expected and public, never the replies' number
    theta   <- server optimiser(theta, release)
    ledger  <- one event for the round, one more when a level's most frequent device rises
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.fleet import FleetReply, LocalTraining
from sottovoce.client.messages import read_reply, to_record, to_tensors, train_content
from sottovoce.privacy.events import Event, GaussianEvent
from sottovoce.privacy.ledger import Ledger
from sottovoce.privacy.mechanisms import DeviceMechanism
from sottovoce.privacy.noise import NoiseSource
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.optimizers import ServerOptimizer
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.samplers import Sampler

Tensors = dict[str, Tensor]

log = logging.getLogger(__name__)


@dataclass
class Round:
    """One round in flight: who was asked, and by which level."""

    number: int
    parameters: dict[str, Tensor]
    devices: NDArray[np.int64]
    levels: NDArray[np.uint8]
    sent: dict[int, Counter[int]] = field(default_factory=dict)  # node -> devices by level


class NoisedSum(Strategy):
    """Flower strategy of a private run. See the module's algorithm.

    `activity`: (devices,) of which only levels are read. `mechanism`: None for a run without
    device-level noise. `training`: what devices do, as far as accounting must know it. `settings`:
    the run's, as YAML, for the fleets.

    *Guarantee*: device unit, observer `release`: `DeviceMechanism` at the sampler's rates, every
    round an event in `ledger`; example unit, observer `server`: the fleets' noised steps.
    *Assumes*: the sampler's coins are secret; fleets are honest.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        activity: NDArray[np.unsignedinteger],
        optimizer: ServerOptimizer,
        mechanism: DeviceMechanism | None,
        training: LocalTraining,
        ledger: Ledger,
        participation: Participation,
        source: NoiseSource,
        settings: str,
    ) -> None:
        self.sampler, self.activity, self.optimizer = sampler, activity, optimizer
        self.mechanism, self.training, self.ledger = mechanism, training, ledger
        self.participation, self.source, self.settings = participation, source, settings
        self.current: Round | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each fleet that hosts a sampled device (device id modulo fleets)."""
        devices = self.participation.allowed(self.sampler.sample(server_round))
        levels = activity_levels(self.activity[devices])
        self.current = Round(server_round, to_tensors(arrays), devices, levels)
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise RunError("no fleet is connected: start at least one node")
        messages = []
        for place, node in enumerate(nodes):
            share = devices[devices % len(nodes) == place]
            if len(share):
                asked = levels[devices % len(nodes) == place]
                self.current.sent[node] = Counter(asked.tolist())
                content = train_content(arrays, share, server_round, self.settings)
                group = str(server_round)
                messages.append(Message(content, node, "train", group_id=group))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Sum, noise, step; the ledger has the round's events when this returns."""
        current = self.current
        assert current is not None and current.number == server_round
        total, complaints = self._collect(current, replies)
        for event in self._events(current):
            self.ledger.append(event)
        release, deviation = self._release(total, server_round)
        expected = self.sampler.expected_cohort_size
        update = {name: tensor / expected for name, tensor in release.items()}
        parameters = self.optimizer.step(current.parameters, update)
        metrics = self._metrics(current, total, update, deviation)
        if complaints:
            metrics["bad_replies"] = len(complaints)
            log.warning("\n".join(complaints))
        return to_record(parameters), MetricRecord(metrics)  # type: ignore[arg-type]

    def events_ahead(self) -> list[Event]:
        """Events that the next round may at most append: what a budget stop must reckon with."""
        levels = [lv for lv in sorted(self.sampler.rates) if self.participation.may_rise(lv)]
        return self._device_events(None) + self._example_events(levels, None)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nothing: the coordinator evaluates on held-out devices itself."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing to log: the run folder says it."""

    def _collect(self, current: Round, replies: Iterable[Message]) -> tuple[FleetReply, list[str]]:
        """The fleets' sums added up; a bad reply loses its devices, not the round."""
        zero = {name: tensor.new_zeros(tensor.shape) for name, tensor in current.parameters.items()}
        total = FleetReply(zero, {}, 0)
        waiting = dict(current.sent)
        complaints = []
        for message in replies:
            node = message.metadata.src_node_id
            try:
                reply = _checked(message, current.parameters, waiting.get(node, Counter()))
            except RunError as error:
                complaints.append(f"round {current.number}: {error}; its devices count as dropped")
                continue
            if waiting.pop(node, None) is not None:
                _add(total, reply)
        total.dropped += sum(asked.total() for asked in waiting.values())
        return total, complaints

    def _release(self, total: FleetReply, server_round: int) -> tuple[dict[str, Tensor], float]:
        if self.mechanism is None:
            return total.sums, 0.0
        local = sum(
            count * self.training.noise_variance(level)
            for level, count in total.devices_by_level.items()
        )
        generator = self.source.generator("central noise", server_round)
        return self.mechanism.release(total.sums, local, generator), self.mechanism.deviation

    def _events(self, current: Round) -> list[Event]:
        risen = self.participation.add(current.devices, current.levels)
        return self._device_events(current.number) + self._example_events(risen, current.number)

    def _device_events(self, server_round: int | None) -> list[Event]:
        if self.mechanism is None:
            return []
        rates = sorted(self.sampler.rates.items())
        fixed = self.sampler.sampling == "fixed_size"
        return [
            GaussianEvent(
                noise_multiplier=self.mechanism.noise_multiplier,
                sampling=self.sampler.sampling,
                by_level=tuple((level, rate, 1) for level, rate in rates),
                unit="device",
                relation="replace_one" if fixed else "add_remove",
                observer="release",
                purpose="noised sum of device updates",
                round=server_round,
            )
        ]

    def _example_events(self, levels: list[int], server_round: int | None) -> list[Event]:
        example, plan = self.training.example, self.training.plan
        if example is None or not levels:
            return []
        entries = tuple((lv, plan.rate(lv), plan.steps(lv, 1 << lv)) for lv in levels)
        return [
            GaussianEvent(
                noise_multiplier=example.noise_multiplier,
                sampling="poisson",
                by_level=entries,
                unit="example",
                relation="add_remove",
                observer="server",
                purpose="eDP-SGD steps of one participation",
                round=server_round,
            )
        ]

    def _metrics(
        self, current: Round, total: FleetReply, update: dict[str, Tensor], deviation: float
    ) -> dict[str, int | float | list[int]]:
        devices = sum(total.devices_by_level.values())
        examples = total.totals.get("examples", 0.0)
        levels, counts = np.unique(current.levels, return_counts=True)
        signal = _norm(total.sums)
        size = sum(tensor.numel() for tensor in update.values())
        metrics: dict[str, int | float | list[int]] = {
            "devices": devices,
            "dropped": total.dropped,
            "examples": int(examples),
            "levels": levels.tolist(),
            "devices_by_level": counts.tolist(),
            "update_norm": _norm(update),
            "clipped_fraction": total.totals.get("clipped_devices", 0.0) / max(devices, 1),
            "example_clipped_fraction": total.totals.get("clipped_examples", 0.0)
            / max(examples, 1.0),
            "mean_signal_norm": total.totals.get("norm", 0.0) / max(devices, 1),
        }
        if examples and devices:
            metrics["train_loss"] = total.totals.get("loss", 0.0) / examples
        if deviation:
            metrics["signal_to_noise"] = signal / (deviation * math.sqrt(size))
        return metrics


def _checked(message: Message, expected: Tensors, asked: Counter[int]) -> FleetReply:
    """The fleet's answer; RunError where it failed or where this is none to what was asked."""
    node = message.metadata.src_node_id
    if message.has_error():
        raise RunError(f"fleet {node} failed: {message.error.reason}")
    try:
        reply = read_reply(message.content, expected)
    except RunError:
        raise
    except Exception as error:  # whatever a foreign record makes numpy and Flower raise
        raise RunError(f"fleet {node} sent what is no reply: {error!r}") from error
    answered = reply.devices_by_level
    counted = sum(answered.values()) + reply.dropped
    if min(answered.values(), default=0) < 0 or Counter(answered) - asked or reply.dropped < 0:
        raise RunError(f"fleet {node} answers for devices that it was not asked for")
    if counted != asked.total():
        raise RunError(f"fleet {node} answers for {counted} of {asked.total()} devices")
    return reply


def _add(total: FleetReply, reply: FleetReply) -> None:
    for name, tensor in reply.sums.items():
        total.sums[name] += tensor
    for level, count in reply.devices_by_level.items():
        total.devices_by_level[level] = total.devices_by_level.get(level, 0) + count
    total.dropped += reply.dropped
    for name, value in reply.totals.items():
        total.totals[name] = total.totals.get(name, 0.0) + value


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors.values()))
