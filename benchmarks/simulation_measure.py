"""Whole processes, one after another: what they print, their peak memory, and ratios of pairs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
POLL_SECONDS = 0.2


def measured(command: Sequence[str], environment: dict[str, str]) -> Figures:
    """The JSON that the process prints, with `children_peak_mib` and `process_seconds`.

    `children_peak_mib`: highest resident sets of its descendants, added up (Linux; 0 elsewhere), so
    that pages which several of them share count several times. Raises RuntimeError with the last
    lines of its complaint where the process fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaints:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=complaints, env=environment)
        peaks: dict[int, float] = {}
        while process.poll() is None:
            for pid in descendants(process.pid):
                peaks[pid] = max(peaks.get(pid, 0.0), peak_mib(pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        out.seek(0)
        complaints.seek(0)
        printed, said = out.read(), complaints.read()
    if process.returncode:
        last = "\n".join(said.splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    found, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    return {**found, "children_peak_mib": sum(peaks.values()), "process_seconds": seconds}


def descendants(pid: int) -> list[int]:
    """Living children of a process, their children and so on (Linux; elsewhere none)."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in listing.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def peak_mib(pid: int) -> float:
    """Highest resident set of a living process so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def spread(values: Sequence[float]) -> Figures:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pair_ratios(mine: Sequence[Figures], others: Sequence[Figures], key: str) -> Figures:
    """`key` of each of ours over that of the run beside it."""
    return spread([a[key] / b[key] for a, b in zip(mine, others, strict=True)])


def losses(runs: Sequence[Figures]) -> Figures:
    """Final test loss over runs that differ in their noise: mean and standard deviation."""
    found = [run["test"]["loss"] for run in runs]
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "deviation": deviation}


def machine() -> Figures:
    """Processor, cores and how busy they were when asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return {"cpu": name, "cores": os.cpu_count(), "load_average": os.getloadavg()}
