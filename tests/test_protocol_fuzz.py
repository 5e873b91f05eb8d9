"""Whatever is sent to a gateway, it goes on serving: no crash, no growing memory, no wrong sum."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from gateway_devices import (
    RUN,
    SHAPES,
    Device,
    Training,
    order_for,
    random_tensors,
    ready,
    serving,
    upload_parts,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sottovoce.client.protocol import PROTOCOL, REASONS
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.server.gateway.gateway import Gateway
from sottovoce.server.gateway.validation import REFUSALS, Expected, Refused

SERVICE = "/sottovoce.device.v1.Devices/"
UNARY = ("Enrol", "Challenge", "OpenSession", "CheckIn", "Decline")
CALLS = (*UNARY, "Download", "Upload")
WRONG = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED,
}  # fmt: skip
FEW = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
LIMITS = {"peer_burst": 10**7, "enrolment_burst": 10**7, "device_burst": 10**7, "hold_s": 0.01}


class Open:
    """A gateway in the middle of a round, and a device of that round."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.device, self.other = ready(gateway, 2)
        order = order_for([self.device.number, self.other.number], deadline_s=300)
        self.training = Training(gateway, order)
        self.other.decline(self.other.task().id)
        self.task = self.device.task()

    def send(self, call: str, messages: list[bytes], invited: bool) -> grpc.StatusCode | None:
        """Send raw messages; how the call ended, None for well."""
        metadata = self.device.metadata if invited else ()
        channel, name = self.device.channel, SERVICE + call
        options: dict[str, Any] = {"metadata": metadata, "timeout": 5}
        try:
            if call in UNARY:
                channel.unary_unary(name)(messages[0], **options)
            elif call == "Download":
                list(channel.unary_stream(name)(messages[0], **options))
            else:
                channel.stream_unary(name)(iter(messages), **options)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return None

    def serves(self) -> bool:
        """Whether the gateway answers a health check."""
        stub = health_pb2_grpc.HealthStub(self.device.channel)
        return bool(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1)


@pytest.fixture(scope="module")
def open_round(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with serving(tmp_path_factory.mktemp("fuzz") / "g", **LIMITS) as gateway:
        found = Open(gateway)
        yield found
        # After everything the round is sound: its device's update, once, is the sum.
        update = random_tensors(1)
        found.device.open()
        task = found.device.check_in().task
        if task.id:
            assert found.device.report(task, update).outcome == pb.ACCEPTED
            sums = found.training.result().sums
            assert all(torch.equal(sums[name], update[name].double()) for name in SHAPES)
        assert found.serves()


def test_random_bytes_end_in_a_refusal(open_round: Open) -> None:
    @FEW
    @given(st.sampled_from(CALLS), st.lists(st.binary(max_size=300), min_size=1, max_size=4),
           st.booleans())  # fmt: skip
    def law(call: str, messages: list[bytes], invited: bool) -> None:
        assert open_round.send(call, messages, invited) in WRONG | {None}

    law()
    assert open_round.serves()


def valid(open_round: Open) -> dict[str, list[bytes]]:
    """A good call of every kind that leaves the round open."""
    device, task = open_round.device, open_round.task
    upload = upload_parts("0" * 32, random_tensors(1))
    messages: dict[str, list[Any]] = {
        "Enrol": [pb.EnrolRequest(protocol=PROTOCOL, token="t" * 32, name="kitchen")],
        "Challenge": [pb.ChallengeRequest(protocol=PROTOCOL, device=device.number)],
        "OpenSession": [
            pb.OpenSessionRequest(device=device.number, nonce=bytes(32), proof=bytes(32))
        ],
        "CheckIn": [
            pb.CheckInRequest(
                run=RUN, level=3, wait_ms=1,
                capabilities=pb.Capabilities(version="1", memory_mb=100, encodings=["fp16"]),
            )
        ],
        "Decline": [pb.DeclineRequest(task="0" * 32, reason=REASONS[0])],
        "Download": [
            pb.DownloadRequest(task=task.id, blobs=[task.spec, task.tensors[0].hash])
        ],
        "Upload": list(upload),
    }  # fmt: skip
    return {call: [m.SerializeToString() for m in sent] for call, sent in messages.items()}


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with some bytes changed, cut out or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "put", "repeat"]))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[at : at + draw(st.integers(1, 20))]
        elif kind == "put":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        else:
            found[at:at] = found[at : at + 50]
    return bytes(found)


def test_mutated_messages_end_in_an_answer_or_a_refusal(open_round: Open) -> None:
    good = valid(open_round)

    @FEW
    @given(st.data(), st.sampled_from(CALLS), st.booleans())
    def law(data: st.DataObject, call: str, invited: bool) -> None:
        messages = list(good[call])
        place = data.draw(st.integers(0, len(messages) - 1))
        messages[place] = data.draw(mutations(messages[place]))
        assert open_round.send(call, messages, invited) in WRONG | {None}

    law()
    assert open_round.serves()


tensors = st.builds(
    pb.EncodedTensor,
    name=st.sampled_from([*SHAPES, "", "x" * 1000]),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=4) | st.sampled_from(
        [list(shape) for shape in SHAPES.values()]),
    encoding=st.sampled_from(["fp32", "fp16", "int8", "", "pickle"]),
    bytes=st.integers(0, 2**64 - 1) | st.sampled_from([48, 16, 4]),
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(tensors, max_size=5), st.binary(max_size=200))
def test_no_head_makes_a_gateway_expect_more_than_a_rounds_update(
    listed: list[pb.EncodedTensor], data: bytes
) -> None:
    expected = Expected(SHAPES, "fp32")
    with contextlib.suppress(Refused):
        expected.check(pb.UploadHead(tensors=listed))
        assert sum(tensor.bytes for tensor in listed) == expected.total_bytes
    try:
        expected.read(list(SHAPES), data, 1.0)
    except Refused as refused:
        assert refused.reason in REFUSALS


def resident_mb() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def test_memory_does_not_grow_with_what_strangers_send(open_round: Open) -> None:
    device = open_round.device
    flood = [pb.ChallengeRequest(protocol=PROTOCOL, device=n + 1) for n in range(300)]
    large = pb.EnrolRequest(protocol=PROTOCOL, token="x" * 900_000, name="y" * 90_000)
    too_large = b"\x0a" + bytes(3 * 2**20)

    def attack() -> None:
        for request in flood:
            device.stub.Challenge(request)
        for _ in range(2):
            assert open_round.send("Upload", [too_large], True) in WRONG
        for _ in range(20):
            assert open_round.send("Enrol", [large.SerializeToString()], False) in WRONG
            head = pb.UploadPart(head=pb.UploadHead(task=open_round.task.id + "?"))
            open_round.send("Upload", [head.SerializeToString()], True)

    attack()
    before = resident_mb()
    for _ in range(3):
        attack()
    assert resident_mb() - before < 40
    assert open_round.gateway._running is not None
    assert len(open_round.gateway._running.service.challenges) <= 8
    assert open_round.serves()


def test_connections_that_say_nothing_or_nonsense_keep_nobody_out(open_round: Open) -> None:
    host, _, port = open_round.gateway.address.rpartition(":")
    draw = random.Random(5)
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # how TLS begins
    with contextlib.ExitStack() as stack:
        for number in range(60):
            line = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            if number % 3:
                with contextlib.suppress(OSError):
                    line.sendall(hello * (number % 2) + draw.randbytes(500))
        assert Device(open_round.gateway).open().check_in().run == RUN
    assert open_round.serves()


def test_a_fuzzed_gateway_still_takes_new_devices(open_round: Open) -> None:
    assert Device(open_round.gateway).open().check_in().come_back_ms >= 0
