"""`make edge-demo`: a server and eight devices, each a process of its own, train over TLS.

The devices hold SNIPS requests (or, where that corpus is not at hand, generated ones) that were
dealt out to them; each adds noise of its own to every local step (eDP-SGD). At the end: what the
model can do, what the training cost in privacy, and who took part how often.

    python deploy/edge_demo.py [--devices 8] [--rounds 20] [--folder FOLDER] [key=value …]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sottovoce.client.agent.journal import Journal
from sottovoce.client.agent.spending import epsilon_spent
from sottovoce.client.agent.store import DeviceStore
from sottovoce.simulations.activity import LogNormalActivity
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.partition import assign_devices

SOTTOVOCE = str(Path(sys.executable).with_name("sottovoce"))
SETTINGS = (
    "strategy=fedavg", "strategy.sampler=uniform", "strategy.learning_rate=4",
    "strategy.batch_size=64", "population.max_examples_per_round=512",
    "privacy=example", "privacy.example.noise_multiplier=0.9", "run.evaluate_every=5",
    "run.progress=false",
)
CA = Path("certificates") / "ca.pem"
DELTA = 1e-5
INTENTS = 7  # as many as SNIPS has
PATIENCE_S = 30.0

Row = dict[str, Any]


def main() -> int:
    """Run the demo; the server's exit code."""
    options = _options()
    folder = options.folder or Path("runs") / "edge-demo" / f"{datetime.now():%Y-%m-%d-%H-%M-%S}"
    folder.mkdir(parents=True)
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    train, public, source = examples()
    with (folder / "public.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in public)
    stores = stock(folder, train, options.devices)
    console.print(f"{len(train):,} {source}, dealt out to {options.devices} devices: {folder}")
    code = serve_and_join(folder, stores, options)
    if code == 0:
        show(folder, stores, console)
        console.print(f"{time.perf_counter() - began:.0f} seconds; the server's report is "
                      f"{folder / 'run' / 'report.html'}")
    return code


def examples() -> tuple[list[Row], list[Row], str]:
    """Requests for the devices, public ones, and what they are."""
    data = Path(os.environ.get("SOTTOVOCE_DATA", "../shared/data"))
    try:
        return (
            _rows(data / "snips.train.jsonl.gz"), _rows(data / "snips.test.jsonl.gz"),
            "SNIPS requests",
        )
    except FileNotFoundError:
        population = AssistantPopulation(devices=2000, held_out_devices=100, seed=0)
        train = _generated(population, population.examples(np.arange(2000)))
        public = _generated(population, population.held_out_devices(100))
        counts = Counter(row["intent"] for row in train)
        usual = {intent for intent, _ in counts.most_common(INTENTS)}
        return (
            [row for row in train if row["intent"] in usual],
            [row for row in public if row["intent"] in usual],
            f"generated requests in {INTENTS} intents (SNIPS is not at hand: set SOTTOVOCE_DATA)",
        )


def stock(folder: Path, rows: list[Row], devices: int) -> list[Path]:
    """A store for each device, with the examples that it was dealt."""
    intents = {intent: number for number, intent in enumerate(sorted({r["intent"] for r in rows}))}
    labels = np.array([intents[row["intent"]] for row in rows], dtype=np.int32)
    owner = assign_devices(
        labels, devices, alpha=1.0, model=LogNormalActivity(mu=7.0, sigma=0.4), seed=0
    )
    stores = []
    for device in range(devices):
        path = folder / f"device-{device + 1}"
        store = DeviceStore(path)
        store.add(rows[place] for place in np.flatnonzero(owner == device))
        store.close()
        stores.append(path)
    return stores


def serve_and_join(folder: Path, stores: list[Path], options: argparse.Namespace) -> int:
    """The server and its devices until the run has ended; the server's exit code."""
    gateway, tokens, port = folder / "gateway", folder / "tokens", _free_port()
    subprocess.run(
        [SOTTOVOCE, "tokens", f"gateway={gateway}", f"dir={tokens}", f"number={len(stores)}"],
        check=True, stdout=subprocess.DEVNULL,
    )
    wanted = max(1, round(0.75 * len(stores)))
    server = subprocess.Popen([
        SOTTOVOCE, "serve", f"population.path={folder / 'public.jsonl'}",
        f"population.min_devices={len(stores)}", f"cohort_size={wanted}",
        f"rounds={options.rounds}", f"run.dir={folder / 'run'}", f"gateway.folder={gateway}",
        f"gateway.port={port}", "gateway.metrics_port=null", *SETTINGS, *options.settings,
    ])
    with _ended(server):
        _wait_for(gateway / CA, server)
        with _devices(gateway, tokens, stores, port):
            return server.wait()


def show(folder: Path, stores: list[Path], console: Console) -> None:
    """Utility and epsilon as the server states them, and each device's own account."""
    summary = json.loads((folder / "run" / "summary.json").read_bytes())
    metrics, claim = summary["metrics"], summary["epsilon"].get("example")
    console.print(f"intent accuracy {metrics['accuracy']:.3f}, slot F1 {metrics['slot_f1']:.3f} on "
                  "public held-out requests")
    if claim is not None:
        console.print(f"epsilon per example {float(claim['epsilon']):.2f} at delta "
                      f"{claim['delta']:g}, against the server, which sees each round's sum")
    table = Table(title="what each device's own journal says", title_justify="left")
    for column in ("device", "examples", "rounds", "epsilon per example, at most"):
        table.add_column(column, justify="right")
    for number, path in enumerate(stores, 1):
        journal, store = Journal(path), DeviceStore(path)
        table.add_row(
            str(number), f"{store.count():,}", str(len(journal.participations())),
            f"{epsilon_spent(journal.costs(), DELTA):.2f}",
        )
        store.close()
        journal.close()
    console.print(table)


@contextmanager
def _devices(gateway: Path, tokens: Path, stores: list[Path], port: int) -> Iterator[None]:
    processes = []
    for number, path in enumerate(stores, 1):
        with path.with_suffix(".log").open("w") as log:
            processes.append(subprocess.Popen(
                [SOTTOVOCE, "join", f"127.0.0.1:{port}", "--store", str(path),
                 "--ca", str(gateway / CA), "--token-file", str(tokens / f"token-{number}")],
                stdout=log, stderr=subprocess.STDOUT,
            ))
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with _ended(process):
                pass


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let nothing of the demo outlive it."""
    try:
        yield
    finally:
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(path: Path, server: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        if server.poll() is not None:
            sys.exit(server.returncode)
        time.sleep(0.1)


def _rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _generated(population: AssistantPopulation, found: Any) -> list[Row]:
    rows = []
    for k in range(len(found)):
        span = slice(found.offsets[k], found.offsets[k + 1])
        rows.append({
            "tokens": [population.words[word] for word in found.tokens[span]],
            "intent": population.schema.intents[found.intent[k]],
            "slots": [population.schema.slots[tag] for tag in found.slots[span]],
        })
    return rows


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="a new folder; default: under runs/edge-demo")
    parser.add_argument("settings", nargs="*", help="more settings of sottovoce serve, key=value")
    options = parser.parse_args()
    if options.folder is not None and options.folder.exists():
        parser.error(f"--folder {options.folder} exists: name a new one")
    if not Path(SOTTOVOCE).exists():
        parser.error("run it with the Python that sottovoce is installed for: make edge-demo")
    return options


if __name__ == "__main__":
    sys.exit(main())
