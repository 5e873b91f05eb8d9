"""Who is let in, over real TLS on loopback: nobody uninvited gets a session, a model or a sum."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from gateway_devices import (
    RUN,
    TIMEOUT_S,
    Device,
    Training,
    order_for,
    random_tensors,
    ready,
    serving,
    upload_parts,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sottovoce.client.protocol import PROTOCOL, SESSION, session_proof
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.protocol.device_pb2_grpc import DevicesStub
from sottovoce.server.gateway import certificates
from sottovoce.server.gateway.certificates import Authority
from sottovoce.server.gateway.gateway import Gateway
from sottovoce.server.gateway.logs import LOGGER, JsonLines

Code = grpc.StatusCode


def refused(code: Any, call: Any, *arguments: Any, **named: Any) -> str:
    """That a call ends with `code`; its words."""
    with pytest.raises(grpc.RpcError) as caught:
        found = call(*arguments, **named)
        if hasattr(found, "__next__"):
            list(found)
    assert caught.value.code() == code, caught.value
    return str(caught.value.details())


@pytest.fixture
def gateway(tmp_path: Path) -> Any:
    with serving(tmp_path / "g") as found:
        yield found


def test_a_token_enrols_once_over_the_wire(gateway: Gateway) -> None:
    token = gateway.tokens(1)[0]
    Device(gateway, token=token)
    for bad in (token, "never made", "x" * 5000):
        with pytest.raises(grpc.RpcError) as caught:
            Device(gateway, token=bad)
        assert caught.value.code() == Code.PERMISSION_DENIED


def test_another_protocol_version_is_told_so(gateway: Gateway) -> None:
    device, other = Device(gateway), PROTOCOL + 1
    enrol, challenge = pb.EnrolRequest(protocol=other), pb.ChallengeRequest(protocol=other)
    assert f"protocol {other}" in refused(Code.FAILED_PRECONDITION, device.stub.Enrol, enrol)
    refused(Code.FAILED_PRECONDITION, device.stub.Challenge, challenge)


def test_only_the_devices_own_key_opens_a_session_and_a_nonce_once(gateway: Gateway) -> None:
    device, other = Device(gateway), Device(gateway)
    nonce = device.nonce()
    good = session_proof(device.key, nonce, device.number)
    for number, used, shown in [
        # forged, which burns the nonce
        (device.number, nonce, session_proof(other.key, nonce, device.number)),
        (device.number, nonce, good),  # the right proof for a nonce that is burnt
        (other.number, device.nonce(), good),
        (device.number, b"", b""),
        (device.number, bytes(32), session_proof(device.key, bytes(32), device.number)),
        (12345, nonce, good),
    ]:
        request = pb.OpenSessionRequest(device=number, nonce=used, proof=shown)
        refused(Code.UNAUTHENTICATED, device.stub.OpenSession, request, timeout=TIMEOUT_S)
    nonce = device.nonce()
    request = pb.OpenSessionRequest(
        device=device.number, nonce=nonce, proof=session_proof(device.key, nonce, device.number)
    )
    assert len(device.stub.OpenSession(request).session) == 32
    refused(Code.UNAUTHENTICATED, device.stub.OpenSession, request)  # replayed


def test_strangers_get_challenges_that_open_nothing(gateway: Gateway) -> None:
    device = Device(gateway)
    for number in range(1, 50):
        reply = device.stub.Challenge(pb.ChallengeRequest(protocol=PROTOCOL, device=number))
        assert len(reply.nonce) == 32
    assert gateway._running is not None and len(gateway._running.service.challenges) == 0


def test_without_a_session_nothing_is_answered(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    Training(gateway, order_for([device.number], deadline_s=3))
    task = device.task()
    for metadata in ((), ((SESSION, bytes(32)),), ((SESSION, b""),), (("session", "x"),)):
        device.metadata = metadata
        refused(Code.UNAUTHENTICATED, device.check_in)
        refused(Code.UNAUTHENTICATED, device.model, task)
        refused(Code.UNAUTHENTICATED, device.report, task, random_tensors(1))
        refused(Code.UNAUTHENTICATED, device.decline, task.id)


def test_nobody_uninvited_gets_a_model_or_into_the_sum(gateway: Gateway) -> None:
    invited, other = ready(gateway, 2)
    training = Training(gateway, order_for([invited.number], deadline_s=5))
    task = invited.task()
    assert not other.check_in().HasField("task")
    refused(Code.PERMISSION_DENIED, other.model, task)
    assert other.report(task, random_tensors(2)).outcome == pb.LATE
    assert other.decline(task.id).outcome == pb.LATE
    refused(Code.PERMISSION_DENIED, invited.blobs, task.id, [bytes(32)])
    assert invited.report(task, random_tensors(1)).outcome == pb.ACCEPTED
    assert training.result().accepted == 1
    refused(Code.PERMISSION_DENIED, invited.model, task)  # the round is over


def test_a_task_is_not_downloaded_without_end(tmp_path: Path) -> None:
    with serving(tmp_path / "g", max_downloads=2) as gateway:
        device = ready(gateway, 1)[0]
        Training(gateway, order_for([device.number], deadline_s=3))
        task = device.task()
        for _ in range(2):
            device.model(task)
        refused(Code.RESOURCE_EXHAUSTED, device.model, task)


def test_a_revoked_device_is_out_at_once(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    training = Training(gateway, order_for([device.number], deadline_s=60))
    task = device.task()

    def parts() -> Any:
        sent = upload_parts(task.id, random_tensors(1))
        yield sent[0]
        assert gateway.revoke(device.number)
        yield from sent[1:]

    assert device.upload(parts()).outcome == pb.LATE
    refused(Code.UNAUTHENTICATED, device.check_in)
    refused(Code.UNAUTHENTICATED, device.open)
    assert training.result().accepted == 0
    assert gateway.roster(RUN) == [] and not gateway.revoke(device.number)


def test_a_held_check_in_ends_when_its_device_is_revoked(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    request = pb.CheckInRequest(run=RUN, level=3, wait_ms=60_000)
    held = device.stub.CheckIn.future(request, metadata=device.metadata)
    while gateway.status()["waiting"] == 0:
        time.sleep(0.01)
    gateway.revoke(device.number)
    assert not held.result(timeout=TIMEOUT_S).HasField("task")


def test_sessions_run_out(tmp_path: Path) -> None:
    with serving(tmp_path / "g", session_lifetime_s=1.0) as gateway:
        device = Device(gateway).open()
        device.check_in()
        time.sleep(1.1)
        refused(Code.UNAUTHENTICATED, device.check_in)
        device.open().check_in()


def test_calls_are_limited_by_device_and_by_address(tmp_path: Path) -> None:
    limits = {"device_burst": 5, "device_calls_per_s": 0.01, "enrolment_burst": 44,
              "enrolments_per_minute": 0.1, "peer_burst": 30, "peer_calls_per_s": 0.01}  # fmt: skip
    with serving(tmp_path / "g", **limits) as gateway:
        device, other = Device(gateway).open(), Device(gateway).open()
        for _ in range(5):
            device.check_in()
        refused(Code.RESOURCE_EXHAUSTED, device.check_in)
        other.check_in()
        bad = pb.OpenSessionRequest(device=device.number)
        refused(Code.UNAUTHENTICATED, device.stub.OpenSession, bad)
        refused(Code.UNAUTHENTICATED, device.stub.OpenSession, bad)
        refused(Code.RESOURCE_EXHAUSTED, device.stub.OpenSession, bad)  # a failure costs more
        enrol = pb.EnrolRequest(protocol=PROTOCOL, token="guess")
        refused(Code.PERMISSION_DENIED, device.stub.Enrol, enrol)
        refused(Code.PERMISSION_DENIED, device.stub.Enrol, enrol)
        refused(Code.RESOURCE_EXHAUSTED, device.stub.Enrol, enrol)


def connects(gateway: Gateway, ca: bytes | None, pair: tuple[bytes, bytes] | None = None) -> bool:
    """Whether a health check gets through with these credentials."""
    key, certificate = pair or (None, None)
    secure = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(
        gateway.address, secure, [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            return bool(check(health_pb2.HealthCheckRequest(), timeout=3).status == 1)
        except grpc.RpcError as error:
            assert error.code() == Code.UNAVAILABLE
            return False


def test_a_gateway_of_another_ca_is_not_trusted(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert gateway.ca_file is not None
    assert connects(gateway, gateway.ca_file.read_bytes())
    assert not connects(gateway, Authority(tmp_path / "other", "other").file.read_bytes())


def test_plain_text_does_not_get_through_tls(gateway: Gateway) -> None:
    with grpc.insecure_channel(gateway.address) as channel:
        request = pb.ChallengeRequest(protocol=PROTOCOL, device=1)
        refused(Code.UNAVAILABLE, DevicesStub(channel).Challenge, request, timeout=3)


def test_an_expired_certificate_is_renewed_without_a_new_enrolment(tmp_path: Path) -> None:
    authority, hosts = Authority(tmp_path, "mine"), ["127.0.0.1"]
    ca = authority.file.read_bytes()
    certificates._store(tmp_path, "mine", authority._server_pair(hosts))
    files = {"certificate": tmp_path / "mine.pem", "private_key": tmp_path / "mine.key"}
    with serving(tmp_path / "g", **files) as gateway:
        assert gateway.ca_file is None and connects(gateway, ca)
        assert gateway._running is not None
        certificate = gateway._running.certificate
        certificate.pair = authority._server_pair(hosts, days=-1e-4)
        assert not connects(gateway, ca)
        certificate.renew()
        assert connects(gateway, ca)
        (tmp_path / "mine.pem").write_text("half a file")
        certificate.renew()  # keeps what it has
        assert connects(gateway, ca)


def test_mutual_tls_wants_the_devices_own_certificate(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    foreign = Authority(tmp_path / "other", "other").device(5)
    with serving(tmp_path / "g", mutual_tls=True, enrol_port=0) as gateway:
        assert gateway.ca_file is not None and gateway.enrol_address != gateway.address
        ca = gateway.ca_file.read_bytes()
        device, thief = Device(gateway), Device(gateway)
        device.open().check_in()
        assert connects(gateway, ca, device.pair)
        assert not connects(gateway, ca)
        assert not connects(gateway, ca, (foreign.private_key, foreign.certificate))
        assert gateway._running is not None and gateway._running.certificate.issues is not None
        old = gateway._running.certificate.issues._sign(
            f"device-{device.number}", ExtendedKeyUsageOID.CLIENT_AUTH, days=-1e-4
        )
        assert not connects(gateway, ca, (old.private_key, old.certificate))
        thief.metadata = device.metadata  # a stolen session is of no use without the certificate
        refused(Code.UNAUTHENTICATED, thief.check_in)
        thief.number, thief.key = device.number, device.key  # nor is a stolen key
        refused(Code.UNAUTHENTICATED, thief.open)
        with grpc.secure_channel(
            gateway.enrol_address, grpc.ssl_channel_credentials(ca)
        ) as channel:
            request = pb.ChallengeRequest(protocol=PROTOCOL, device=device.number)
            refused(Code.UNIMPLEMENTED, DevicesStub(channel).Challenge, request, timeout=3)


def test_health_and_reflection_are_for_operators(tmp_path: Path) -> None:
    for allowed in (None, False):
        with serving(tmp_path / "g", reflection=allowed) as gateway:
            device = Device(gateway)
            health = health_pb2_grpc.HealthStub(device.channel)
            for name in ("", "sottovoce.device.v1.Devices"):
                asked = health_pb2.HealthCheckRequest(service=name)
                assert health.Check(asked, timeout=3).status == 1
            refused(Code.UNIMPLEMENTED, health.Watch, health_pb2.HealthCheckRequest(), timeout=3)
            stub = reflection_pb2_grpc.ServerReflectionStub(device.channel)
            ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
            if allowed is None:
                names = next(stub.ServerReflectionInfo(iter(ask))).list_services_response.service
                assert "sottovoce.device.v1.Devices" in {service.name for service in names}
            else:
                refused(Code.UNIMPLEMENTED, stub.ServerReflectionInfo, iter(ask))


def test_logs_and_metrics_hold_no_secret_and_no_device(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"metrics_port": 0, "log_format": "json", "name": "hush"}
    with serving(tmp_path / "g", **settings) as gateway:
        token = gateway.tokens(1)[0]
        device = Device(gateway, token=token, name="kitchen").open()
        gateway.announce(RUN)
        device.check_in()
        training = Training(gateway, order_for([device.number]))
        device.report(device.task(), random_tensors(1))
        training.result()
        gateway.note_privacy("device", 1.5, 8.0)
        page = urllib.request.urlopen(f"http://{gateway.metrics_address}/metrics").read().decode()
        status = json.dumps(gateway.status())
    log = capfd.readouterr().err
    events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
    assert {"gateway serves", "device enrolled", "round ended"} <= set(events)
    session = device.metadata[0][1]
    for text in (log, page, status):
        for secret in (token, device.key.hex(), session.hex(), "kitchen"):
            assert secret not in text
    assert str(device.number) not in page
    for line in (
        'sottovoce_epsilon_spent{unit="device"} 1.5', 'sottovoce_epsilon_budget{unit="device"} 8.0',
        'sottovoce_updates_total{outcome="accepted"} 1.0', "sottovoce_cohort_asked 1.0",
        "sottovoce_devices_enrolled 1.0", 'sottovoce_receipts_total{outcome="ACCEPTED"} 1.0',
    ):  # fmt: skip
        assert line in page
    assert isinstance(LOGGER.handlers[0].formatter, JsonLines) and not LOGGER.propagate
