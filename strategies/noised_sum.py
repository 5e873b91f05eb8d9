"""The strategy: sample devices, sum their clipped updates, noise the sum, step, write it down.

Algorithm (DP-FedAvg, McMahan et al. 2018, arXiv:1710.06963, with known inclusion probabilities):

    cohort  <- sampler(round)                      Poisson by public activity level
    total   <- sum over fleets of clipped updates
    release <- (total + noise) / divisor           public, never the replies' number
    theta   <- server optimiser(theta, release)
    ledger  <- one event for the round, more when a level's most frequent device rises
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.fleet import ABSENCES, PARTIAL, FleetReply, LocalTraining
from sottovoce.client.messages import read_reply, to_record, to_tensors, train_content
from sottovoce.privacy.accounting.events import Event, GaussianEvent, LevelEntry
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.adaptive import AdaptiveMechanism
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism
from sottovoce.privacy.mechanisms.device import DeviceMechanism
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.private_metrics import PrivateMetrics
from sottovoce.strategies.canary_watch import CanaryWatch
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.optimizers import ServerOptimizer
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.placement import AnyNode, Placement
from sottovoce.strategies.projection import projected
from sottovoce.strategies.samplers import Sampler
from sottovoce.strategies.windowed import Row, WindowedParticipation

Tensors = dict[str, Tensor]
Mechanism = DeviceMechanism | AdaptiveMechanism | CorrelatedMechanism

CENTRAL_NOISE = "central noise"
COUNT_NOISE = "noise on the count of clipped devices"
METRICS_NOISE = "noise on training metrics"

SUMMED = "noised sum of device updates"
COUNTED = f"{SUMMED} and noised count of unclipped ones, together"
MEASURED = ", and noised training metrics under the same sample"

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

    `activity`: (devices,) of which only levels are read, or nothing where `sampler` has reports; on
    a timeline a function from the round to it, and `participation` a windowed one.
    `mechanism`: None for a run without device-level noise. `training`: what devices do, as far as
    accounting must know it. `settings`: the run's, as YAML, for the fleets. `private_metrics`: how
    training metrics are noised, whose `rest` is the mechanism's multiplier; None: they are exact.
    `divisor`: of the noised sums, a public constant; None: the sampler's expected cohort.
    `projection`: devices for which each one that trains stands; other than 1, nothing is
    guaranteed of this run (`sottovoce.strategies.projection`). `canaries`: who watches the run's
    canary devices, if it has any. `placement`: of devices on nodes; None: any node will do.

    *Guarantee*: device unit, observer `release`: the mechanism's, at the sampler's rates where it
    is not correlated, every round an event in `ledger`; example unit, observer `server`: the
    fleets' noised steps. Nobody takes part but as `participation` allows, whatever is drawn: who
    was asked has taken part there, answer or not. An asked device that does not answer only makes
    its true inclusion probability smaller than the accounted one.
    *Assumes*: the sampler's coins are secret where rates are claimed; fleets are honest; whether a
    device answers does not depend on its data, given its level.
    """

    def __init__(
        self,
        *,
        sampler: Sampler,
        activity: NDArray[np.unsignedinteger] | Callable[[int], NDArray[np.unsignedinteger]],
        optimizer: ServerOptimizer,
        mechanism: Mechanism | None,
        training: LocalTraining,
        ledger: Ledger,
        participation: Participation,
        source: NoiseSource,
        settings: str,
        private_metrics: PrivateMetrics | None = None,
        divisor: float | None = None,
        projection: float = 1.0,
        canaries: CanaryWatch | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.placement: Placement = placement or AnyNode()
        self.canaries = canaries
        self.private_metrics = private_metrics
        self.divisor = sampler.expected_cohort_size if divisor is None else divisor
        self.projection = projection
        self.lost = Counter[int]()  # rounds asked for before, whose figures may be out: how often
        self.sampler, self.activity, self.optimizer = sampler, activity, optimizer
        self.mechanism, self.training, self.ledger = mechanism, training, ledger
        self.participation, self.source, self.settings = participation, source, settings
        self.current: Round | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each fleet that hosts a sampled device (`placement`)."""
        drawn = self.sampler.sample(server_round, self.lost[server_round])
        devices = self.participation.allowed(drawn, server_round)
        if self.canaries is not None:
            devices = self.canaries.admit(devices)
        reported = self.sampler.reported
        levels = self._levels(devices, server_round) if reported is None else reported[devices]
        self.current = Round(server_round, to_tensors(arrays), devices, levels)
        mechanism = self.mechanism
        clip_norm = mechanism.clip_norm if isinstance(mechanism, AdaptiveMechanism) else None
        messages = []
        for place, share in enumerate(self.placement.shares(devices, grid)):
            asked = levels[share.rows]
            node = -1 - place if share.node is None else share.node
            self.current.sent[node] = Counter(asked.tolist())
            if share.node is None:
                continue
            told = reported is not None or share.members is not None
            content = train_content(
                arrays, devices[share.rows], server_round, self.settings, clip_norm,
                asked if told else None, share.members,
            )
            messages.append(Message(content, node, "train", group_id=str(server_round)))
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
        whole = projected(total, self.projection)
        release, deviation = self._release(whole, server_round)
        update = {name: tensor / self.divisor for name, tensor in release.items()}
        if self.canaries is not None:
            self.canaries.observe(
                server_round, update, deviation=deviation,
                clip_norm=None if self.mechanism is None else self.mechanism.clip_norm,
                answered=sum(total.devices_by_level.values()),
            )
        parameters = self.optimizer.step(current.parameters, update)
        if self.private_metrics is None:
            metrics = self._metrics(current, total, update, deviation)
        else:
            metrics = self._noised_metrics(whole, server_round)
        self._observe(whole, server_round)
        if complaints:
            if self.private_metrics is None:
                metrics["bad_replies"] = len(complaints)
            log.warning("\n".join(complaints))
        return to_record(parameters), MetricRecord(metrics)  # type: ignore[arg-type]

    def book_lost(self, server_round: int, *, again: bool = False) -> None:
        """Book a round that fleets were asked for but whose sums were lost, before it is repeated.

        Nodes draw other batches and noise the second time, so for the `server`, who may have seen
        both, a device's examples were released twice. Every level pays for a participation with
        that round's noise, beside those that are counted. Private metrics of the round, which may
        be out with the noise that would be drawn again, are not released a second time. The round
        itself gets a new sample and new central noise. `again`: the ledger has this loss already.
        """
        self.lost[server_round] += 1
        if again:
            return
        example, plan = self.training.at(server_round).example, self.training.plan
        if example is not None and isinstance(self.participation, WindowedParticipation):
            raise RunError(
                f"round {server_round} was asked for before, and on a timeline nobody can tell "
                "which profiles of participation a repetition would add to: start a new run"
            )
        if example is not None:
            levels = sorted(self.sampler.rates)
            self.ledger.append(_example_event(
                example.noise_multiplier / example.multiple,
                [(level, plan.rate(level), plan.steps(level, 1 << level)) for level in levels],
                server_round,
            ))

    def _generator(self, purpose: str, server_round: int) -> np.random.Generator:
        """Of the coordinator's noise for a round: a round done again has its own.

        A release with the same noise as one that may be out already would show the difference of
        the two sums. Correlated noise stays: later rounds take it off again, a run that goes on
        draws it once more for them, and none that may be out goes on (`training.keep_releases`).
        """
        correlated = isinstance(self.mechanism, CorrelatedMechanism)
        again = (self.lost[server_round],) if self.lost[server_round] and not correlated else ()
        return self.source.generator(purpose, server_round, *again)

    def events_ahead(self) -> list[Event]:
        """Events that the next round may at most append: what a budget stop must reckon with."""
        if isinstance(self.participation, WindowedParticipation):
            return self._windowed_ahead(self.participation)
        worst = self.participation.worst
        ahead = {
            level: worst.get(level, 0) + 1
            for level in sorted(self.sampler.rates)
            if self.participation.may_rise(level)
        }
        return self._device_events(None) + self._example_events(ahead, None)

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
        training, mechanism = self.training.at(server_round), self._mechanism(server_round)
        local = sum(
            count * training.noise_variance(level)
            for level, count in total.devices_by_level.items()
        )
        if local and self.projection != 1:
            raise RunError("devices' own noise cannot stand for that of a larger cohort")
        generator = self._generator(CENTRAL_NOISE, server_round)
        return mechanism.release(total.sums, local, generator), mechanism.deviation

    def _observe(self, total: FleetReply, server_round: int) -> None:
        """Let a clip norm that moves see how many devices were clipped; the last act of a round."""
        if isinstance(self.mechanism, AdaptiveMechanism):
            devices = sum(total.devices_by_level.values())
            clipped = total.totals.get("clipped_devices", 0.0)
            generator = self._generator(COUNT_NOISE, server_round)
            self.mechanism.observe(devices, clipped, generator)

    def mechanism_state(self) -> Tensors:
        """What of the mechanism a checkpoint must hold; noise is drawn anew from its source."""
        mechanism = self.mechanism
        return mechanism.state() if isinstance(mechanism, AdaptiveMechanism) else {}

    def _mechanism(self, server_round: int) -> Mechanism:
        """That of a round: where devices' noise decays, so does the bound on its variance.

        All variances of a round are those of round 1 times the same public number, and the bound,
        a linear function of them, with it.
        """
        assert self.mechanism is not None
        if not isinstance(self.mechanism, DeviceMechanism):
            return self.mechanism
        first, example = self.training.example, self.training.at(server_round).example
        if first is None or example is None or not first.noise_multiplier:
            return self.mechanism
        share = (example.noise_multiplier / first.noise_multiplier) ** 2
        bound = self.mechanism.local_variance_bound * share
        return replace(self.mechanism, local_variance_bound=bound)

    def _levels(self, devices: NDArray[np.int64], server_round: int) -> NDArray[np.uint8]:
        """(devices,) level of each in a round."""
        activity = self.activity(server_round) if callable(self.activity) else self.activity
        return activity_levels(activity[devices])

    def _windowed_ahead(self, participation: WindowedParticipation) -> list[Event]:
        number = participation.next_round

        def levels_of(devices: NDArray[np.int64]) -> NDArray[np.int64]:
            assert callable(self.activity)
            held = self.activity(number)[devices]
            levels = activity_levels(np.maximum(held, 1)).astype(np.int64)
            return np.where(held > 0, levels, -1)

        rows = [] if self.training.example is None else participation.ahead(levels_of)
        return self._device_events(number) + self._windowed_events(rows, None)

    def _windowed_events(self, booked: list[list[Row]], server_round: int | None) -> list[Event]:
        """One participation more on every row; see `WindowedParticipation`."""
        example, plan = self.training.example, self.training.plan
        if example is None:
            return []
        noise = example.noise_multiplier / example.multiple
        return [
            _example_event(
                noise,
                [(row, plan.rate(at), plan.steps(at, 1 << at)) for row, at in rows],
                server_round,
            )
            for rows in booked
        ]

    def _events(self, current: Round) -> list[Event]:
        if isinstance(self.participation, WindowedParticipation):
            rows = self.participation.raised(current.devices, current.levels, current.number)
            events = self._windowed_events(rows, current.number)
            return self._device_events(current.number) + events
        risen = self.participation.add(current.devices, current.levels, current.number)
        worst = {level: self.participation.worst[level] for level in risen}
        return self._device_events(current.number) + self._example_events(worst, current.number)

    def _device_events(self, server_round: int | None) -> list[Event]:
        if self.mechanism is None:
            return []
        if isinstance(self.mechanism, CorrelatedMechanism):
            return [self.mechanism.event(server_round)]
        rates = sorted(
            (self.sampler.rates if server_round is None
             else self.sampler.rates_at(server_round)).items()
        )
        fixed = self.sampler.sampling == "fixed_size"
        purpose = COUNTED if isinstance(self.mechanism, AdaptiveMechanism) else SUMMED
        figures = self.private_metrics
        return [
            GaussianEvent(
                noise_multiplier=self.mechanism.noise_multiplier if figures is None
                else figures.whole,
                sampling=self.sampler.sampling,
                by_level=tuple((level, rate, 1) for level, rate in rates),
                unit="device",
                relation="replace_one" if fixed else "add_remove",
                observer="release",
                purpose=purpose if figures is None else purpose + MEASURED,
                round=server_round,
            )
        ]

    def _example_events(self, worst: dict[int, int], server_round: int | None) -> list[Event]:
        """`worst`: participations of the busiest device of each level where that number rose.

        One event for each noise multiplier that `ExampleClipping.booked` finds for them.
        """
        example, plan = self.training.example, self.training.plan
        if example is None:
            return []
        entries: dict[float, list[LevelEntry]] = {}
        for level, participation in worst.items():
            entry = (level, plan.rate(level), plan.steps(level, 1 << level))
            entries.setdefault(example.booked(participation), []).append(entry)
        return [
            _example_event(noise, group, server_round)
            for noise, group in entries.items()
        ]

    def _noised_metrics(
        self, total: FleetReply, server_round: int
    ) -> dict[str, int | float | list[int]]:
        """Metrics from noised figures and a public clip norm alone.

        The update's norm is none of them: it would show a sum whose round may yet be repeated.
        """
        assert self.private_metrics is not None and self.mechanism is not None
        clip_norm = self.mechanism.clip_norm
        if server_round in self.lost:
            return {"clip_norm": clip_norm}
        generator = self.source.generator(METRICS_NOISE, server_round)
        noised = self.private_metrics.noised(total.totals, generator)
        return {**self.private_metrics.metrics(noised, clip_norm), "clip_norm": clip_norm}

    def _metrics(
        self, current: Round, total: FleetReply, update: dict[str, Tensor], deviation: float
    ) -> dict[str, int | float | list[int]]:
        devices = sum(total.devices_by_level.values())
        examples = total.totals.get("examples", 0.0)
        levels, counts = np.unique(current.levels, return_counts=True)
        signal = self.projection * _norm(total.sums)
        absent = {name: int(total.totals[name]) for name in ABSENCES if name in total.totals}
        size = sum(tensor.numel() for tensor in update.values())
        metrics: dict[str, int | float | list[int]] = {
            "devices": devices,
            "dropped": total.dropped - sum(absent.values()),
            "examples": int(examples),
            "levels": levels.tolist(),
            "devices_by_level": counts.tolist(),
            "update_norm": _norm(update),
        }
        metrics |= absent | {
            name: total.totals[figure] / max(among, 1.0)
            for name, figure, among in (
                ("clipped_fraction", "clipped_devices", devices),
                ("example_clipped_fraction", "clipped_examples", examples),
                ("mean_signal_norm", "norm", devices),
            )
            if figure in total.totals  # real devices say next to nothing
        }
        if PARTIAL in total.totals:
            metrics[PARTIAL] = int(total.totals[PARTIAL])
        if examples and devices and "loss" in total.totals:
            metrics["train_loss"] = total.totals["loss"] / examples
        if self.mechanism is not None:
            metrics["clip_norm"] = self.mechanism.clip_norm
        if deviation:
            metrics["signal_to_noise"] = signal / (deviation * math.sqrt(size))
        return metrics


def _example_event(
    noise: float, entries: list[LevelEntry], server_round: int | None
) -> GaussianEvent:
    return GaussianEvent(
        noise_multiplier=noise,
        sampling="poisson",
        by_level=tuple(entries),
        unit="example",
        relation="add_remove",
        observer="server",
        purpose="eDP-SGD steps of one participation",
        round=server_round,
    )


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
