"""Everything at once: a real server and real devices, killed at random, beside a device that does
every wrong thing with a true key, and strangers without one. The run finishes, and nothing is lost,
counted twice or shown to anybody who was not asked.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from gateway_devices import Device, upload_parts

from sottovoce.client.agent.journal import Journal
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.protocol import SESSION
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.server.run_record import read_metrics

SOTTOVOCE = str(Path(sys.executable).with_name("sottovoce"))
HONEST, ROUNDS, BOUND_S = 3, 8, 170
ROWS = [
    {"tokens": ["play", "some", "jazz"], "intent": "music", "slots": ["O", "O", "B-genre"]},
    {"tokens": ["wake", "me", "up"], "intent": "alarm", "slots": ["O", "O", "O"]},
]
SETTINGS = (
    f"population.min_devices={HONEST + 1}", f"cohort_size={HONEST + 1}", f"rounds={ROUNDS}",
    "population.deadline_s=3", "strategy=fedavg", "strategy.sampler=uniform",
    "strategy.max_rate=1", "strategy.batch_size=8", "privacy=both",
    "privacy.device.epsilon=null", "privacy.device.noise_multiplier=1",
    "privacy.example.noise_multiplier=1", "model.embedding_size=6", "model.hidden_size=5",
    "run.report=false",
)


class Scene:
    """The folder of a run, its server and its honest devices, which may all be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gateway, self.run = folder, folder / "gateway", folder / "run"
        self.port = free_port()
        self.ca = self.gateway / "certificates" / "ca.pem"
        (folder / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.stores = [folder / f"device-{k}" for k in range(HONEST)]
        for store in map(DeviceStore, self.stores):
            store.add(ROWS * 8)
            store.close()
        subprocess.run(
            [SOTTOVOCE, "tokens", f"gateway={self.gateway}", f"dir={folder / 'tokens'}",
             f"number={HONEST + 1}"], check=True, capture_output=True,
        )
        self.server: subprocess.Popen[bytes] | None = None
        self.devices: list[subprocess.Popen[bytes] | None] = [None] * HONEST

    def token(self, number: int) -> Path:
        return self.folder / "tokens" / f"token-{number + 1}"

    def serve(self) -> None:
        """Start the run, or go on with it."""
        begun = (self.run / "config.yaml").exists()
        what = [f"resume={self.run}"] if begun else [
            f"population.path={self.folder / 'public.jsonl'}", f"run.dir={self.run}", *SETTINGS,
        ]
        self.server = self._start(
            "server", "serve", *what, f"gateway.folder={self.gateway}",
            f"gateway.port={self.port}", "gateway.metrics_port=null",
            "gateway.upload_stall_s=0.5", "run.progress=false",
        )

    def join(self, k: int) -> None:
        self.devices[k] = self._start(
            f"device-{k}", "join", f"127.0.0.1:{self.port}", "--store", str(self.stores[k]),
            "--ca", str(self.ca), "--token-file", str(self.token(k)),
        )

    def rounds(self) -> int:
        """The last round in the metrics."""
        path = self.run / "metrics.jsonl"
        return max((r["round"] for r in read_metrics(path)), default=0) if path.exists() else 0

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-4000:]

    def end(self) -> None:
        for process in (self.server, *self.devices):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [SOTTOVOCE, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    found = Scene(folder)
    try:
        yield found
    finally:
        found.end()


class Insider(threading.Thread):
    """A device with a true key that does one wrong thing a round, each in its turn."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(daemon=True)
        self.scene, self.over = scene, threading.Event()
        self.done: dict[str, list[str]] = {}
        self.broken: list[str] = []
        self.past: list[pb.Task] = []
        self.wrongs: list[Callable[[Device, pb.Task], Any]] = [
            self.nan, self.shape, self.oversized, self.unknown_tensor, self.huge, self.stale,
            self.half_open, self.forged,
        ]

    def run(self) -> None:
        token = self.scene.token(HONEST).read_text().strip()
        address = f"127.0.0.1:{self.scene.port}"
        gateway: Any = SimpleNamespace(
            ca_file=self.scene.ca, address=address, enrol_address=address,
            tokens=lambda number: [token],
        )
        device: Device | None = None
        while not self.over.is_set():
            try:
                device = device or Device(gateway)
                device.connect().open()
                self.live(device)
            except grpc.RpcError:
                time.sleep(0.3)  # the server is down
            except Exception as error:
                self.broken.append(repr(error))
                return

    def live(self, device: Device) -> None:
        run, seen = "", set[str]()
        while not self.over.is_set():
            reply = device.check_in(run=run, level=4, wait_ms=500)
            run = reply.run if reply.declare else run
            if not reply.HasField("task") or reply.task.id in seen:
                time.sleep(0.05)
                continue
            seen.add(reply.task.id)
            self.past.append(reply.task)
            wrong = self.wrongs[len(self.past) % len(self.wrongs)]
            self.done.setdefault(wrong.__name__, []).append(str(wrong(device, reply.task)))

    def update(self, task: pb.Task, fill: float) -> dict[str, Any]:
        return {ref.name: torch.full(tuple(ref.shape), fill) for ref in task.tensors}

    def refused(self, receipt: pb.Receipt) -> str:
        if receipt.outcome in (pb.ACCEPTED, pb.DUPLICATE):
            self.broken.append(f"accepted: {receipt}")
        return pb.Outcome.Name(receipt.outcome)

    def nan(self, device: Device, task: pb.Task) -> str:
        return self.refused(device.report(task, self.update(task, float("nan"))))

    def huge(self, device: Device, task: pb.Task) -> str:
        return self.refused(device.report(task, self.update(task, 1e6)))

    def shape(self, device: Device, task: pb.Task) -> str:
        update = {name: t.reshape(1, *t.shape) for name, t in self.update(task, 0.0).items()}
        return self.refused(device.report(task, update))

    def unknown_tensor(self, device: Device, task: pb.Task) -> str:
        return self.refused(device.report(task, {"other": torch.zeros(3)}))

    def oversized(self, device: Device, task: pb.Task) -> str:
        parts = upload_parts(task.id, self.update(task, 0.0))
        return self.refused(device.upload([*parts, *parts[1:] * 50]))

    def stale(self, device: Device, task: pb.Task) -> str:
        old = self.past[0]
        return self.refused(device.report(old, self.update(old, 0.0)))

    def forged(self, device: Device, task: pb.Task) -> str:
        other = pb.Task(id="f" * 32, upload_encoding="fp32", tensors=task.tensors)
        return self.refused(device.report(other, self.update(task, 0.0)))

    def half_open(self, device: Device, task: pb.Task) -> str:
        """An upload that begins and never goes on, and a connection that never speaks."""
        silent = socket.create_connection(("127.0.0.1", self.scene.port), timeout=5)
        parts = upload_parts(task.id, self.update(task, 0.0))

        def stalling() -> Iterator[pb.UploadPart]:
            yield parts[0]
            time.sleep(2)

        try:
            return self.refused(device.upload(stalling()))
        except grpc.RpcError as error:
            return str(error.code())
        finally:
            silent.close()


def strangers_get_nothing(scene: Scene, tasks: list[pb.Task]) -> list[str]:
    """What somebody without a key hears who knows a task's id; it must be no each time."""
    credentials = grpc.ssl_channel_credentials(scene.ca.read_bytes())
    codes = []
    with grpc.secure_channel(f"127.0.0.1:{scene.port}", credentials) as channel:
        from sottovoce.client.protocol.device_pb2_grpc import DevicesStub

        stub, forged = DevicesStub(channel), ((SESSION, b"\0" * 32),)
        blobs = [ref.hash for ref in tasks[-1].tensors]
        request = pb.DownloadRequest(task=tasks[-1].id, blobs=blobs)
        for metadata in ((), forged):
            try:
                list(stub.Download(request, timeout=5, metadata=metadata))
                codes.append("answered")
            except grpc.RpcError as error:
                codes.append(str(error.code().name))
    return codes


@pytest.mark.parametrize("seed", [1])
def test_a_run_survives_everything_at_once(tmp_path: Path, seed: int) -> None:
    generator, deadline = random.Random(seed), time.monotonic() + BOUND_S
    with scene(tmp_path) as ours:
        ours.serve()
        while not ours.ca.exists():
            assert time.monotonic() < deadline, ours.said("server")
            time.sleep(0.1)
        for k in range(HONEST):
            ours.join(k)
        insider = Insider(ours)
        insider.start()
        server_deaths, device_deaths, codes, redone = 0, 0, list[str](), set[int]()
        wanted = {2: "server", 3: "device", 5: "server", 6: "device"}  # by round
        while (ended := ours.server.poll() if ours.server else 1) is None:
            assert time.monotonic() < deadline, ours.said("server") + ours.said("device-0")
            now = ours.rounds()
            if now in wanted:
                time.sleep(generator.random())
                if wanted.pop(now) == "server":
                    assert ours.server is not None
                    ours.server.send_signal(signal.SIGKILL)
                    ours.server.wait()
                    redone |= {ours.rounds(), ours.rounds() + 1}
                    server_deaths += 1
                    ours.serve()
                else:
                    k = generator.randrange(HONEST)
                    victim = ours.devices[k]
                    assert victim is not None
                    victim.send_signal(signal.SIGKILL)
                    victim.wait()
                    device_deaths += 1
                    ours.join(k)
            if not codes and insider.past:
                with suppress(AssertionError):
                    codes = strangers_get_nothing(ours, insider.past)
            time.sleep(0.05)
        insider.over.set()
        assert ended == 0, ours.said("server")
        assert server_deaths == 2 and device_deaths == 2
    insider.join(20)
    assert not insider.broken, insider.broken
    assert insider.done, "the insider was never asked"
    assert codes and set(codes) <= {"UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE"}
    check_counts(ours, redone)


def check_counts(ours: Scene, redone: set[int]) -> None:
    """Records, ledger and the devices' own journals tell the same story.

    `redone`: rounds that may have died with the server, and the updates that it had accepted too.
    """
    records = [r for r in read_metrics(ours.run / "metrics.jsonl") if r["round"]]
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    assert all(record["devices"] <= HONEST for record in records), "the insider was summed"
    asked = [
        record["devices"] + record["dropped"]
        + sum(record.get(name, 0) for name in ("unavailable", "failed", "late"))
        for record in records
    ]
    assert asked == [HONEST + 1] * ROUNDS
    ledger = Ledger.load(ours.run / "ledger.json")
    released = [e.round for e in ledger.events if getattr(e, "unit", "") == "device" and e.round]
    assert set(released) == set(range(1, ROUNDS + 1)), "a release that the ledger does not know"
    begun, accepted = (dict.fromkeys(range(1, ROUNDS + 1), 0) for _ in range(2))
    for path in ours.stores:
        journal = Journal(path)
        lines = journal.participations()
        journal.close()
        assert len({line.task for line in lines}) == len(lines)
        for line in lines:
            begun[line.round] += 1
            accepted[line.round] += line.state in ("accepted", "duplicate")
    requests = ours.run / "checkpoints" / "requests.log"
    assert not requests.exists(), "the run has ended and nothing is open"
    for record in records:
        number = record["round"]
        assert record["devices"] <= begun[number], "a sum has more than the devices ever began"
        again = number in redone or released.count(number) > 1 or begun[number] > HONEST
        assert again or accepted[number] <= record["devices"], "an accepted update is in no sum"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
