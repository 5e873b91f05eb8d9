"""Real device agents at a real gateway, over TLS: rounds add up, and both ends may come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gateway import do, the_loop
from gateway_devices import RUN, Training, order_for, serving
from live_devices import spec_of, stored
from small_fleets import SIZES, fleet, parts
from torch import Tensor

from sottovoce.client.agent.agent import Agent, Pace
from sottovoce.client.agent.connection import enrol
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.agent.work import Trained
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.wire import decode, encode
from sottovoce.server.gateway.gateway import Gateway, RoundOrder

QUICK = Pace(wait_s=2, again_s=0.02, most_s=0.1, backoff_s=0.02, most_backoff_s=0.1, grace_s=2)
DEVICES = 3
CLIP = 0.3


class Site:
    """Some agents, what they were sent and what they answered, by (round, number)."""

    def __init__(self, folder: Path, encoding: str = "fp32") -> None:
        self.encoding = encoding
        self.models: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.updates: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.stores = [DeviceStore(folder / f"device{place}") for place in range(DEVICES)]
        for place, store in enumerate(self.stores):
            store.add(
                {"tokens": list(row.tokens), "intent": row.intent, "slots": list(row.slots or ())}
                for row in stored(parts("bilstm")[0], place)
            )
        _, task, model = parts("bilstm")
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        training = fleet("bilstm", None, CLIP).training
        spec = spec_of(task, model, "bilstm", SIZES["bilstm"], training, run=RUN)
        self.spec = spec.to_bytes()

    def train(self, _: Any, order: pb.Task, model: dict[str, Tensor], __: Any) -> Trained:
        """Stands for training; what it gives is rounded already, so that nothing else is lost."""
        draw = torch.Generator().manual_seed(100 * order.round + order.number)
        update = {
            name: decode(encode(1e-3 * torch.randn(t.shape, generator=draw), self.encoding),
                         self.encoding, t.shape)
            for name, t in model.items()
        }  # fmt: skip
        at = (order.round, order.number)
        self.models[at], self.updates[at] = model, update
        return Trained(update, False)

    def join(self, gateway: Gateway) -> None:
        """Enrol all devices and let them run."""
        assert gateway.ca_file is not None
        ca = gateway.ca_file.read_bytes()
        self.identities = [
            do(enrol(gateway.enrol_address, token, ca=ca)) for token in gateway.tokens(DEVICES)
        ]
        self.run(gateway)

    def run(self, gateway: Gateway) -> None:
        """Let the enrolled devices run."""
        self.agents = [
            Agent(gateway.address, store, credentials=identity, policy=Policy(), train=self.train,
                  pace=QUICK)
            for store, identity in zip(self.stores, self.identities, strict=True)
        ]  # fmt: skip
        self.running: list[Future[None]] = [
            asyncio.run_coroutine_threadsafe(agent.run(), the_loop()) for agent in self.agents
        ]

    def leave(self) -> None:
        """End the agents."""
        for agent in self.agents:
            the_loop().call_soon_threadsafe(agent.stop)
        for running in self.running:
            running.result(10)

    def order(self, gateway: Gateway, number: int, **changes: Any) -> RoundOrder:
        """A round of all members."""
        members = gateway.roster(RUN)
        return order_for(
            [member.device for member in members], round=number, spec=self.spec,
            parameters=self.parameters, deadline_s=20.0,
            levels=np.array([member.level for member in members], dtype=np.uint8), **changes,
        )  # fmt: skip


def eventually(what: Callable[[], bool]) -> None:
    """Wait for something that is about to happen."""
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def total(updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Their sum in float64."""
    return {n: sum(u[n].double() for u in updates) for n in updates[0]}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("up", "down", "mutual"), [("fp32", "fp32", False), ("fp16", "int8", True)]
)
def test_agents_train_round_after_round_and_every_report_is_in_its_sum(
    tmp_path: Path, up: str, down: str, mutual: bool
) -> None:
    site, tls = Site(tmp_path, up), {"mutual_tls": True, "enrol_port": 0} if mutual else {}
    with serving(tmp_path / "g", **tls) as gateway:
        gateway.announce(RUN)
        site.join(gateway)
        eventually(lambda: len(gateway.roster(RUN)) == DEVICES)
        levels = {m.device: m.level for m in gateway.roster(RUN)}
        assert [levels[i.device] for i in site.identities] == [
            store.count().bit_length() - 1 for store in site.stores
        ]
        for number in (1, 2, 3):
            order = site.order(gateway, number, upload_encoding=up, download_encoding=down)
            result = Training(gateway, order).result()
            assert result.accepted == DEVICES, result
            found = [site.models[number, place] for place in range(DEVICES)]
            wanted = total([site.updates[number, place] for place in range(DEVICES)])
            for name, tensor in site.parameters.items():
                assert all(torch.equal(model[name], found[0][name]) for model in found)
                exact = {} if down == "fp32" or number == 1 else {"atol": 1e-4}
                assert torch.allclose(found[0][name], tensor, rtol=0, **{"atol": 0.0, **exact})
                assert torch.allclose(result.sums[name], wanted[name], rtol=0, atol=1e-4)
            site.parameters = {
                name: (tensor + result.sums[name] / DEVICES).float()
                for name, tensor in site.parameters.items()
            }
        site.leave()


def test_agents_come_back_by_themselves_to_a_gateway_that_was_restarted(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with serving(tmp_path / "g") as gateway:
        gateway.announce(RUN)
        site.join(gateway)
        eventually(lambda: len(gateway.roster(RUN)) == DEVICES)
        port = int(gateway.address.rpartition(":")[2])
        broken = Training(gateway, site.order(gateway, 1))
        gateway.stop(0.0)
        broken_result: Any = None
        try:
            broken_result = broken.result()
        except ValueError:
            pass
    with serving(tmp_path / "g", port=port) as gateway:
        gateway.announce(RUN)
        assert len(gateway.roster(RUN)) == DEVICES
        result = Training(gateway, site.order(gateway, 2)).result()
        assert result.accepted == DEVICES
        assert broken_result is None or broken_result.accepted == DEVICES
        site.leave()
