"""What `benchmarks/edp_sgd.py` measures: time per step, peak memory, deviation, cohorts.

Times: all engines of a model in one process, one after another in every round, in an order drawn
anew; each sample follows an untimed step of its own, so that no engine inherits another's caches
and heap. An engine's ratio to plain is taken round by round: a slow minute falls on both.

Memory: the highest sum of live tensor bytes during the building of an engine and two of its steps,
over what model and batch take. On CUDA from `torch.cuda.max_memory_allocated`; on a CPU from the
allocator's own record of every allocation and release (torch.profiler), each engine in a process of
its own. `resident_mb` is a check from outside: growth of the process's highest resident set,
which adds the scratch of BLAS and oneDNN and leaves out what was allocated but never written; every
tensor there is a mapping of its own, since glibc's heap keeps up to several times what is live.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from edp_sgd_engines import CLIP_NORM, ENGINES, Gradients, Step, loop, ours, plain
from edp_sgd_models import Case, make_case
from torch.profiler import ProfilerActivity, profile

from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group

LEAST_SECONDS = 0.05  # a sample lasts at least this long, by repeating short steps
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # malloc.h
PRELOAD = ["torch", "opacus", "transformers", "peft", "sottovoce.privacy.gradients.engine"]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, times: int, device: str) -> float:
    """Seconds per step over `times` steps."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / times


def interleaved(steps: dict[str, Step], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds per step of every engine in each of `repeats` rounds; steps are already warm."""
    inner = {
        name: max(1, math.ceil(LEAST_SECONDS / timed(step, 1, device)))
        for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(steps), len(steps)):
            gc.collect()
            steps[name]()
            seconds[name].append(timed(steps[name], inner[name], device))
    return seconds


def time_figures(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and least seconds, and the two ratios to plain."""
    base = seconds["plain"]
    return {
        name: {
            "seconds": statistics.median(mine),
            "seconds_min": min(mine),
            "time_ratio": statistics.median(m / b for m, b in zip(mine, base, strict=True)),
            "time_ratio_of_medians": statistics.median(mine) / statistics.median(base),
        }
        for name, mine in seconds.items()
    }


def reference(case: Case) -> Gradients:
    """The batch-1 loop's clipped sum, with norms and sums in float64."""
    return loop(case, torch.float64)()


def deviation(sums: Gradients, expected: Gradients) -> float:
    """max |a - b| over max |b|, over all parameters together; names must be the same."""
    if set(sums) != set(expected):
        raise RuntimeError(f"other parameters than the loop's: {set(sums) ^ set(expected)}")
    gaps = [float((sums[n].double() - tensor).abs().max()) for n, tensor in expected.items()]
    return max(gaps) / max(float(tensor.abs().max()) for tensor in expected.values())


def memory(engine: str, model: str, rows: int, device: str) -> dict[str, float]:
    """{"peak_mb"} of an engine, and on a CPU, in a process of its own, "resident_mb"."""
    if device == "cuda":
        return {"peak_mb": _cuda_peak(ENGINES[engine], make_case(model, rows, device)) / 1e6}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory, engine, model, rows).result()


def _memory(engine: str, model: str, rows: int) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)  # the profiler writes there
    torch.set_num_threads(1)
    plain(make_case(model, 2, "cpu"))()  # code and handles are loaded now
    build = ENGINES[engine]
    resident = _resident_growth(build, make_case(model, rows, "cpu"))
    peak = _allocated_peak(build, make_case(model, rows, "cpu"))
    return {"peak_mb": peak / 1e6, "resident_mb": resident / 1e6}


def _run_twice(build: Callable[[Case], Step], case: Case) -> None:
    step = build(case)
    for _ in range(2):
        step()


def _cuda_peak(build: Callable[[Case], Step], case: Case) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run_twice(build, case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocated_peak(build: Callable[[Case], Step], case: Case) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        _run_twice(build, case)
    events = [
        event
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def _resident_growth(build: Callable[[Case], Step], case: Case) -> float:
    """Growth of the highest resident set (Linux), or NaN elsewhere."""
    gc.collect()
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 15)
        libc.mallopt(M_MMAP_MAX, 1 << 20)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    before = _status("VmRSS")
    _run_twice(build, case)
    return float(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def one_by_one(steps: list[Step]) -> Gradients:
    """All steps in turn; only the last one's gradients are kept."""
    for step in steps[:-1]:
        step()
    return steps[-1]()


def cohort(model: str, devices: int, rows: int, repeats: int, device: str) -> dict[str, Any]:
    """K devices of `rows` rows each: all at once, one after another, and plain one after another.

    All start from the same weights; a device's own weights are not copied in the two loops.
    """
    whole = make_case(model, devices * rows, device)
    grouped = group(whole.model, devices)

    def together() -> Gradients:
        return backward(grouped, whole.losses(grouped.module, whole.batch), CLIP_NORM, devices).sums

    parts = [
        Case(whole.model, tuple(t[k * rows : (k + 1) * rows] for t in whole.batch), whole.losses)
        for k in range(devices)
    ]
    tracked = [ours(part) for part in parts]
    bare = [plain(part) for part in parts]
    sums = together()
    last = {name: tensor[-1].double() for name, tensor in sums.items()}
    gap = deviation(tracked[-1](), last)
    del sums, last
    steps = {
        "together": together,
        "one_by_one": lambda: one_by_one(tracked),
        "plain": lambda: one_by_one(bare),
    }
    seconds = interleaved(steps, repeats, device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": median,
        "one_by_one_over_together": median["one_by_one"] / median["together"],
        "together_over_plain": median["together"] / median["plain"],
        "deviation": gap,
    }
