"""Laws of the device agent, against a gateway that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gateway import FakeGateway, certificates, do
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from live_devices import live_update, spec_of, stored
from small_fleets import NOISED, SIZES, fleet, parts
from torch import Tensor

from sottovoce.client.agent.agent import Agent, Pace
from sottovoce.client.agent.blob_cache import BlobCache
from sottovoce.client.agent.connection import (
    Connection,
    NoLongerKnown,
    OtherProtocol,
    Unreachable,
    enrol,
    open_channel,
)
from sottovoce.client.agent.device_facts import facts, listing
from sottovoce.client.agent.eligibility import Conditions, Probes
from sottovoce.client.agent.identity import Identity
from sottovoce.client.agent.join_cli import main as join
from sottovoce.client.agent.journal import Journal, StepCost
from sottovoce.client.agent.logs import log_to, say
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.preparation import Declined, Preparation
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.agent.update_spool import Spooled
from sottovoce.client.agent.work import DeviceData, NotFinite, Trained, train_task
from sottovoce.client.errors import ConfigError, RunError, SottovoceError
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.task_spec import TaskSpec
from sottovoce.client.wire import content_hash, decode, encode, raw
from sottovoce.privacy.mechanisms.noise import NoiseSource

QUICK = Pace(
    wait_s=0.3, again_s=0.02, most_s=0.05, backoff_s=0.01, most_backoff_s=0.05, grace_s=2.0,
    pause_s=0.005,
)  # fmt: skip
DEVICE = 17
SEEDS = count()


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway() as found:
        yield found


def spec(example: Any = None, clip: float | None = 0.3) -> TaskSpec:
    _, task, model = parts("bilstm")
    return spec_of(task, model, "bilstm", SIZES["bilstm"], fleet("bilstm", example, clip).training)


def globals_() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parts("bilstm")[2].named_parameters()}


def a_store(folder: Path, examples: bool = True) -> DeviceStore:
    store = DeviceStore(folder)
    if examples and not store.count():
        store.add(
            {"tokens": list(row.tokens), "intent": row.intent, "slots": list(row.slots or ())}
            for row in stored(parts("bilstm")[0], DEVICE)
        )
    return store


def constant(spec: TaskSpec, order: pb.Task, tensors: dict[str, Tensor], _: DeviceData) -> Trained:
    """Stands for training, with what looks like noise."""
    draw = torch.Generator().manual_seed(next(SEEDS))
    update = {name: 0.01 * torch.randn(t.shape, generator=draw) for name, t in tensors.items()}
    return Trained(update, True)


def an_agent(
    gateway: FakeGateway, folder: Path, *, examples: bool = True, **options: Any
) -> Agent:
    store = a_store(folder, examples)
    identity = Identity.load(store.folder / "identity")
    if identity is None:
        identity = do(
            enrol(gateway.address, "one-time", ca=gateway.pem, insecure=not gateway.pem)
        )
        identity.save(store.folder / "identity")
    options = {"policy": Policy(), "train": constant, "pace": QUICK} | options
    return Agent(gateway.address, store, credentials=identity, **options)


def work(agent: Agent, until: Callable[[Agent], bool] | None = None, tasks: int = 1) -> Agent:
    """Let the agent run until so many tasks are over."""
    until = until or (lambda agent: sum(agent.counts.values()) >= tasks)
    do(agent.run(until))
    return agent


def declared(gateway: FakeGateway, folder: Path, **options: Any) -> Agent:
    """An agent that has declared its level for the gateway's run."""
    agent = an_agent(gateway, folder, **options)
    return work(agent, lambda _: bool(gateway.levels))


# -- a round ---------------------------------------------------------------------------------------


def test_a_device_enrols_declares_trains_and_hands_over_the_simulated_update(
    tmp_path: Path,
) -> None:
    with FakeGateway(tls=True) as gateway:
        source = NoiseSource.from_seed(3)
        agent = declared(gateway, tmp_path, train=train_task, source=source)
        (level,) = gateway.levels.values()
        assert level == int(math.log2(agent.store.count()))
        noised = spec(NOISED)
        task = gateway.add_task(noised, globals_(), number=DEVICE)
        work(agent)
        ((head, data),) = gateway.uploads[task.id]
        expected = live_update(
            noised, parts("bilstm")[0], globals_(), DEVICE, level, 1, source
        ).update
        assert data == b"".join(raw(tensor) for tensor in expected.values())
        assert [t.name for t in head.tensors] == list(expected)
        assert not head.clipped  # the specification does not ask for it
        assert agent.counts == {"accepted": 1} and agent.journal.state(task.id) == "accepted"
        assert not list((tmp_path / "spool").glob("*.update"))


def test_a_level_is_declared_once_for_a_run_whatever_comes_later(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path)
    (before,), snapshot = gateway.levels.values(), agent.journal.declared("r")
    agent.store.add([{"text": "play jazz", "intent": "x"}] * 1000)
    agent.journal.close()
    again = an_agent(gateway, tmp_path)
    gateway.levels.clear()
    work(again, lambda _: bool(gateway.levels))
    assert list(gateway.levels.values()) == [before]
    assert again.journal.declared("r") == snapshot
    seen: list[int] = []

    def watch(spec: TaskSpec, order: pb.Task, tensors: Any, data: DeviceData) -> Trained:
        seen.extend(row.id for row in data.examples)
        return constant(spec, order, tensors, data)

    again.tasks.train = watch
    gateway.add_task(spec(), globals_())
    work(again)
    assert seen and snapshot is not None and max(seen) <= snapshot.snapshot


def test_a_device_without_examples_declares_nothing(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = an_agent(gateway, tmp_path, examples=False)
    work(agent, lambda _: gateway.checked_in >= 3)
    assert not gateway.levels and agent.journal.declared("r") is None


def test_only_what_changed_is_downloaded_and_differences_lead_to_the_named_values(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    seen: list[dict[str, Tensor]] = []

    def watch(spec: TaskSpec, order: pb.Task, tensors: Any, data: DeviceData) -> Trained:
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})
        return constant(spec, order, tensors, data)

    agent = declared(gateway, tmp_path, train=watch)
    held = globals_()
    gateway.add_task(spec(), held)
    work(agent)
    first = len(gateway.downloaded)
    name = "heads.intent.weight"
    data = encode(torch.full_like(held[name], 0.01), "int8")
    moved = dict(held)
    moved[name] = held[name] + decode(data, "int8", held[name].shape)
    task = gateway.add_task(spec(), moved)
    gateway.blobs[content_hash(data)] = data
    for ref in task.tensors:
        if ref.name == name:
            ref.base, ref.delta = content_hash(raw(held[name])), content_hash(data)
            ref.delta_encoding, ref.delta_bytes = "int8", len(data)
    work(agent, tasks=2)
    assert gateway.downloaded[first:] == [content_hash(data)]
    assert torch.equal(seen[1][name], moved[name])


def test_a_difference_that_does_not_lead_to_the_named_values_costs_a_whole_download(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path)
    held = globals_()
    gateway.add_task(spec(), held)
    work(agent)
    name = "heads.intent.weight"
    wrong = encode(torch.ones_like(held[name]), "fp16")
    gateway.blobs[content_hash(wrong)] = wrong
    task = gateway.add_task(spec(), held | {name: held[name] + 5})
    for ref in task.tensors:
        if ref.name == name:
            ref.base, ref.delta = content_hash(raw(held[name])), content_hash(wrong)
            ref.delta_encoding, ref.delta_bytes = "fp16", len(wrong)
            whole = ref.hash
    work(agent, tasks=2)
    assert agent.counts["accepted"] == 2 and gateway.downloaded[-1] == whole


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_what_an_encoding_loses_joins_the_next_update_within_the_bound(
    gateway: FakeGateway, tmp_path: Path, encoding: str
) -> None:
    small = {name: torch.full(shape, 1e-3) for name, shape in spec().parameters}
    size = math.sqrt(sum(float((t**2).sum()) for t in small.values()))
    small["heads.intent.bias"][0] = 0.2  # beside it int8 has no room for the others

    def train(*_: object) -> Trained:
        return Trained({name: tensor.clone() for name, tensor in small.items()}, False)

    agent = declared(gateway, tmp_path, train=train)
    for _ in range(4):
        gateway.add_task(spec(clip=0.3), globals_(), upload_encoding=encoding)
    work(agent, tasks=4)
    shapes, total = dict(spec().parameters), 0.0
    for ((head, data),) in gateway.uploads.values():
        values, start = [], 0
        for tensor in head.tensors:
            piece = data[start : start + tensor.bytes]
            values.append(decode(piece, encoding, shapes[tensor.name]))
            start += tensor.bytes
        assert math.sqrt(sum(float((v.double() ** 2).sum()) for v in values)) <= 0.3
        total += float(values[0].sum())
    wanted = 4 * float(small[next(iter(small))].sum())
    assert size > 0 and abs(total - wanted) <= 0.3 * wanted


# -- failures --------------------------------------------------------------------------------------


def test_sessions_that_expire_are_opened_anew(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    before = gateway.opened

    def forget(call: str) -> None:
        if call in ("Download", "Upload") and forget.calls.pop(call, None):  # type: ignore[attr-defined]
            gateway.sessions.clear()

    forget.calls = {"Download": True, "Upload": True}  # type: ignore[attr-defined]
    gateway.breaks = forget
    gateway.sessions.clear()
    gateway.add_task(spec(), globals_())
    work(agent)
    assert agent.counts == {"accepted": 1} and gateway.opened > before


def test_a_device_that_is_revoked_says_so_and_stops(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    gateway.keys.clear()
    gateway.sessions.clear()
    with pytest.raises(NoLongerKnown, match="does not know this device"):
        work(agent, lambda _: False)


@pytest.mark.parametrize("call", ["CheckIn", "Download", "Chunk", "Upload", "Part", "Receipt"])
def test_a_gateway_that_dies_in_any_call_gets_one_update(
    gateway: FakeGateway, tmp_path: Path, call: str
) -> None:
    agent = declared(gateway, tmp_path)
    task = gateway.add_task(spec(), globals_())
    deaths = [0]

    async def die(now: str) -> None:
        if now == call and deaths[0] < 2:
            deaths[0] += 1
            raise RuntimeError("killed")

    gateway.breaks = die
    work(agent)
    assert deaths[0] == 2 and agent.counts == {"accepted": 1}
    whole = gateway.uploads[task.id][0][1]
    assert all(whole.startswith(arrived) for arrived in gateway.begun[task.id])
    assert all(data == whole for _, data in gateway.uploads[task.id])


def test_a_gateway_that_restarts_finds_its_devices_again(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path)

    async def scene() -> None:
        running = asyncio.create_task(agent.run(lambda agent: agent.counts["accepted"] > 0))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(gateway.stop)
        gateway.sessions.clear()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(gateway.start)
        gateway.add_task(spec(), globals_())
        await asyncio.wait_for(running, 15)

    do(scene())
    assert agent.counts == {"accepted": 1}


@pytest.mark.parametrize(
    ("outcome", "name"), [(pb.LATE, "late"), (pb.REFUSED, "refused"), (pb.DUPLICATE, "accepted")]
)
def test_every_receipt_ends_the_task(
    gateway: FakeGateway, tmp_path: Path, outcome: int, name: str
) -> None:
    agent = declared(gateway, tmp_path)
    gateway.outcome = lambda _: outcome
    task = gateway.add_task(spec(), globals_())
    work(agent)
    assert agent.journal.state(task.id) == name and agent.counts == {name: 1}
    assert not list((tmp_path / "spool").glob("*.update"))


def test_a_task_past_its_deadline_is_dropped_and_costs_nothing(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    import time

    def slow(*arguments: Any) -> Trained:
        time.sleep(0.3)
        return constant(*arguments)

    agent = declared(gateway, tmp_path, train=slow)
    task = gateway.add_task(spec(), globals_(), deadline_ms=200)
    work(agent)
    assert agent.counts == {"late": 1} and agent.journal.costs() == []
    assert task.id not in gateway.begun


def test_a_disk_that_fails_under_an_upload_is_one_more_thing_to_wait_for(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = declared(gateway, tmp_path)
    gateway.add_task(spec(), globals_())
    parts, failures = Spooled.parts, [1, 2]

    def failing(spooled: Spooled) -> Iterator[pb.UploadPart]:
        for part in parts(spooled):
            if failures and part.data:
                failures.pop()
                raise OSError(5, "Input/output error")
            yield part

    monkeypatch.setattr(Spooled, "parts", failing)
    work(agent)
    assert agent.counts == {"accepted": 1} and not failures


def test_a_full_disk_declines_the_task_and_leaves_nothing(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = declared(gateway, tmp_path)
    task = gateway.add_task(spec(), globals_())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sottovoce.client.agent.update_spool.write_whole", full)
    work(agent)
    assert gateway.declined == {task.id: "failed"} and not gateway.begun
    assert agent.journal.state(task.id) == "declined"
    assert not list((tmp_path / "spool").glob("*.*"))


def test_stop_ends_a_held_check_in_at_once(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.hold_s = 30
    agent = an_agent(gateway, tmp_path, pace=Pace(wait_s=30))

    async def scene() -> None:
        running = asyncio.create_task(agent.run())
        await asyncio.sleep(0.2)
        agent.stop()
        await asyncio.wait_for(running, 3)

    do(scene())


@pytest.mark.parametrize(
    "error", [NotFinite("the update is not finite: it is not sent"), MemoryError(), IndexError()]
)
def test_training_that_fails_over_its_examples_is_declined_and_counted(
    gateway: FakeGateway, tmp_path: Path, error: Exception
) -> None:
    def diverge(*_: object) -> Trained:
        raise error

    agent = declared(gateway, tmp_path, train=diverge)
    task = gateway.add_task(spec(NOISED), globals_())
    work(agent)
    reason = "memory" if isinstance(error, MemoryError) else "failed"
    assert gateway.declined == {task.id: reason} and not gateway.begun
    assert agent.journal.state(task.id) == "declined" and len(agent.journal.costs()) == 1


def test_a_specification_that_cannot_be_trained_costs_nothing(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    def fail(*_: object) -> Trained:
        raise ConfigError("no such model here")

    agent = declared(gateway, tmp_path, train=fail)
    task = gateway.add_task(spec(NOISED), globals_())
    work(agent)
    assert gateway.declined == {task.id: "failed"} and not agent.journal.costs()


def test_an_update_that_was_perhaps_sent_is_never_made_anew(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path)
    task = gateway.add_task(spec(), globals_())

    async def vanish(call: str) -> None:
        if call == "Receipt":
            raise RuntimeError("killed")

    gateway.breaks = vanish
    work(agent, lambda _: task.id in gateway.uploads)
    agent.journal.close()
    (path,) = (tmp_path / "spool").glob("*.update")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # what a failing disk does
    gateway.breaks = lambda call: None
    gateway.over.clear()
    sent = len(gateway.uploads[task.id])
    again = an_agent(gateway, tmp_path)
    work(again, lambda agent: bool(gateway.declined))
    assert len(gateway.uploads[task.id]) == sent and again.counts["lost"] == 1
    assert gateway.declined == {task.id: "failed"}


# -- a hostile gateway -----------------------------------------------------------------------------


def changed(value: TaskSpec, path: str, new: Any) -> bytes:
    """A specification's JSON with one value replaced."""
    values = json.loads(value.to_bytes())
    *outer, last = path.split(".")
    place = values
    for key in outer:
        place = place[key]
    place[last] = new
    return json.dumps(values).encode()


HOSTILE = {
    "an unknown entry": ("code", "import os"),
    "endless layers": ("model.layers", 10**9),
    "a huge table": ("model.embedding_size", 10**12),
    "a row without end": ("task.max_length", 10**9),
    "buckets of negative size": ("task.vocabulary", {"source": "hash", "buckets": -1}),
    "a vocabulary in a file elsewhere": (
        "task.vocabulary", {"source": "file", "path": "/etc/passwd", "content": "a"}
    ),
    "another vocabulary": ("task.vocabulary", {"source": "hash", "buckets": 50}),
    "a model that does not exist": ("model.name", "eval"),
    "no rate": ("training.learning_rate", "1"),
    "noise that is not run": ("privacy.example", {"noise_multiplier": 1.0, "clip_norm": 1.0}),
    "batches that are not accounted": ("training.plan.poisson", True),
    "tensors of absurd shape": ("parameters", [["a", [2**40, 2**40]]]),
    "no tensors": ("parameters", []),
    "rounds without end": ("rounds", 2**70),
}


def test_malformed_specifications_are_declined(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path, train=train_task)
    attacks = {
        name: gateway.add_task(changed(spec(), *change), globals_())
        for name, change in HOSTILE.items()
    }
    work(agent, tasks=len(HOSTILE))
    for name, task in attacks.items():
        assert gateway.declined.get(task.id) in ("failed", "policy"), name
    assert agent.journal.costs() == [] and not gateway.begun


def test_what_is_no_specification_is_declined(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    blobs = [b"", b"[" * 100_000, b"\xff\xfe", b'{"run": NaN}', b"null"]
    tasks = [gateway.add_task(data, globals_()) for data in blobs]
    work(agent, tasks=len(tasks))
    assert gateway.declined == {task.id: "failed" for task in tasks}


def test_tasks_that_do_not_fit_are_declined(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    attacks: list[tuple[dict[str, Any], str]] = [
        ({"spec_bytes": 1 << 31}, "failed"),
        ({"spec_bytes": 5}, "failed"),
        ({"run": "another"}, "policy"),
        ({"level": 9}, "policy"),
        ({"round": 99}, "policy"),
        ({"upload_encoding": "zip"}, "policy"),
        ({"clips": True, "clip_norm": math.nan}, "policy"),
        ({"clips": True, "clip_norm": -1.0}, "policy"),
        ({"tensors": []}, "failed"),
    ]
    expected = {
        gateway.add_task(spec(), globals_(), **changes).id: reason for changes, reason in attacks
    }
    work(agent, tasks=len(attacks))
    assert gateway.declined == expected and not gateway.begun


def test_noised_updates_under_a_device_level_claim_travel_as_they_are(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path)
    task = gateway.add_task(spec(NOISED), globals_(), upload_encoding="int8")
    work(agent)
    assert gateway.declined == {task.id: "policy"}


def test_parameters_that_are_no_numbers_are_declined(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    bad = globals_()
    bad["heads.intent.bias"][0] = math.nan
    task = gateway.add_task(spec(), bad)
    work(agent)
    assert gateway.declined == {task.id: "failed"}


@pytest.mark.parametrize("attack", ["longer", "shorter", "other bytes"])
def test_blobs_that_are_not_what_they_are_named_are_dropped(
    gateway: FakeGateway, tmp_path: Path, attack: str
) -> None:
    agent = declared(gateway, tmp_path)
    task = gateway.add_task(spec(), globals_())
    name = task.tensors[0].hash
    data = gateway.blobs[name]
    gateway.blobs[name] = {
        "longer": data + bytes(1 << 22), "shorter": data[:-4], "other bytes": bytes(len(data))
    }[attack]
    work(agent)
    assert gateway.declined == {task.id: "failed"}


def test_tasks_without_a_usable_id_touch_nothing(gateway: FakeGateway, tmp_path: Path) -> None:
    agent = declared(gateway, tmp_path)
    for number in ("", "../../etc/passwd", "A" * 32, "0" * 31, "\0" * 32):
        gateway.tasks.clear()
        gateway.add_task(spec(), globals_(), id=number)
        before = gateway.checked_in
        work(agent, lambda _, before=before: gateway.checked_in > before + 1)
    assert not agent.counts and not gateway.begun


def test_a_task_that_needs_more_memory_than_there_is_is_declined(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path, memory_mb=0.01)
    task = gateway.add_task(spec(), globals_())
    work(agent)
    assert gateway.declined == {task.id: "memory"}


def test_draws_that_would_not_fit_in_memory_are_declined_before_they_are_made(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    """Steps without end cost a server nothing to ask for; a coin for each example does."""
    agent = declared(gateway, tmp_path, memory_mb=10)
    gateway.add_task(changed(spec(NOISED), "training.plan.local_epochs", 10_000), globals_())
    gateway.add_task(spec(NOISED), globals_())
    work(agent, tasks=2)
    assert sorted(gateway.declined.values()) == ["memory"]
    assert agent.counts == {"declined": 1, "accepted": 1} and len(agent.journal.costs()) == 1


def test_a_device_that_may_not_work_neither_checks_in_nor_begins(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    power = [True]
    policy = Policy(eligibility=Conditions(charging=True))
    probes = Probes(lambda: power[0], lambda: 0.0, lambda _: True)
    agent = declared(gateway, tmp_path, policy=policy, probes=probes)

    def unplug(call: str) -> None:
        power[0] = power[0] and call != "Download"

    gateway.breaks = unplug
    task = gateway.add_task(spec(), globals_())
    work(agent)
    assert gateway.declined == {task.id: "busy"} and not gateway.begun
    before = gateway.checked_in
    steps = [0]

    def several(_: Agent) -> bool:
        steps[0] += 1
        return steps[0] > 4

    work(agent, several)
    assert gateway.checked_in == before


def test_a_wall_clock_that_jumps_moves_nothing(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = declared(gateway, tmp_path)
    jumps = count(-(2**33), 2**31)
    clock = SimpleNamespace(time=lambda: float(next(jumps)))
    for module in ("agent", "journal"):  # gRPC reads both clocks, which jump together
        monkeypatch.setattr(f"sottovoce.client.agent.{module}.time", clock)
    for _ in range(3):
        gateway.add_task(spec(), globals_())
    work(agent, tasks=3)
    assert agent.counts == {"accepted": 3} and agent.store.count()


def test_the_devices_own_budget_holds_whatever_is_asked(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    agent = declared(gateway, tmp_path, policy=Policy(max_participations=2))
    tasks = [gateway.add_task(spec(), globals_()) for _ in range(4)]
    work(agent, tasks=4)
    assert agent.counts == {"accepted": 2, "declined": 2}
    assert set(gateway.declined) == {task.id for task in tasks[2:]}
    assert set(gateway.declined.values()) == {"budget"}


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """What looks at tasks before anything is fetched, of a device that declared level 4."""
    folder = tmp_path_factory.mktemp("store")
    DeviceStore(folder).close()
    journal = Journal(folder)
    journal.declare("r", 4, 10)
    connection = Connection(Identity("127.0.0.1:1", 5, bytes(32), insecure=True))
    return Preparation(connection, BlobCache(folder / "cache"), journal, Policy(), lambda: 0.0)


references = st.builds(
    pb.TensorRef,
    name=st.sampled_from(["heads.intent.bias", "", "x" * 1000]),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    hash=st.binary(max_size=33), base=st.binary(max_size=33), delta=st.binary(max_size=33),
    delta_encoding=st.sampled_from(["fp32", "int8", "zip", ""]),
    delta_bytes=st.integers(0, 2**64 - 1),
)
orders = st.builds(
    pb.Task,
    id=st.text(max_size=40), run=st.sampled_from(["r", "", "other"]),
    round=st.sampled_from([0, 1, 10, 2**32 - 1]), number=st.integers(0, 2**32 - 1),
    level=st.sampled_from([4, 0, 2**32 - 1]), spec=st.binary(max_size=33),
    spec_bytes=st.integers(0, 2**32 - 1), tensors=st.lists(references, max_size=3),
    deadline_ms=st.integers(0, 2**32 - 1), clips=st.booleans(),
    clip_norm=st.floats(), upload_encoding=st.sampled_from(["fp32", "int8", "", "zip"]),
)


@settings(max_examples=200, deadline=None)
@given(order=orders)
def test_whatever_is_in_a_task_it_is_declined_before_anything_is_fetched(
    careful: Preparation, order: pb.Task
) -> None:
    with pytest.raises((Declined, SottovoceError)):
        careful.check(order, spec())
    if not (len(order.spec) == 32 and 0 < order.spec_bytes <= 1 << 24):
        with pytest.raises(SottovoceError):
            do(careful.specification(order, 1.0))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_message_are_an_error_of_their_own(data: bytes) -> None:
    for kind in (pb.CheckInReply, pb.Task, pb.Chunk, pb.Receipt, pb.EnrolReply):
        try:
            found = kind.FromString(data)
        except DecodeError:
            continue
        assert found.ByteSize() <= 2 * len(data)


# -- the way there ---------------------------------------------------------------------------------


def test_a_token_is_good_for_one_enrolment(gateway: FakeGateway) -> None:
    do(enrol(gateway.address, "one-time", insecure=True))
    with pytest.raises(RunError, match="does not take this token"):
        do(enrol(gateway.address, "one-time", insecure=True))


def test_without_tls_a_device_speaks_to_its_own_machine_alone() -> None:
    with pytest.raises(ConfigError, match="loopback"):
        open_channel("192.0.2.1:9400", ca=b"", insecure=True)


def test_a_gateway_with_another_certificate_is_not_spoken_to() -> None:
    other, _, _ = certificates()
    with FakeGateway(tls=True) as gateway, pytest.raises(RunError, match="cannot be joined"):
        do(enrol(gateway.address, "one-time", ca=other))


def test_another_protocol_is_one_line_on_what_to_update(gateway: FakeGateway) -> None:
    import grpc

    identity = do(enrol(gateway.address, "one-time", insecure=True))

    async def refuse(request: object, context: Any) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "protocol 2")

    gateway.Challenge = refuse  # type: ignore[method-assign]
    gateway.stop()
    gateway.start()

    async def scene() -> None:
        connection = Connection(identity)
        try:
            await connection.check_in(pb.CheckInRequest())
        finally:
            await connection.close()

    with pytest.raises(OtherProtocol, match="update sottovoce"):
        do(scene())


def test_no_connection_is_something_to_try_again() -> None:
    identity = Identity("127.0.0.1:1", 5, bytes(32), insecure=True)

    async def scene() -> None:
        connection = Connection(identity)
        try:
            await connection.check_in(pb.CheckInRequest())
        finally:
            await connection.close()

    with pytest.raises(Unreachable):
        do(scene())


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_server_writes_cannot_forge_lines_or_move_a_terminal(as_json: bool) -> None:
    stream = io.StringIO()
    log_to(stream, as_json=as_json)
    say("task", run="r\n2026-01-01 00:00:00 handed over\x1b[2J\u202e", round=1)
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable() and "\u202e" not in line


@pytest.mark.parametrize("clip", [0.3, None])
def test_no_server_gets_a_bit_on_examples_that_noise_on_the_device_does_not_cover(
    gateway: FakeGateway, tmp_path: Path, clip: float | None
) -> None:
    """Whether the signal was longer than the bound is known before any noise."""
    agent = declared(gateway, tmp_path, policy=Policy(max_epsilon=1e6))
    task = gateway.add_task(changed(spec(NOISED, clip), "reports_clipped", True), globals_())
    work(agent)
    assert gateway.declined == {task.id: "failed"} and not gateway.begun


def test_a_listing_shows_names_of_runs_without_moving_the_terminal(tmp_path: Path) -> None:
    with closing(a_store(tmp_path)) as store, closing(Journal(tmp_path)) as journal:
        journal.begin("0" * 32, "\x1b[2J\n", 1, StepCost(1.0, 0.1, 1))
        assert "\x1b" not in listing(facts(store))


def test_an_address_of_ipv6_needs_its_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gRPC would take the port for a part of the address, and call another machine."""
    assert join(["::1:9400", "--store", str(tmp_path / "store")]) == 1
    assert "[::1]:9400" in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_nothing_that_is_logged_tells_of_examples(
    gateway: FakeGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    logging.getLogger("sottovoce").propagate = True
    with caplog.at_level(logging.DEBUG, "sottovoce"):
        agent = declared(gateway, tmp_path)
        gateway.add_task(spec(), globals_())
        work(agent)
    lines = json.dumps([
        [record.getMessage(), repr(getattr(record, "fields", {}))] for record in caplog.records
    ])
    assert "handed over" in lines
    identity = Identity.load(tmp_path / "identity")
    assert identity is not None
    assert identity.key.hex() not in lines and repr(identity.key) not in lines
    for row in agent.store.rows(agent.store.last_id()):
        assert " ".join(row.tokens) not in lines and str(row.intent) not in lines
