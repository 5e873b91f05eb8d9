"""Which index belongs to some files and settings, and who may build it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sottovoce.client.errors import DataError
from sottovoce.simulations.corpus import CorpusSettings
from sottovoce.simulations.corpus_index import VERSION
from sottovoce.simulations.row_files import absent

BLOCK_BYTES = 1 << 16
ASSIGNED_ONLY = ("devices", "alpha", "mu", "sigma")
WAIT_S = 0.2


def cache_folder() -> Path:
    """Where indexes lie unless told otherwise: `${XDG_CACHE_HOME:-~/.cache}/sottovoce/index`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sottovoce" / "index"


def fingerprint(settings: CorpusSettings) -> dict[str, Any]:
    """All that decides an index: the settings, and of each file path, size, time and both ends."""
    facts: dict[str, Any] = asdict(settings)
    if settings.users == "natural":
        facts = {key: value for key, value in facts.items() if key not in ASSIGNED_ONLY}
    for group in ("paths", "test_paths"):
        facts[group] = [_file_facts(path) for path in getattr(settings, group)]
    return facts | {"version": VERSION}


def index_name(settings: CorpusSettings) -> str:
    """Name of the folder of the settings' index."""
    text = json.dumps(fingerprint(settings), sort_keys=True)
    stem = settings.paths[0].name.split(".")[0][:40] or "index"
    return f"{stem}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _file_facts(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            digest = hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=16)
            file.seek(max(0, state.st_size - BLOCK_BYTES))
            digest.update(file.read(BLOCK_BYTES))
    except FileNotFoundError:
        raise absent(path) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a JSONL file") from None
    return [str(path.resolve()), state.st_size, state.st_mtime_ns, digest.hexdigest()]


@contextmanager
def build_lock(path: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file of an index; waits while another process builds it.

    The system drops the lock with the process that holds it, so a killed build leaves none behind.
    `waiting` hears once whom this process waits for.
    """
    with path.open("a+") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    file.seek(0)
                    waiting(file.read().strip() or "another process")
                    told = True
                time.sleep(WAIT_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
