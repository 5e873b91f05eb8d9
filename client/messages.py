"""What travels between coordinator and fleet, as Flower records.

Down: the global parameters, the sampled device ids, the round, and the bound on updates where it
changes from round to round. Up: one sum of clipped updates and
totals for the whole fleet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.fleet import FleetReply


def train_content(
    parameters: ArrayRecord,
    devices: NDArray[np.int64],
    server_round: int,
    settings: str,
    clip_norm: float | None = None,
    levels: NDArray[np.uint8] | None = None,
    members: NDArray[np.int64] | None = None,
) -> RecordDict:
    """The coordinator's request of one fleet. `settings`: the run's, as YAML.

    `clip_norm`: bound on a device's signal in this round, in place of the settings'; None: theirs.
    `levels`: (devices,) under which devices are to be counted; None: their own. `members`:
    (devices,) their numbers at a gateway; None: devices have no other numbers than the run's.
    """
    config = ConfigRecord({"round": server_round, "settings": settings})
    if clip_norm is not None:
        config["clip_norm"] = clip_norm
    cohort = {"devices": Array(devices)}
    if levels is not None:
        cohort["levels"] = Array(levels)
    if members is not None:
        cohort["members"] = Array(members)
    return RecordDict(
        {
            "parameters": parameters,
            "cohort": ArrayRecord(cohort),
            "config": config,
        }
    )


def read_train_content(
    content: RecordDict,
) -> tuple[dict[str, Tensor], NDArray[np.int64], int, str]:
    """Parameters, device ids, round and settings of a request."""
    config = content.config_records["config"]
    devices = content.array_records["cohort"]["devices"].numpy()
    return (
        to_tensors(content.array_records["parameters"]),
        devices.astype(np.int64),
        int(config["round"]),  # type: ignore[arg-type]
        str(config["settings"]),
    )


def read_clip_norm(content: RecordDict) -> float | None:
    """The bound on a device's signal that a request sets for its round, None where it sets none."""
    found = content.config_records["config"].get("clip_norm")
    return None if found is None else float(found)  # type: ignore[arg-type]


def read_levels(content: RecordDict) -> NDArray[np.uint8] | None:
    """The levels under which a request counts its devices, None where it leaves that to them."""
    found = content.array_records["cohort"].get("levels")
    return None if found is None else found.numpy().astype(np.uint8)


def read_members(content: RecordDict) -> NDArray[np.int64] | None:
    """The devices' numbers at a gateway, None where a request gives none."""
    found = content.array_records["cohort"].get("members")
    return None if found is None else found.numpy().astype(np.int64)


def roster_query(run: str) -> RecordDict:
    """The coordinator's question to a gateway: who is there for `run`?"""
    return RecordDict({"roster": ConfigRecord({"run": run})})


def read_roster_query(content: RecordDict) -> str:
    """The run that a roster is asked for."""
    return str(content.config_records["roster"]["run"])


def roster_content(
    gateway: str, members: NDArray[np.int64], levels: NDArray[np.uint8]
) -> RecordDict:
    """A gateway's answer: its name, and the devices (members,) that declared a level (members,)."""
    return RecordDict({
        "roster": ArrayRecord({"members": Array(members), "levels": Array(levels)}),
        "gateway": ConfigRecord({"name": gateway}),
    })


def read_roster(content: RecordDict) -> tuple[str, NDArray[np.int64], NDArray[np.uint8]]:
    """Name, devices and levels of a gateway."""
    arrays = content.array_records["roster"]
    return (
        str(content.config_records["gateway"]["name"]),
        arrays["members"].numpy().astype(np.int64),
        arrays["levels"].numpy().astype(np.uint8),
    )


def reply_content(reply: FleetReply) -> RecordDict:
    """A fleet's answer."""
    levels = sorted(reply.devices_by_level)
    metrics: dict[str, int | float | list[int]] = {
        "dropped": reply.dropped,
        "levels": levels,
        "devices": [reply.devices_by_level[level] for level in levels],
    }
    metrics |= {f"total.{name}": float(value) for name, value in reply.totals.items()}
    return RecordDict({"sums": to_record(reply.sums), "metrics": MetricRecord(metrics)})  # type: ignore[arg-type]


def read_reply(content: RecordDict, expected: Mapping[str, Tensor]) -> FleetReply:
    """A fleet's answer, checked against the parameters it was sent.

    Raises RunError naming the first key, shape, dtype or value that is wrong. A total that is not
    finite counts as 0: it is a figure about devices whose sums are sound, and one device's figure
    must not decide on the sums of the others.
    """
    sums = to_tensors(content.array_records["sums"])
    if set(sums) != set(expected):
        odd = sorted(set(sums) ^ set(expected))[0]
        raise RunError(f"a fleet's sum has missing or unknown key {odd!r}")
    for name, tensor in sums.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            raise RunError(
                f"a fleet's sum for {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"float32 {tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(f"a fleet's sum for {name!r} is not finite")
    metrics = content.metric_records["metrics"]
    pairs = zip(metrics["levels"], metrics["devices"], strict=True)  # type: ignore[arg-type]
    totals = {
        name.removeprefix("total."): _finite(value)
        for name, value in metrics.items()
        if name.startswith("total.")
    }
    ordered = {name: sums[name] for name in expected}
    return FleetReply(
        ordered,
        {int(level): int(count) for level, count in pairs},
        int(metrics["dropped"]),  # type: ignore[arg-type]
        totals,
    )


def _finite(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else 0.0


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record."""
    return ArrayRecord({name: Array(t.detach().cpu().numpy()) for name, t in tensors.items()})


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """A Flower record as tensors."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
