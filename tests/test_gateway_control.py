"""Another process gets from a gateway's socket what this one gets from the gateway itself."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from gateway_devices import RUN, Training, order_for, random_tensors, ready, serving

from sottovoce.client.errors import RunError
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.server.gateway.control import KEY, SERVICE, GatewayClient
from sottovoce.server.gateway.control_messages import (
    order_pieces,
    read_order,
    read_result,
    result_pieces,
)
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, RoundResult


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with serving(tmp_path / "g") as found:
        yield found


def test_orders_and_results_survive_the_way() -> None:
    order = order_for(
        [1, 2**63 - 1], norm_bounds={3: 0.1, 4: math.inf}, clip_norm=0.3, enough=None,
        parameters={"b": torch.zeros(()), "a": torch.randn(700, 900)}, counts_clipped=True,
    )  # fmt: skip
    found = read_order(list(order_pieces(order)))
    assert list(found.parameters) == ["b", "a"]
    assert all(torch.equal(found.parameters[n], t) for n, t in order.parameters.items())
    assert np.array_equal(found.devices, order.devices) and found.levels.dtype == np.uint8
    for name in ("run", "round", "spec", "numbers", "clip_norm", "norm_bounds", "enough"):
        assert getattr(found, name) == getattr(order, name)
    sums = {"x": torch.randn(3, dtype=torch.float64), "y": torch.zeros((), dtype=torch.float64)}
    result = RoundResult(sums, {0: 3, 15: 1}, 1, 2, 3, {"norm": 4}, 5, 6, 7)
    again = read_result(list(result_pieces(result)))
    assert all(torch.equal(again.sums[name], sums[name]) for name in sums)
    again.sums = result.sums
    assert again == result


def test_the_socket_gives_what_the_gateway_gives(gateway: Gateway) -> None:
    devices = ready(gateway, 3)
    with GatewayClient(gateway.folder) as client:
        results = []
        for number, served in enumerate((gateway, client), start=1):
            training = Training(served, order_for([d.number for d in devices], round=number))
            for seed, device in enumerate(devices[:2]):
                task = device.task()
                assert device.report(task, random_tensors(seed)).outcome == pb.ACCEPTED
            devices[2].decline(devices[2].task().id, "budget")
            results.append(training.result())
        assert all(torch.equal(results[0].sums[n], t) for n, t in results[1].sums.items())
        results[1].sums = results[0].sums
        assert results[0] == results[1]
        assert client.roster(RUN) == gateway.roster(RUN)
        assert client.address == gateway.address
        assert {d["device"] for d in client.devices()} == {d.number for d in devices}
        client.note_privacy("device", 1.0, None)
        assert client.status()["privacy"] == {"device": {"spent": 1.0, "budget": None}}
        assert client.status().keys() == gateway.status().keys()
        assert len(client.tokens(3, 60)) == 3
        assert client.revoke(devices[0].number) and not client.revoke(devices[0].number)
        client.finish(RUN)
        assert gateway.status()["run"] == ""
        client.announce("summer")
        assert gateway.status()["run"] == "summer"


def test_refusals_come_through_in_the_gateways_words(gateway: Gateway) -> None:
    with GatewayClient(gateway.folder) as client:
        with pytest.raises(RunError, match="not announced"):
            client.train(order_for([1]))
        with pytest.raises(RunError, match="up to a year"):
            client.tokens(0)


def test_without_a_gateway_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no gateway serves"):
        GatewayClient(tmp_path)
    with serving(tmp_path / "g") as gateway:
        client = GatewayClient(gateway.folder)
    with pytest.raises(RunError, match="does not answer"):
        client.status()
    with pytest.raises(RunError, match="no gateway serves"):
        GatewayClient(tmp_path / "g")


def test_the_socket_is_for_those_who_can_read_its_key(gateway: Gateway) -> None:
    found = json.loads((gateway.folder / "control.json").read_text())
    assert stat.S_IMODE(os.stat(found["socket"]).st_mode) == 0o600
    with grpc.insecure_channel(f"unix:{found['socket']}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/Call")
        request = json.dumps({"method": "status", "arguments": []}).encode()
        for metadata in ((), ((KEY, bytes(32)),)):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        good = ((KEY, bytes.fromhex(found["key"])),)
        for method in ("_release", "stop", "__init__"):
            request = json.dumps({"method": method, "arguments": []}).encode()
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=good)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_folder_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20) / ("long" * 20)
    with serving(folder) as gateway, GatewayClient(folder) as client:
        assert client.address == gateway.address
        elsewhere = Path(json.loads((folder / "control.json").read_text())["socket"])
        assert stat.S_IMODE(elsewhere.parent.stat().st_mode) == 0o700
    assert not elsewhere.parent.exists()


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from gateway_devices import *
    from sottovoce.server.gateway.control import GatewayClient
    GatewayClient(Path(sys.argv[1])).train(order_for([int(sys.argv[3])], deadline_s=60))
"""


def test_a_round_ends_with_the_process_that_asked_for_it(gateway: Gateway) -> None:
    device = ready(gateway, 1)[0]
    tests = str(Path(__file__).parent)
    asking = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(gateway.folder), tests,
         str(device.number)],
    )  # fmt: skip
    task = device.task()
    asking.kill()
    asking.wait()
    while gateway.status()["round"] is not None:
        time.sleep(0.02)
    assert device.report(task, random_tensors(1)).outcome == pb.LATE
    training = Training(gateway, order_for([device.number]))
    assert device.report(device.task(), random_tensors(1)).outcome == pb.ACCEPTED
    assert training.result().accepted == 1


def test_a_gateway_starts_over_what_a_killed_one_left(tmp_path: Path) -> None:
    with serving(tmp_path / "g") as gateway:
        left = (gateway.folder / "control.json").read_text()
    (tmp_path / "g" / "control.json").write_text(left)
    (tmp_path / "g" / "control" / "socket").write_text("")
    Gateway(tmp_path / "g", GatewaySettings(port=0))
    with serving(tmp_path / "g") as gateway, GatewayClient(gateway.folder) as client:
        assert client.address == gateway.address
