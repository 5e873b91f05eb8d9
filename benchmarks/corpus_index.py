"""A large JSONL or Parquet corpus: indexing it once, killed half-way and resumed, then using it.

    python benchmarks/corpus_index.py --megabytes 1000
    python benchmarks/corpus_index.py --megabytes 300 --format parquet

Writes a synthetic corpus (users with log-normal activity in random order, words by a Zipf law) into
a temporary folder, indexes it in a process of its own, again in one that is killed with SIGKILL at
half the time and resumed, and compares the two indexes byte by byte. Then opens the index and
gathers cohorts. Prints JSON: megabytes a second, peak memory, seconds, milliseconds, the machine.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH_LINES = 20_000
POOL = 2_000_000  # words of the text that users say pieces of
COHORTS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text as JSONL")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--folder", help="where the corpus goes for the time being")
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--step", choices=("build", "use"), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps({"build": build, "use": use}[options.step](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one corpus."""
    from sottovoce.server.report_tables import environment

    source = folder / f"corpus.{options.format}"
    lines = write_corpus(source, options.megabytes << 20)
    built = step(options, "build", source, folder / "whole")
    killed_after = kill_half_way(options, source, folder / "again", built["seconds"])
    resumed = step(options, "build", source, folder / "again")
    size = source.stat().st_size
    return {
        "format": options.format,
        "source_mb": round(size / 1e6),
        "text_mb": options.megabytes,
        "examples": lines,
        "build": built | {
            "text_mb_per_s": round(options.megabytes / built["seconds"], 1),
            "text_mb_per_cpu_s": round(options.megabytes / built["cpu_seconds"], 1),
        },
        "killed_after_s": killed_after,
        "resumed": resumed,
        "resumed_index_is_the_same": same_files(folder / "whole", folder / "again"),
        "index_mb": round(sum(p.stat().st_size for p in (folder / "whole").rglob("*")) / 1e6),
        "use": step(options, "use", source, folder / "whole"),
        "environment": environment() | machine(),
    }


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a build (or of what is left of one)."""
    make = populations()[options.format]
    before, began = memory_mb(), time.perf_counter()
    make(options.source, index=options.index)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "memory_before_mb": before,
        "peak_memory_mb": round(used.ru_maxrss / 1024),
    }


def use(options: argparse.Namespace) -> dict[str, Any]:
    """Opening the index and gathering cohorts from it."""
    make = populations()[options.format]
    before, began = memory_mb(), time.perf_counter()
    population = make(options.source, index=options.index)
    opened, after = time.perf_counter() - began, memory_mb()
    generator = np.random.default_rng(0)
    seconds, memory, tokens = [], [], 0
    for _ in range(COHORTS):
        devices = generator.integers(0, len(population), options.cohort)
        began = time.perf_counter()
        tokens += len(population.examples(devices).tokens)
        seconds.append(time.perf_counter() - began)
        memory.append(memory_mb())
    return {
        "devices": len(population),
        "words": len(population.words),
        "open_s": round(opened, 4),
        "cohort": options.cohort,
        "tokens_per_cohort": tokens // COHORTS,
        "first_cohort_ms": round(1000 * seconds[0], 1),
        "median_cohort_ms": round(1000 * float(np.median(seconds)), 1),
        "memory_mb": {"before": before, "opened": after, "one_cohort": memory[0],
                      f"{COHORTS}_cohorts": memory[-1]},
    }


def populations() -> dict[str, Any]:
    from sottovoce.simulations import JsonlPopulation, ParquetPopulation

    return {"jsonl": JsonlPopulation, "parquet": ParquetPopulation}


def command(options: argparse.Namespace, name: str, source: Path, index: Path) -> list[str]:
    return [sys.executable, __file__, "--step", name, "--format", options.format,
            "--source", str(source), "--index", str(index), "--cohort", str(options.cohort)]


def step(options: argparse.Namespace, name: str, source: Path, index: Path) -> dict[str, Any]:
    """What a step in a process of its own prints."""
    done = subprocess.run(
        command(options, name, source, index), check=True, capture_output=True, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def kill_half_way(
    options: argparse.Namespace, source: Path, index: Path, seconds: float
) -> float:
    """Start a build and kill it; returns the seconds between."""
    child = subprocess.Popen(command(options, "build", source, index), stdout=subprocess.DEVNULL)
    while not list(index.glob("*.partial")):
        time.sleep(0.05)
    began = time.perf_counter()
    time.sleep(seconds / 2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return round(time.perf_counter() - began, 1)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders of indexes hold the same bytes, locks apart."""
    names = sorted(p.relative_to(one) for p in one.rglob("*.*") if p.suffix != ".lock")
    _, different, missing = filecmp.cmpfiles(one, other, [str(n) for n in names], shallow=False)
    return bool(names) and not different and not missing


def machine() -> dict[str, Any]:
    """The processor, its cores, and how many processes wanted one in the last minutes."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {"processor": name, "cores": os.cpu_count(), "load": round(os.getloadavg()[1], 1)}


def memory_mb() -> float:
    """Resident memory of this process, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def write_corpus(path: Path, size: int) -> int:
    """Write about `size` bytes of text, as JSON; returns the number of examples."""
    generator, lines, written = np.random.default_rng(0), 0, 0
    users = np.repeat(np.arange(size // 3000), _activity(generator, size // 3000))
    generator.shuffle(users)
    with Writer(path) as writer:
        for names, texts in _batches(generator, users):
            writer.write(names, texts)
            lines += len(texts)
            written += sum(map(len, texts)) + 40 * len(texts)
            if written >= size:
                break
    return lines


def _activity(generator: np.random.Generator, users: int) -> np.ndarray:
    return np.maximum(1, generator.lognormal(3.2, 1.3, users)).astype(np.int64)


def _batches(
    generator: np.random.Generator, users: np.ndarray
) -> Iterator[tuple[list[str], list[str]]]:
    """Names of users and what they say: pieces of one long text, for speed."""
    words = [f"w{number:x}" for number in generator.zipf(1.25, POOL) % 2_000_000]
    for start in range(0, len(users), BATCH_LINES):
        said = users[start : start + BATCH_LINES].tolist()
        firsts = generator.integers(0, POOL - 20, len(said)).tolist()
        lengths = generator.integers(3, 20, len(said)).tolist()
        texts = [" ".join(words[a : a + n]) for a, n in zip(firsts, lengths, strict=True)]
        yield [f"user-{user}" for user in said], texts


class Writer:
    """Examples as JSONL or Parquet, told by the file's name."""

    def __init__(self, path: Path) -> None:
        self._lines = path.open("w") if path.suffix == ".jsonl" else None
        self._table: Any = None
        if self._lines is None:
            import pyarrow
            from pyarrow.parquet import ParquetWriter

            self._arrow = pyarrow
            schema = pyarrow.schema([("user_id", pyarrow.string()), ("text", pyarrow.string())])
            self._table = ParquetWriter(path, schema)

    def write(self, names: list[str], texts: list[str]) -> None:
        if self._lines is not None:
            rows = zip(names, texts, strict=True)
            self._lines.writelines(
                f'{{"user_id": "{name}", "text": "{text}"}}\n' for name, text in rows
            )
        else:
            self._table.write(self._arrow.table({"user_id": names, "text": texts}))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        (self._lines or self._table).close()


if __name__ == "__main__":
    main()
