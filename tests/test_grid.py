"""One app on every grid: nodes share the work, sums add up, a bad node costs only its devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor

from sottovoce.client.app import app as client_app
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.app import app as server_app
from sottovoce.server.app import outcomes, wait_for_fleets
from sottovoce.server.callbacks import RequestLog
from sottovoce.server.run_record import read_metrics
from sottovoce.simulations.flower_private import SERVER_NODE, enter_run, stamp
from sottovoce.simulations.grid import LocalGrid

TINY = (
    "population.devices=200 population.held_out_devices=20 cohort_size=20 rounds=2 seed=7 "
    "strategy=fedavg task.max_length=12 model.embedding_size=6 model.hidden_size=5 "
    "run.evaluation_devices=20 run.report=false run.progress=false"
)
TABLE = "embedding.weight"


@dataclass
class Run:
    """What a run left behind."""

    model: dict[str, Tensor]
    records: list[dict[str, Any]]


def start(overrides: str, nodes: int = 1, client: ClientApp = client_app) -> None:
    """The ServerApp over `nodes` nodes, by the path that `flwr run .` takes."""
    grid = LocalGrid(client, {}, [{} for _ in range(nodes)])
    given: UserConfig = {"overrides": overrides, "fleets": nodes}
    server_app(grid, Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), given))


def left_in(folder: Path) -> Run:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(load_file(folder / "model.safetensors"), [json.loads(line) for line in lines])


def trained(folder: Path, nodes: int, more: str, client: ClientApp = client_app) -> Run:
    """A tiny seeded run over `nodes` nodes."""
    start(f"{TINY} {more} run.dir={folder}", nodes, client)
    return left_in(folder)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).abs().max()) for name in a}


@pytest.mark.parametrize("privacy", ["none", "device"])
@pytest.mark.parametrize("nodes", [2, 3])
def test_nodes_together_train_the_model_that_one_trains(
    tmp_path: Path, privacy: str, nodes: int
) -> None:
    one = trained(tmp_path / "one", 1, f"privacy={privacy}")
    more = trained(tmp_path / "more", nodes, f"privacy={privacy}")
    assert max(difference(one.model, more.model).values()) < 1e-6
    for a, b in zip(one.records, more.records, strict=True):
        for key in ("devices", "dropped", "examples", "devices_by_level", "epsilon_device"):
            assert a.get(key) == b.get(key)


def test_with_noise_on_devices_nodes_differ_only_in_what_is_drawn_for_their_sums(
    tmp_path: Path,
) -> None:
    """Noise that no device's training sees: the same in distribution only, and in proportion."""
    apart = []
    for multiplier in (1.0, 0.001):
        words = f"privacy=both rounds=1 privacy.example.noise_multiplier={multiplier}"
        one, two = (trained(tmp_path / f"{multiplier}-{n}", n, words) for n in (1, 2))
        apart.append(difference(one.model, two.model))
    for name, much in apart[0].items():
        assert much > 1e-5 and apart[1][name] < 0.01 * much + 1e-6, name


def test_a_folder_handed_over_gives_the_run_that_overrides_give(tmp_path: Path) -> None:
    by_overrides = trained(tmp_path / "a", 1, "privacy=device")
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((tmp_path / "a" / "config.yaml").read_bytes())
    grid = LocalGrid(client_app, {}, [{}])
    context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), {"folder": str(folder)})
    server_app(grid, context)
    assert outcomes.pop(str(folder)).status == "finished"
    by_folder = load_file(folder / "model.safetensors")
    assert set(difference(by_overrides.model, by_folder).values()) == {0.0}


# -- fleets that fail ------------------------------------------------------------------------------


def changed(reply: Message, change: Callable[[dict[str, Array]], None]) -> RecordDict:
    sums = dict(reply.content.array_records["sums"].items())
    change(sums)
    return RecordDict(
        {"sums": ArrayRecord(sums), "metrics": reply.content.metric_records["metrics"]}
    )


def not_finite(sums: dict[str, Array]) -> None:
    sums[TABLE] = Array(sums[TABLE].numpy() * float("nan"))


def short_of_a_key(sums: dict[str, Array]) -> None:
    del sums[TABLE]


def cut(sums: dict[str, Array]) -> None:
    sums[TABLE] = Array(sums[TABLE].numpy()[1:])


def doubled(sums: dict[str, Array]) -> None:
    sums[TABLE] = Array(sums[TABLE].numpy().astype("float64"))


DAMAGE: dict[str, Callable[[Message], RecordDict | Error]] = {
    "an error": lambda reply: Error(0, "out of memory"),
    "nothing": lambda reply: RecordDict(),
    "not a number": lambda reply: changed(reply, not_finite),
    "a key less": lambda reply: changed(reply, short_of_a_key),
    "another shape": lambda reply: changed(reply, cut),
    "another type": lambda reply: changed(reply, doubled),
}


def client_that_breaks_once(damage: Callable[[Message], RecordDict | Error]) -> ClientApp:
    """The client app, but in round 1 the second node's reply is damaged."""
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if context.node_id % 2 == 0 or message.metadata.group_id != "1":
            return reply
        return Message(damage(reply), reply_to=message)

    return client


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_fleet_that_fails_loses_its_devices_but_not_the_round(tmp_path: Path, kind: str) -> None:
    whole = trained(tmp_path / "whole", 2, "privacy=device")
    client = client_that_breaks_once(DAMAGE[kind])
    broken = trained(tmp_path / "broken", 2, "privacy=device", client)
    (_, whole_first, whole_second), (_, first, second) = whole.records, broken.records
    assert 0 < first["devices"] < whole_first["devices"]
    assert first["devices"] + first["dropped"] == whole_first["devices"]
    assert (second["devices"], second["dropped"]) == (whole_second["devices"], 0)
    assert first["epsilon_device"] == whole_first["epsilon_device"]
    assert all(bool(tensor.isfinite().all()) for tensor in broken.model.values())


def test_an_exception_in_process_reaches_the_caller(tmp_path: Path) -> None:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        trained(tmp_path / "run", 1, "privacy=none", client)


# -- the grid itself -------------------------------------------------------------------------------


def echo() -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        name = torch.tensor([int(context.node_config["place"])])
        content = RecordDict({"seen": ArrayRecord({"place": Array(name.numpy())})})
        return Message(content, reply_to=message)

    return client


def test_a_message_reaches_its_node_and_the_reply_answers_it() -> None:
    grid = LocalGrid(echo(), {}, [{"place": 0}, {"place": 1}, {"place": 2}])
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 3 and SERVER_NODE not in nodes
    messages = [grid.create_message(RecordDict(), "train", node, "1") for node in nodes]
    ids = list(grid.push_messages(messages))
    replies = list(grid.pull_messages(ids))
    assert [r.metadata.reply_to_message_id for r in replies] == ids
    assert [r.metadata.src_node_id for r in replies] == nodes
    places = [r.content.array_records["seen"]["place"].numpy().item() for r in replies]
    assert places == [0, 1, 2]
    assert list(grid.pull_messages(ids)) == []


def test_the_coordinator_waits_for_its_fleets() -> None:
    grid = LocalGrid(echo(), {}, [{"place": 0}, {"place": 1}])
    wait_for_fleets(grid, 2, timeout_s=0)
    with pytest.raises(RunError, match="2 of fleets=3 nodes connected"):
        wait_for_fleets(grid, 3, timeout_s=0)


def test_what_is_private_in_flower_is_still_there() -> None:
    """The names of `flower_private`, and that Flower reads what they write."""
    run = enter_run(41)
    assert run.run_id == 41
    first, second = (Message(RecordDict(), 9, "train", group_id="1") for _ in range(2))
    assert (first.metadata.run_id, first.metadata.src_node_id) == (41, SERVER_NODE)
    assert stamp(first) == first.metadata.message_id != stamp(second)
    assert Message(RecordDict(), reply_to=first).metadata.reply_to_message_id == (
        first.metadata.message_id
    )


# -- runs that end early, or cannot begin ----------------------------------------------------------


def test_a_run_that_broke_off_goes_on_over_other_nodes(tmp_path: Path) -> None:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "2":
            raise OSError("disk full")
        return client_app(message, context)

    with pytest.raises(OSError, match="disk full"):
        trained(tmp_path / "broken", 1, "privacy=device", client)
    start(f"resume={tmp_path / 'broken'}", nodes=2)
    whole = trained(tmp_path / "whole", 1, "privacy=device")
    assert max(difference(left_in(tmp_path / "broken").model, whole.model).values()) < 1e-6


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path / "run", 1, "privacy=none rounds=1")
    with pytest.raises(RunError, match="nothing to resume"):
        start(f"resume={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ("cohort_size=500", "cohort_size=500 is more than"),
        ("privacy=example privacy.example.noise_multiplier=null privacy.example.epsilon=4",
         "set privacy.example.max_participations"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=error):
        start(f"{TINY} {overrides}")
    assert not (tmp_path / "runs").exists()


def test_an_unseeded_run_over_nodes_books_what_it_released_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second release with the same central noise but other batches would give the noise away."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:  # as a kill leaves it: secret and requests are there
        patch.setattr(NoiseSource, "forget", lambda folder: None)
        patch.setattr(RequestLog, "forget", lambda self: None)
        trained(folder, 1, "privacy=device strategy.max_rate=1 rounds=3 seed=null")
    first = Ledger.load(folder / "ledger.json").events
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "round-000003")
    start(f"resume={folder}")
    events = Ledger.load(folder / "ledger.json").events
    assert events[: len(first)] == first, "a release was forgotten"
    assert [event.round for event in events[len(first) :]] == [3]
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
