"""Every accepted update is in the sum once; whatever else devices send is not in it at all."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from gateway_devices import (
    RUN,
    SHAPES,
    SPEC,
    Tensors,
    Training,
    order_for,
    random_tensors,
    ready,
    serving,
    upload_parts,
)

from sottovoce.client.errors import RunError
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.wire import ENCODINGS, content_hash, decode, encode
from sottovoce.server.gateway.blobs import Versions
from sottovoce.server.gateway.gateway import Gateway
from sottovoce.server.gateway.uploads import InFlight


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with serving(tmp_path / "g") as found:
        yield found


def total(*updates: Tensors) -> Tensors:
    """Their sum in float64."""
    return {name: sum(u[name].double() for u in updates) for name in SHAPES}  # type: ignore[misc]


def close_to(found: Tensors, wanted: Tensors) -> bool:
    """Equal but for the order of addition."""
    return all(torch.allclose(found[n], wanted[n].double(), rtol=1e-12, atol=1e-12) for n in SHAPES)


def norm(tensors: Tensors) -> float:
    """Over all tensors, in float64."""
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors.values()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_sum_is_that_of_the_accepted_updates(gateway: Gateway, encoding: str) -> None:
    devices = ready(gateway, 4)
    updates = [random_tensors(seed) for seed in range(4)]
    training = Training(
        gateway,
        order_for([d.number for d in devices], upload_encoding=encoding, counts_clipped=True),
    )
    for place, (device, update) in enumerate(zip(devices, updates, strict=True)):
        task = device.task()
        assert (task.number, task.level, task.round, task.run) == (place, 3, 1, RUN)
        assert device.report(task, update, clipped=place % 2 == 0).outcome == pb.ACCEPTED
    received = [
        {n: decode(encode(t, encoding), encoding, t.shape) for n, t in u.items()} for u in updates
    ]
    result = training.result()
    assert result.accepted_by_level == {3: 4} and result.clipped == 2
    assert close_to(result.sums, total(*received))
    assert all(tensor.dtype == torch.float64 for tensor in result.sums.values())


def test_what_devices_do_wrong_is_counted_and_not_summed(gateway: Gateway) -> None:
    good = random_tensors(1)
    inf = {**good, "scale": torch.tensor(math.inf)}
    nan = {**good, "bias": torch.tensor([0.0, math.nan, 0, 0])}
    missing = {"weight": good["weight"]}
    wrong = {
        "not_finite": [nan, inf], "norm": [random_tensors(2, 100.0)],
        "keys": [missing, {**good, "more": torch.zeros(1)}, {**missing, "other": good["bias"],
                                                            "scale": good["scale"]}],
        "shape": [{**good, "weight": torch.zeros(4, 3)}, {**good, "bias": torch.zeros(10**6)}],
    }  # fmt: skip
    sent = [(reason, update) for reason, updates in wrong.items() for update in updates]
    devices = ready(gateway, len(sent) + 1)
    order = order_for([d.number for d in devices], norm_bounds={3: 1.001 * norm(good)})
    training = Training(gateway, order)
    for device, (reason, update) in zip(devices, sent, strict=False):
        task = device.task()
        receipt = device.report(task, update)
        assert (receipt.outcome, receipt.reason) == (pb.REFUSED, reason)
        again = device.report(task, good)
        assert (again.outcome, again.reason) == (pb.REFUSED, reason)
    assert devices[-1].report(devices[-1].task(), good).outcome == pb.ACCEPTED
    result = training.result()
    assert result.refused == {reason: len(updates) for reason, updates in wrong.items()}
    assert result.accepted == 1 and close_to(result.sums, total(good))


def test_heads_that_do_not_match_their_data_are_refused(gateway: Gateway) -> None:
    good = random_tensors(1)

    def changed(task: str, change: Any) -> list[pb.UploadPart]:
        parts = upload_parts(task, good)
        change(parts)
        return parts

    def encoding(parts: list[pb.UploadPart]) -> None:
        parts[0].head.tensors[0].encoding = "fp16"

    def size(parts: list[pb.UploadPart]) -> None:
        parts[0].head.tensors[0].bytes = 2**50

    def twice(parts: list[pb.UploadPart]) -> None:
        parts[0].head.tensors[1].CopyFrom(parts[0].head.tensors[0])

    def longer(parts: list[pb.UploadPart]) -> None:
        parts += [pb.UploadPart(data=bytes(4))]

    def second_head(parts: list[pb.UploadPart]) -> None:
        parts.insert(1, parts[0])

    def crumbs(parts: list[pb.UploadPart]) -> None:
        parts[1:1] = [pb.UploadPart(data=b"")] * 1000

    cases = {encoding: "encoding", size: "bytes", twice: "keys", longer: "bytes",
             second_head: "malformed", crumbs: "malformed"}  # fmt: skip
    devices = ready(gateway, len(cases))
    training = Training(gateway, order_for([d.number for d in devices]))
    for device, (change, reason) in zip(devices, cases.items(), strict=True):
        receipt = device.upload(changed(device.task().id, change))
        assert (receipt.outcome, receipt.reason) == (pb.REFUSED, reason), change
    assert norm(training.result().sums) == 0


def test_an_update_a_hair_above_its_bound_is_brought_down_to_it(gateway: Gateway) -> None:
    update = random_tensors(1)
    bound = norm(update) * (1 - 5e-5)
    device = ready(gateway, 1)[0]
    training = Training(gateway, order_for([device.number], norm_bounds={3: bound}))
    assert device.report(device.task(), update).outcome == pb.ACCEPTED
    assert norm(training.result().sums) == pytest.approx(bound, rel=1e-12)


def test_streams_that_race_are_counted_once(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    update = random_tensors(1)
    other = ready(gateway, 1)[0]
    training = Training(gateway, order_for([device.number, other.number]))
    task, gate = device.task(), threading.Barrier(4)

    def parts() -> Iterator[pb.UploadPart]:
        sent = upload_parts(task.id, update)
        yield from sent[:-1]
        gate.wait(10)
        yield sent[-1]

    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda _: device.upload(parts()), range(4)))
    outcomes = sorted(receipt.outcome for receipt in receipts)
    assert outcomes == [pb.ACCEPTED, pb.DUPLICATE, pb.DUPLICATE, pb.DUPLICATE]
    assert device.report(task, random_tensors(9)).outcome == pb.DUPLICATE
    assert device.decline(task.id).outcome == pb.DUPLICATE
    assert other.decline(other.task().id).outcome == pb.ACCEPTED
    result = training.result()
    assert result.accepted == 1 and result.declined == 1
    assert close_to(result.sums, total(update))
    assert device.report(task, update).outcome == pb.DUPLICATE  # a receipt that was lost
    assert other.report(task, update).outcome == pb.LATE


def test_an_upload_that_breaks_off_leaves_nothing_and_can_be_sent_again(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    update = random_tensors(1)
    training = Training(gateway, order_for([device.number]))
    task = device.task()
    half = upload_parts(task.id, update)
    half[1].data = half[1].data[:20]
    with pytest.raises(grpc.RpcError) as caught:
        device.upload(half)
    assert caught.value.code() == grpc.StatusCode.ABORTED

    def dies() -> Iterator[pb.UploadPart]:
        yield from half
        device.channel.close()
        time.sleep(0.1)

    with pytest.raises((grpc.RpcError, ValueError)):
        device.upload(dies())
    device.connect().open()
    again = device.task()
    assert again.id == task.id and again.deadline_ms < 10_000
    assert device.report(again, update).outcome == pb.ACCEPTED
    assert close_to(training.result().sums, total(update))


def test_a_round_ends_at_its_deadline_whoever_hangs_on(gateway: Gateway) -> None:
    prompt, slow, silent = ready(gateway, 3)
    update = random_tensors(1)
    order = order_for([prompt.number, slow.number, silent.number], deadline_s=2.0)
    training = Training(gateway, order)
    task = slow.task()
    prompt.report(prompt.task(), update)

    def hangs() -> Iterator[pb.UploadPart]:
        yield upload_parts(task.id, update)[0]
        time.sleep(5)

    held = slow.stub.Upload.future(hangs(), metadata=slow.metadata)
    result = training.result()
    assert (result.accepted, result.late, result.silent) == (1, 1, 1)
    assert held.result(timeout=10).outcome == pb.LATE
    assert slow.report(task, random_tensors(2)).outcome == pb.LATE
    assert slow.decline(task.id).outcome == pb.LATE
    assert not silent.check_in().HasField("task")
    assert close_to(result.sums, total(update))


def test_an_upload_that_stalls_is_dropped_long_before_the_deadline(tmp_path: Path) -> None:
    with serving(tmp_path / "g", upload_stall_s=1.0) as gateway:
        device = ready(gateway, 1)[0]
        Training(gateway, order_for([device.number], deadline_s=5))
        task = device.task()

        def stalls() -> Iterator[pb.UploadPart]:
            yield upload_parts(task.id, random_tensors(1))[0]
            time.sleep(2)

        with pytest.raises(grpc.RpcError) as caught:
            device.upload(stalls())
        assert caught.value.code() == grpc.StatusCode.ABORTED
        assert device.report(task, random_tensors(1)).outcome == pb.ACCEPTED


def test_a_round_ends_when_enough_have_answered(gateway: Gateway) -> None:
    devices = ready(gateway, 4)
    training = Training(
        gateway, order_for([d.number for d in devices], enough=2, deadline_s=20)
    )
    tasks = [device.task() for device in devices]
    outcomes = [
        device.report(task, random_tensors(1)).outcome
        for device, task in zip(devices[:2], tasks, strict=False)
    ]
    result = training.result()
    assert outcomes == [pb.ACCEPTED] * 2
    assert (result.accepted, result.late, result.silent) == (2, 2, 0)
    assert devices[3].report(tasks[3], random_tensors(1)).outcome == pb.LATE


def test_a_device_that_comes_late_to_a_round_still_gets_its_task(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    training = Training(gateway, order_for([device.number], deadline_s=5))
    time.sleep(0.2)
    first = device.check_in(run="")
    assert first.declare and first.run == RUN and not first.HasField("task")
    device.report(device.task(), random_tensors(1))
    assert training.result().accepted == 1


def test_a_round_of_nobody_ends_at_once(gateway: Gateway) -> None:
    gateway.announce(RUN)
    result = gateway.train(order_for([]))
    assert result.accepted == 0 and norm(result.sums) == 0


def test_orders_that_cannot_be_are_said_in_one_line(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0].number
    bad = {"weight": torch.tensor([math.nan])}
    for changes, word in [
        ({"run": "other"}, "not announced"), ({"numbers": []}, "0 numbers"), ({"round": 0}, "1"),
        ({"parameters": bad}, "finite"), ({"parameters": {}}, "no parameters"),
        ({"upload_encoding": "fp8"}, "fp8"), ({"deadline_s": 0}, "deadline"), ({"spec": b""}, "0"),
        ({"norm_bounds": {1: -1.0}}, "positive"), ({"enough": 0}, "enough"),
    ]:  # fmt: skip
        with pytest.raises(RunError, match=word):
            gateway.train(order_for([device], **changes))
    with pytest.raises(RunError, match="asked twice"):
        gateway.train(order_for([device, device]))
    Training(gateway, order_for([device], deadline_s=3))
    while gateway.status()["round"] is None:
        time.sleep(0.01)
    with pytest.raises(RunError, match="one at a time"):
        gateway.train(order_for([device]))
    with pytest.raises(RunError, match="open round"):
        gateway.announce("other")


def test_a_stop_lets_uploads_finish_and_sends_the_others_home(tmp_path: Path) -> None:
    with serving(tmp_path / "g") as gateway:
        device, waiting = ready(gateway, 2)
        training = Training(gateway, order_for([device.number, waiting.number], deadline_s=60))
        task, begun, go_on = device.task(), threading.Event(), threading.Event()
        waiting.decline(waiting.task().id)

        def parts() -> Iterator[pb.UploadPart]:
            sent = upload_parts(task.id, random_tensors(1))
            yield sent[0]
            begun.set()
            go_on.wait(10)
            yield from sent[1:]

        request = pb.CheckInRequest(run=RUN, level=3, wait_ms=60_000)
        held = waiting.stub.CheckIn.future(request, metadata=waiting.metadata)
        upload = device.stub.Upload.future(parts(), metadata=device.metadata)
        begun.wait(10)
        while not gateway.status()["waiting"]:
            time.sleep(0.01)
        stopping = threading.Thread(target=gateway.stop, args=(5.0,))
        stopping.start()
        assert held.result(timeout=10).come_back_ms > 0
        go_on.set()
        assert upload.result(timeout=10).outcome == pb.ACCEPTED
        stopping.join(10)
        assert training.result().accepted == 1


def test_a_stop_breaks_off_a_round_that_is_not_complete(tmp_path: Path) -> None:
    with serving(tmp_path / "g") as gateway:
        device = ready(gateway, 1)[0]
        training = Training(gateway, order_for([device.number], deadline_s=60))
        device.task()
        gateway.stop(0.1)
        with pytest.raises(RunError, match="stopped"):
            training.result()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_devices_rebuild_the_model_bit_for_bit_from_differences(
    gateway: Gateway, encoding: str
) -> None:
    steady, newcomer = ready(gateway, 2)
    model, held = random_tensors(0), {}
    for number in range(1, 5):
        numbers = [steady.number] + [newcomer.number] * (number == 4)
        order = order_for(numbers, round=number, parameters=model, download_encoding=encoding)
        training = Training(gateway, order)
        task = steady.task()
        found = steady.model(task, held)
        for ref in task.tensors:
            raw = found[ref.name].numpy().astype("<f4").tobytes()
            assert content_hash(raw) == ref.hash
            assert bool(ref.base) == (encoding != "fp32" and number > 1)
        if number == 4:
            fresh = newcomer.model(newcomer.task())
            assert all(torch.equal(fresh[name], found[name]) for name in SHAPES)
            newcomer.decline(newcomer.task().id)
        held = {ref.hash: found[ref.name] for ref in task.tensors}
        steady.decline(task.id)
        training.result()
        if encoding == "fp32":
            assert all(torch.equal(found[name], model[name]) for name in SHAPES)
        model = {name: t + random_tensors(number, 0.1)[name] for name, t in model.items()}


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_what_differences_round_off_does_not_add_up(encoding: str) -> None:
    """The held model stays as near as one rounding of its last difference, after 200 of them."""
    versions, generator = Versions(), torch.Generator().manual_seed(3)
    model = {"weight": torch.randn(500, generator=generator)}
    relative = 1 / 127 if encoding == "int8" else 2**-10
    for _ in range(200):
        last = versions.held["weight"].values if versions.held else model["weight"]
        versions.next(SPEC, model, encoding)
        largest = float((model["weight"] - last).abs().max())
        error = float((versions.held["weight"].values - model["weight"]).abs().max())
        assert error <= relative * largest * 1.01 + 1e-6
        step = 0.01 * torch.randn(500, generator=generator)
        model = {"weight": model["weight"] + step}


def test_only_what_changed_has_to_be_fetched_again() -> None:
    versions, model = Versions(), random_tensors(0)
    first = versions.next(SPEC, model, "fp32")
    second = versions.next(SPEC, {**model, "bias": model["bias"] + 1}, "fp32")
    names = [{ref.name: ref.hash for ref in download.tensors} for download in (first, second)]
    assert {name for name in SHAPES if names[0][name] != names[1][name]} == {"bias"}
    assert len(second.blobs) == 4  # the specification and this round's tensors, nothing older


def test_bytes_in_flight_are_bounded_and_come_in_turn() -> None:
    import asyncio

    async def run() -> tuple[int, list[int]]:
        flight, most, order = InFlight(100), 0, []

        async def upload(number: int, size: int) -> None:
            nonlocal most
            async with flight.taking(size):
                most = max(most, flight.used)
                await asyncio.sleep(0)
                order.append(number)

        sizes = [60, 60, 30, 250, 10, 100, 1]
        given_up = None
        async with asyncio.TaskGroup() as group:
            for number, size in enumerate(sizes):
                group.create_task(upload(number, size))
            given_up = group.create_task(upload(99, 50))
            await asyncio.sleep(0)
            given_up.cancel()
        assert flight.used == 0
        return most, order

    most, order = asyncio.run(run())
    assert most == 250 and sorted(order) == list(range(7))  # the large one had it to itself




@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_devices_do_at_once_each_accepted_one_is_in_the_sum_once(
    gateway: Gateway, seed: int
) -> None:
    """Many devices misbehave in threads of their own; the sum is that of the accepted updates."""
    devices = ready(gateway, 8)
    order = order_for([d.number for d in devices], deadline_s=20, norm_bounds={3: 50.0})
    training = Training(gateway, order)

    def behave(place: int) -> list[tuple[int, Tensors]]:
        draw, device = random.Random(100 * seed + place), devices[place]
        task, answers = device.task(), []
        for attempt in range(6):
            update = random_tensors(1000 * place + attempt)
            act = draw.choice(["report", "report", "break", "reconnect", "nan", "large", "other"])
            if act == "break":
                with contextlib.suppress(grpc.RpcError):
                    device.upload(upload_parts(task.id, update)[:1])
            elif act == "reconnect":
                device.channel.close()
                device.connect().open()
            elif act == "other":
                unknown = pb.Task(id="f" * 32, upload_encoding="fp32")
                assert device.report(unknown, update).outcome == pb.LATE
            elif act == "report" or draw.random() < 0.2:
                if act == "nan":
                    update["bias"] = update["bias"] * math.nan
                update = {n: t * 1e4 for n, t in update.items()} if act == "large" else update
                answers.append((device.report(task, update).outcome, update))
        if not answers:
            device.decline(task.id)
        return answers

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(behave, range(8)))
    accepted = [u for sent in answers for outcome, u in sent if outcome == pb.ACCEPTED]
    assert all(sum(o == pb.ACCEPTED for o, _ in sent) <= 1 for sent in answers)
    result = training.result()
    assert result.accepted == len(accepted)
    assert result.accepted + result.declined + sum(result.refused.values()) == 8
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert close_to(result.sums, total(zero, *accepted))
