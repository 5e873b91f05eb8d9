"""A thousand devices on one gateway: how long rounds take, and that no report is lost or doubled.

    .venv/bin/python benchmarks/gateway_soak.py [devices=1000] [rounds=50] [parameters=10000]

The gateway is a process of its own, over TLS; the devices are another, a connection each, and train
nothing: device i answers with a one at place i, so the sum shows how often each was counted. Every
twentieth report is sent twice, and as many are broken off half-way over a connection that is then
dropped, and sent again over a new one. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
import torch

from sottovoce.client.protocol import CHUNK_BYTES, PROTOCOL, SESSION
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.protocol.device_pb2_grpc import DevicesStub
from sottovoce.server.gateway.control import GatewayClient
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, RoundOrder
from sottovoce.server.gateway.sessions import proof

RUN = "soak"
ODD = 0.05  # share of reports that are doubled, and of those that are broken off
PEERS = {"peer_burst": 10**6, "enrolment_burst": 10**6}  # a thousand devices have one address here


class Counted:
    """What the devices know of a round: whose report was accepted, and what they put in its way."""

    def __init__(self) -> None:
        self.accepted: dict[int, set[int]] = {}
        self.doubled = self.broken = 0
        self.errors: Counter[str] = Counter()


class Device:
    """A device that trains nothing."""

    def __init__(self, address: str, ca: bytes, parameters: int, counted: Counted) -> None:
        self.address, self.ca, self.parameters, self.counted = address, ca, parameters, counted
        self.connect()

    def connect(self) -> None:
        """A connection of its own."""
        secure = grpc.ssl_channel_credentials(self.ca)
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.secure_channel(self.address, secure, options)
        self.stub = DevicesStub(self.channel)

    async def enrol(self, token: str) -> None:
        """A number and a key for a token, and a session."""
        reply = await self.stub.Enrol(pb.EnrolRequest(protocol=PROTOCOL, token=token))
        self.number, self.key = reply.device, reply.key
        await self.open()

    async def open(self) -> None:
        """A session."""
        challenge = pb.ChallengeRequest(protocol=PROTOCOL, device=self.number)
        nonce = (await self.stub.Challenge(challenge)).nonce
        answer = proof(self.key, nonce, self.number)
        request = pb.OpenSessionRequest(device=self.number, nonce=nonce, proof=answer)
        self.metadata = ((SESSION, (await self.stub.OpenSession(request)).session),)

    async def run(self) -> None:
        """Check in and report until cancelled."""
        ask = pb.CheckInRequest(run=RUN, level=3, wait_ms=30_000)
        while True:
            try:
                reply = await self.stub.CheckIn(ask, metadata=self.metadata)
                if reply.HasField("task"):
                    await self.work(reply.task)
                else:
                    await asyncio.sleep(reply.come_back_ms / 1000)
            except grpc.aio.AioRpcError as error:
                self.counted.errors[error.code().name] += 1
                await asyncio.sleep(1)

    async def work(self, task: pb.Task) -> None:
        """Fetch the model and send a report."""
        names = [ref.hash for ref in task.tensors]
        request, got = pb.DownloadRequest(task=task.id, blobs=names), 0
        async for chunk in self.stub.Download(request, metadata=self.metadata):
            got += len(chunk.data)
        assert got == 4 * self.parameters
        update = np.zeros(self.parameters, dtype="<f4")
        update[task.number] = 1.0
        if random.random() < ODD:
            await self.break_off(task, update.tobytes())
        for _ in range(2 if random.random() < ODD else 1):
            stream = self.stub.Upload(parts(task, update.tobytes()), metadata=self.metadata)
            outcome = (await stream).outcome
            if outcome == pb.ACCEPTED:
                self.counted.accepted.setdefault(task.round, set()).add(task.number)
            self.counted.doubled += outcome == pb.DUPLICATE

    async def break_off(self, task: pb.Task, data: bytes) -> None:
        """Half a report over a connection that is then lost."""
        async def half() -> AsyncIterator[pb.UploadPart]:
            sent = [part async for part in parts(task, data)]
            sent[1].data = sent[1].data[: len(data) // 2]
            yield sent[0]
            yield sent[1]
            await asyncio.sleep(60)

        call = self.stub.Upload(half(), metadata=self.metadata)
        await asyncio.sleep(0.05)
        call.cancel()
        await self.channel.close(None)
        self.counted.broken += 1
        self.connect()
        await self.open()


async def parts(task: pb.Task, data: bytes) -> AsyncIterator[pb.UploadPart]:
    """A report."""
    tensor = pb.EncodedTensor(
        name="weight", shape=[len(data) // 4], encoding="fp32", bytes=len(data)
    )
    yield pb.UploadPart(head=pb.UploadHead(task=task.id, tensors=[tensor]))
    for at in range(0, len(data), CHUNK_BYTES):
        yield pb.UploadPart(data=data[at : at + CHUNK_BYTES])


def memory_mb(pid: int, name: str) -> float:
    """A process' memory by its name in /proc: VmRSS now, VmHWM at most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return round(int(line.split()[1]) / 1024, 1)
    raise KeyError(name)


def serve(folder: Path) -> None:
    """The gateway's process, until it is told to stop."""
    gateway = Gateway(folder, GatewaySettings(port=0, **PEERS))
    gateway.start()
    print("ready", flush=True)
    sys.stdin.read()
    gateway.stop(1)


def train(client: GatewayClient, numbers: list[int], parameters: int, number: int) -> list[int]:
    """One round over all devices; how often each is in the sum."""
    weight = torch.full((parameters,), float(number))  # new in every round
    result = client.train(
        RoundOrder(
            run=RUN, round=number, spec=b"soak", parameters={"weight": weight},
            devices=np.array(numbers, dtype=np.int64), numbers=list(range(len(numbers))),
            levels=np.full(len(numbers), 3, dtype=np.uint8), deadline_s=300,
            norm_bounds={3: 1.0},
        )
    )  # fmt: skip
    return [round(value) for value in result.sums["weight"][: len(numbers)].tolist()]


async def soak(client: GatewayClient, pid: int, devices: int, rounds: int, size: int) -> dict:
    """Enrol, connect, train, and count."""
    status, counted = client.status(), Counted()
    idle_mb = memory_mb(pid, "VmRSS")
    ca = Path(status["ca"]).read_bytes()
    client.announce(RUN)
    fleet = [Device(status["address"], ca, size, counted) for _ in range(devices)]
    began = time.monotonic()
    for batch in range(0, devices, 50):
        tokens = client.tokens(50)
        await asyncio.gather(
            *[d.enrol(t) for d, t in zip(fleet[batch : batch + 50], tokens, strict=False)]
        )
    enrolled_s = time.monotonic() - began
    working = [asyncio.create_task(device.run()) for device in fleet]
    while client.status()["waiting"] < devices:
        await asyncio.sleep(0.2)
    connected_mb = last_mb = memory_mb(pid, "VmRSS")
    seconds, lost, doubled = [], 0, 0
    for number in range(1, rounds + 1):
        began = time.monotonic()
        order = [device.number for device in fleet]
        sums = await asyncio.to_thread(train, client, order, size, number)
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(0.3)  # receipts of the last reports are on their way
        accepted = counted.accepted.pop(number, set())
        lost += sum(sums[place] == 0 for place in accepted)
        doubled += sum(times > 1 for times in sums)
        last_mb = memory_mb(pid, "VmRSS")
        print(
            f"round {number}: {seconds[-1]:.2f} s, {sum(sums)} in the sum, {last_mb} MB",
            file=sys.stderr,
        )
    for task in working:
        task.cancel()
    ordered = sorted(seconds)
    return {
        "devices": devices, "rounds": rounds, "parameters": size,
        "round_s": {
            "median": round(statistics.median(seconds), 3),
            "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        },
        "enrolments_per_s": round(devices / enrolled_s, 1),
        "gateway_mb": {
            "idle": idle_mb, "connected": connected_mb, "peak": memory_mb(pid, "VmHWM"),
            "last_round": last_mb,
        },
        "reports": {
            "lost": lost, "counted_twice": doubled, "sent_twice": counted.doubled,
            "broken_off": counted.broken, "calls_repeated": dict(counted.errors),
        },
        "machine": {
            "cpu": platform.processor() or platform.machine(), "cores_seen": cores(),
            "python": platform.python_version(), "grpcio": grpc.__version__,
            "torch": torch.__version__,
        },
    }  # fmt: skip


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def main(words: list[str]) -> None:
    """Start the gateway, soak it, print the figures."""
    if words[:1] == ["serve"]:
        return serve(Path(words[1]))
    values = {"devices": 1000, "rounds": 50, "parameters": 10_000}
    for word in words:
        name, _, value = word.partition("=")
        if name not in values or not value.isdigit():
            raise SystemExit(f"{word}: write {', '.join(f'{n}=…' for n in values)}")
        values[name] = int(value)
    if values["parameters"] < values["devices"]:
        raise SystemExit("parameters must be at least devices: each device has a place of its own")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    random.seed(7)
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", folder], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        with GatewayClient(Path(folder)) as client:
            figures = asyncio.run(
                soak(client, process.pid, values["devices"], values["rounds"], values["parameters"])
            )
        process.communicate()
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
