"""What a run would cost on real devices: bytes, seconds, participations, rounds to a target.

Bytes are those of the records that travel, measured on a message to, and an answer of, one device
of this run; nothing is compressed. A device that cannot be reached costs nothing, one that fails or
is late has downloaded, one that is in the sum has uploaded too.

Seconds have two references. `as simulated`: the examples a second that `conditions` give each class
of devices. `as measured`: what a worker of this machine trained, whole rounds included, times the
class's speed; that one differs from run to run. Energy is not estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict

from sottovoce.client.fleet import ABSENCES, FleetReply
from sottovoce.client.messages import reply_content, to_record, train_content
from sottovoce.server.checkpoints import RunState
from sottovoce.server.conditions_limits import conditions_of, projection_factor
from sottovoce.server.conditions_setup import reply_share, work_of
from sottovoce.server.metrics_setup import wanted
from sottovoce.server.setup import Setup
from sottovoce.simulations.cores import worker_count
from sottovoce.simulations.experiment import Experiment

Facts = dict[str, Any]
Records = Sequence[dict[str, Any]]

PARTS = (0.8, 0.9, 0.95)  # of the final leading metric


def cost(experiment: Experiment, setup: Setup, state: RunState, records: Records) -> Facts:
    """The cost of the rounds in `records`, as JSON values. Sizes in bytes, times in seconds.

    `basis`: counted, from who was asked and answered; or expected, from the public sampling rates
    and conditions: where training metrics are private, exact counts would tell what their noise
    hides, and a projection stands for cohorts that were not simulated.
    """
    rounds = [record for record in records if record["round"] > 0]
    sizes = message_bytes(state, setup.strategy.settings)
    counted = not wanted(experiment.config) and projection_factor(experiment.config) == 1
    flows = [_counted(r) for r in rounds] if counted else [_expected(experiment, setup)] * len(
        rounds
    )
    down = [reached * sizes["down"] for _, reached, _ in flows]
    up = [sent * sizes["up"] for _, _, sent in flows]
    until = np.cumsum(np.add(down, up)) if rounds else np.zeros(0)
    return {
        "basis": "counted" if counted else "expected",
        "message": sizes,
        "rounds": len(rounds),
        "asked_a_round": _mean([asked for asked, _, _ in flows]),
        "answers_a_round": _mean([sent for _, _, sent in flows]),
        "down_bytes": float(sum(down)),
        "up_bytes": float(sum(up)),
        "participations": participations(experiment, setup, len(rounds), counted),
        "time": device_time(experiment, setup, rounds),
        "targets": targets(experiment, records, dict(zip(
            [r["round"] for r in rounds], until.tolist(), strict=True
        ))),
    }


def message_bytes(state: RunState, settings: str) -> dict[str, float]:
    """Bytes of one device's messages: `payload` (its parameters), `down` and `up` in all."""
    parameters = state.parameters
    asked = train_content(to_record(parameters), np.zeros(1, np.int64), 1, settings)
    zero = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    answer = reply_content(FleetReply(zero, {0: 1}, 0, {}))
    payload = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
    return {"payload": payload, "down": record_bytes(asked), "up": record_bytes(answer)}


def record_bytes(content: RecordDict) -> int:
    """Bytes of everything in a message, as Flower counts its records."""
    kinds = (content.array_records, content.metric_records, content.config_records)
    return sum(
        len(name) + record.count_bytes() for records in kinds for name, record in records.items()
    )


def participations(
    experiment: Experiment, setup: Setup, rounds: int, counted: bool
) -> dict[str, float | None]:
    """How often a device is asked, answer or not: `mean` over all, and `worst`: the busiest one's.

    Where not counted, `worst` is what a device of the most often sampled level may expect.
    """
    devices, sampler = len(experiment.population), setup.sampler
    if counted:
        counts = setup.strategy.participation.counts
        return {"mean": float(counts.sum()) / devices, "worst": int(counts.max(initial=0))}
    mean = rounds * sampler.expected_cohort_size / devices
    if sampler.sampling == "none":
        return {"mean": mean, "worst": setup.strategy.participation.limit}
    known = sampler.devices_by_level or sampler.rates
    return {"mean": mean, "worst": rounds * max(sampler.rates[level] for level in known)}


def device_time(experiment: Experiment, setup: Setup, rounds: Records) -> Facts:
    """Seconds of a participation: computing and on the network, for each class of devices.

    `examples`: what a participating device visits on average, by public level sizes.
    """
    conditions, work = conditions_of(experiment.config), work_of(experiment)
    rates, known = setup.sampler.rates, setup.sampler.devices_by_level or {0: 1}
    weights = {level: count * rates[level] for level, count in known.items()}
    total = sum(weights.values()) or 1.0
    examples = sum(w * work.examples(level) for level, w in weights.items()) / total
    seconds = sum(record.get("seconds") or 0.0 for record in rounds)
    workers = worker_count(experiment.config.run.workers)
    trained = sum(record.get("examples") or 0 for record in rounds)
    measured = trained / (seconds * workers) if seconds and trained else None
    classes = []
    for name, share, kind in zip(
        conditions.names, conditions.shares.tolist(), conditions.classes, strict=True
    ):
        pace = kind.speed * conditions.settings.reference_examples_per_second
        megabit = 1e6 / 8
        classes.append({
            "class": name,
            "share": share,
            "speed": kind.speed,
            "computing_s": examples / pace,
            "computing_s_as_measured": examples / (measured * kind.speed) if measured else None,
            "network_s": work.down_bytes / (kind.down_mbps * megabit)
            + work.up_bytes / (kind.up_mbps * megabit),
        })
    return {
        "examples": examples,
        "measured_examples_per_second": measured,
        "workers": workers,
        "computing_s_as_measured": examples / measured if measured else None,
        "classes": classes,
    }


def targets(experiment: Experiment, records: Records, bytes_until: dict[int, float]) -> list[Facts]:
    """When the leading metric first came within parts of its final value, and what that took.

    With `run.target_metric` that value too. `round` and `bytes` are None where it was not reached.
    """
    task = experiment.task
    measured = [(r["round"], r[task.headline]) for r in records
                if isinstance(r.get(task.headline), int | float)]
    if not measured:
        return []
    final, rising = measured[-1][1], task.higher_is_better
    goals = [(f"{part:.0%} of the final".replace("%", " %"),
              final * part if rising else final / part) for part in PARTS]
    own = experiment.config.run.get("target_metric")
    if own is not None:
        goals.append(("run.target_metric", float(own)))
    found = []
    for name, value in goals:
        first = next((number for number, reached in measured
                      if (reached >= value if rising else reached <= value)), None)
        spent = None if first is None else bytes_until.get(first, 0.0)
        found.append({"target": name, "value": value, "round": first, "bytes": spent})
    return found


def _counted(record: dict[str, Any]) -> tuple[float, float, float]:
    """Devices asked in a round, reached, and uploading."""
    absent = {name: record.get(name, 0) for name in ABSENCES}
    sent = record.get("devices", 0) + record.get("dropped", 0)
    asked = sent + sum(absent.values())
    return asked, asked - absent["unavailable"], sent


def _expected(experiment: Experiment, setup: Setup) -> tuple[float, float, float]:
    """The same in expectation, from public figures alone."""
    asked = setup.sampler.expected_cohort_size
    available = conditions_of(experiment.config).available_share(experiment.config.rounds)
    return asked, asked * available, asked * reply_share(experiment, setup.sampler)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
