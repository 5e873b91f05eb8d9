"""What this machine leaves to training: free memory, and a process that keeps little of it."""

from __future__ import annotations

from pathlib import Path

from sottovoce.client.memory import tune_allocator

MEGABYTE = 1e6
MMAP_BYTES = 1 << 17


def free_memory_mb(root: Path = Path("/")) -> float:
    """Memory that is free, in MB: of the machine, or of this process' cgroup if that is less.

    0 where neither can be told.
    """
    known = [found for found in (_machine(root), _cgroup(root)) if found is not None]
    return max(min(known), 1.0) if known else 0.0


def _machine(root: Path) -> float | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / MEGABYTE
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup(root: Path) -> float | None:
    """Of version 2, as systemd's MemoryMax and containers set it."""
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()[0].split("::", 1)[1]
    except (OSError, IndexError):
        return None
    folder = root / "sys/fs/cgroup" / own.lstrip("/")
    limits = [
        found for level in (folder, *folder.parents)
        if level.is_relative_to(root / "sys/fs/cgroup") and (found := _left(level)) is not None
    ]
    return min(limits, default=None)


def _left(folder: Path) -> float | None:
    try:
        most = int((folder / "memory.max").read_text())  # "max" is none
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(most - used, 0) / MEGABYTE


def lean_memory() -> bool:
    """Let the C library give memory back soon and keep one pool; False where it cannot.

    For a device that trains seldom and waits long. A thread of its own would have a pool of its own
    that stays as large as its largest task.
    """
    return tune_allocator(arenas=1, trim_threshold=MMAP_BYTES, mmap_threshold=MMAP_BYTES)
