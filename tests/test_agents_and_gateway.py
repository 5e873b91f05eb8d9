"""The real agent and the real gateway: a live round is the simulated one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gateway import do
from live_devices import spec_of, stored
from small_fleets import NOISED, SIZES, fleet, parts
from torch import Tensor

from sottovoce.client.agent.agent import Agent, Pace
from sottovoce.client.agent.connection import enrol
from sottovoce.client.agent.identity import Identity
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.store import DeviceStore
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, RoundOrder, RoundResult

RUN = "spring"
DEVICES = [3, 17, 40]
QUICK = Pace(wait_s=2, again_s=0.05, most_s=0.1, backoff_s=0.05, most_backoff_s=0.2)


def started(
    gateway: Gateway, folder: Path, device: int, source: NoiseSource, **options: Any
) -> Agent:
    """An enrolled agent with a simulated device's examples."""
    store = DeviceStore(folder)
    store.add(
        {"tokens": list(row.tokens), "intent": row.intent, "slots": list(row.slots or ())}
        for row in stored(parts("bilstm")[0], device)
    )
    ca = gateway.ca_file.read_bytes() if gateway.ca_file else b""
    (token,) = gateway.tokens(1)
    identity: Identity = do(enrol(gateway.enrol_address, token, ca=ca))
    return Agent(
        gateway.address, store, credentials=identity, policy=Policy(), source=source, pace=QUICK,
        **options,
    )


def running(agents: list[Agent], body: Callable[[], RoundResult]) -> list[RoundResult]:
    """What `body` returns while the agents run."""
    found: list[RoundResult] = []

    async def scene() -> None:
        tasks = [asyncio.create_task(agent.run()) for agent in agents]
        await asyncio.to_thread(lambda: found.append(body()))
        for agent in agents:
            agent.stop()
        await asyncio.gather(*tasks)

    do(scene(), 60)
    return found


@pytest.mark.parametrize("mutual", [False, True])
def test_live_rounds_are_the_simulated_ones_and_encodings_lose_little(
    tmp_path: Path, mutual: bool
) -> None:
    _, task, model = parts("bilstm")
    training = fleet("bilstm", None, 0.3).training
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], training, run=RUN).to_bytes()
    source = NoiseSource.from_seed(9)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    extra = {"mutual_tls": True, "enrol_port": 0} if mutual else {}
    settings = GatewaySettings(port=0, come_back_s=0.05, hold_s=2.0, **extra)
    gateway = Gateway(tmp_path / "gateway", settings)
    gateway.start()
    try:
        agents = [
            started(gateway, tmp_path / str(device), device, source) for device in DEVICES
        ]
        gateway.announce(RUN)

        def a_round() -> RoundResult:
            members = []
            while len(members) < len(agents):
                members = gateway.roster(RUN)
                threading.Event().wait(0.05)
            own = [agent.connection.identity.device for agent in agents]
            numbers = dict(zip(own, DEVICES, strict=True))
            result = None
            for number, encoding in ((1, "fp32"), (2, "int8")):
                result = gateway.train(RoundOrder(
                    RUN, number, spec, start if number == 1 else moved(start),
                    np.array([m.device for m in members]), [numbers[m.device] for m in members],
                    np.array([m.level for m in members], dtype=np.uint8),
                    deadline_s=20, upload_encoding=encoding, download_encoding=encoding,
                ))
                results.append(result)
            assert result is not None
            return result

        results: list[RoundResult] = []
        running(agents, a_round)
    finally:
        gateway.stop(0.5)
    assert [result.accepted for result in results] == [3, 3]
    devices = np.array(DEVICES)
    first = fleet("bilstm", None, 0.3).train(start, devices, 1).sums
    second = fleet("bilstm", None, 0.3).train(moved(start), devices, 2).sums
    for name in first:
        torch.testing.assert_close(results[0].sums[name].float(), first[name], rtol=2e-4, atol=2e-5)
        gap = (results[1].sums[name].float() - second[name]).norm()
        assert float(gap) <= 0.1 * float(second[name].norm()) + 1e-3
    assert results[1].bytes_up < 0.4 * results[0].bytes_up
    assert all(agent.counts == {"accepted": 2} for agent in agents)


def moved(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The global model a round later."""
    draw = torch.Generator().manual_seed(1)
    return {n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in start.items()}


def test_noised_rounds_work_and_policies_are_kept(tmp_path: Path) -> None:
    _, task, model = parts("bilstm")
    training = fleet("bilstm", NOISED, None).training
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], training, run=RUN).to_bytes()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gateway = Gateway(
        tmp_path / "gateway", GatewaySettings(port=0, come_back_s=0.05, hold_s=2.0)
    )
    gateway.start()
    try:
        source = NoiseSource.from_seed(9)
        agents = [started(gateway, tmp_path / str(d), d, source) for d in DEVICES]
        agents[0].tasks.preparation.policy = Policy(min_noise_multiplier=5.0)
        gateway.announce(RUN)

        def a_round() -> RoundResult:
            members = []
            while len(members) < len(agents):
                members = gateway.roster(RUN)
                threading.Event().wait(0.05)
            return gateway.train(RoundOrder(
                RUN, 1, spec, start, np.array([m.device for m in members]),
                list(range(len(members))), np.array([m.level for m in members], dtype=np.uint8),
                deadline_s=20, upload_encoding="fp16",
            ))

        (result,) = running(agents, a_round)
    finally:
        gateway.stop(0.5)
    assert result.accepted == 2 and result.declined == 1
    assert [len(agent.journal.costs()) for agent in agents] == [0, 1, 1]
