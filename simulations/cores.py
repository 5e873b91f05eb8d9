"""How many processes may compute at once: what the machine, its scheduler and a container allow."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from pathlib import Path

from sottovoce.client.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")


def worker_count(workers: int | str) -> int:
    """Processes that train devices: as given, or for `auto` one per core.

    One where processes cannot be forked (Windows, macOS), and on Ray, which gives every node a
    process of its own already. Raises ConfigError for more than one that cannot be had.
    """
    if workers == "auto":
        return cores() if forks() and "ray" not in sys.modules else 1
    if int(workers) > 1 and not forks():
        raise ConfigError(
            f"run.workers={workers} needs processes that share memory by fork, which "
            f"{sys.platform} has not: set run.workers=1"
        )
    return int(workers)


def forks() -> bool:
    """Whether a process can be forked safely; macOS' own libraries forbid it."""
    return sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()


def cores() -> int:
    """Cores that this process may use: of the machine, its affinity and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        found = len(os.sched_getaffinity(0))
    else:
        found = os.cpu_count() or 1
    return max(1, math.ceil(min(found, quota(CGROUP))))


def quota(folder: Path) -> float:
    """CPU seconds that a container grants a second, inf without a limit; cgroups v2 or v1."""
    try:
        if (folder / "cpu.max").exists():
            granted, period = (folder / "cpu.max").read_text().split()
        else:
            granted = (folder / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu" / "cpu.cfs_period_us").read_text()
        return int(granted) / int(period) if int(granted) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
