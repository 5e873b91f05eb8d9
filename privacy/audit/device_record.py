"""What a run noted of its canary devices, read back for the audit.

`device_canaries.json` and `device_canaries.jsonl` are written by `sottovoce.server.device_canaries`
from what `sottovoce.strategies.canary_watch` saw. Attacks read the inner products alone, which any
observer of releases could compute; coins and draws are for scoring them and for checks.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import RunError

HEADER, ROUNDS = "device_canaries.json", "device_canaries.jsonl"
KINDS = ("direction", "text")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DeviceRecord:
    """The canary devices of a finished run of R rounds, m canaries and d trained parameters.

    `inside`: (m,) coins. `loudness`: (m,) clip norms that each handed over before clipping; empty
    for text. `drawn`: (R, m) whom the sampler drew, in or out. `dots`: (R, m) inner products of the
    released sum with their directions, empty for text. `deviation`: (R,) of the noise that a
    coordinate should have. `clip_norm`: (R,), or what was handed over where nothing is clipped.
    `answered`: (R,) devices in each sum, and whether they were all
    that were asked; `divisor`: how many were expected. `squares`: (R, leaves)
    squared norms of the released sum by parameter, of `sizes` coordinates. `sample`: (R, k) of its
    coordinates.
    """

    kind: str
    first: int
    activity: int
    rate: float
    seed: int
    norm: float
    inside: NDArray[np.bool_]
    loudness: Floats
    rounds: NDArray[np.int64]
    drawn: NDArray[np.bool_]
    dots: Floats
    deviation: Floats
    clip_norm: Floats
    answered: Floats
    all_answered: bool
    divisor: float
    names: tuple[str, ...]
    sizes: Floats
    squares: Floats
    sample: Floats

    @property
    def ids(self) -> list[str]:
        """Names of the canaries."""
        return [f"canary device {self.first + k}" for k in range(len(self.inside))]


def load_record(folder: Path) -> DeviceRecord | None:
    """The record in `folder`, None where the run had no canary devices; RunError if damaged."""
    if not (folder / HEADER).is_file():
        return None
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        text = (folder / ROUNDS).read_text(encoding="utf-8")
        return record_of(header, [json.loads(line) for line in text.splitlines()])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / HEADER} or {ROUNDS} is damaged: {error}") from error


def record_of(header: dict[str, Any], lines: list[dict[str, Any]]) -> DeviceRecord:
    """A record from the two files' contents."""
    count, norm = header["count"], header["norm"]
    inside = np.zeros(count, dtype=bool)
    inside[header["inside"]] = True
    drawn = np.zeros((len(lines), count), dtype=bool)
    for row, line in enumerate(lines):
        drawn[row, line["drawn"]] = True
    names = tuple(sorted(header["sizes"]))

    def column(name: str) -> Floats:
        return np.array([line[name] for line in lines], dtype=np.float64)

    clips = [norm if line["clip_norm"] is None else line["clip_norm"] for line in lines]
    samples = [
        np.frombuffer(base64.b64decode(line["sample"]), dtype="<f4").astype(np.float64)
        for line in lines
    ]
    return DeviceRecord(
        kind=header["kind"], first=header["first"], activity=header["activity"],
        rate=header["rate"], seed=header["seed"], norm=norm, inside=inside,
        loudness=np.array(header["loudness"], dtype=np.float64),
        rounds=np.array([line["round"] for line in lines], dtype=np.int64),
        drawn=drawn,
        dots=np.array([line.get("dots", []) for line in lines], dtype=np.float64),
        deviation=column("deviation"),
        clip_norm=np.array(clips, dtype=np.float64),
        answered=column("answered"),
        all_answered=bool(np.array_equal(column("answered"), column("asked"))),
        divisor=header["divisor"],
        names=names,
        sizes=np.array([header["sizes"][name] for name in names], dtype=np.float64),
        squares=np.array(
            [[line["squares"][name] for name in names] for line in lines], dtype=np.float64
        ),
        sample=np.array(samples),
    )
