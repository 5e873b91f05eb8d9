"""Who is in a live run, where they are, and what a live run cannot have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sottovoce.client.app import app as real_app
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.messages import read_roster_query, roster_content
from sottovoce.server import cli
from sottovoce.server.gateway import live_fleet
from sottovoce.server.gateway.live_fleet import LiveFleet, norm_bounds, serve_here
from sottovoce.server.gateway.orders import Member, RoundOrder, RoundResult
from sottovoce.server.gateway.roster import Roster, RosterPlacement, close_roster, gather
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.simulations.experiment import build_experiment
from sottovoce.simulations.grid import LocalGrid
from sottovoce.strategies.levels import MAX_LEVEL

ROWS = [
    {"tokens": ["play", "jazz"], "intent": "music", "slots": ["O", "B-genre"]},
    {"tokens": ["wake", "me", "up"], "intent": "alarm", "slots": ["O", "O", "O"]},
]


def answer(name: str, members: list[int], levels: list[int]) -> tuple[str, Any, Any]:
    return name, np.array(members, dtype=np.int64), np.array(levels, dtype=np.uint8)


def gateways(*answers: tuple[str, Any, Any] | None) -> LocalGrid:
    """A grid whose nodes are gateways that answer so; None fails."""
    app = ClientApp()

    @app.query()
    def roster(message: Message, context: Context) -> Message:
        found = answers[int(context.node_config["place"])]
        assert read_roster_query(message.content) == "a run"
        if found is None:
            raise RuntimeError("gone")
        return Message(roster_content(*found), reply_to=message)

    return LocalGrid(app, {}, [{"place": place} for place in range(len(answers))])


@pytest.fixture
def public(tmp_path: Path) -> Path:
    path = tmp_path / "public.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return path


def settings(public: Path, *more: str) -> Any:
    return compose([
        "population=live", f"population.path={public}", "population.run=test",
        "population.devices=3", "model.embedding_size=4", "model.hidden_size=4",
        "cohort_size=2", "strategy=fedavg", *more,
    ])


# -- the roster ------------------------------------------------------------------------------------


def test_a_roster_does_not_depend_on_the_order_of_gateways() -> None:
    east, west = answer("east", [7, 9], [3, 0]), answer("west", [5], [2])
    one, other = gather([east, west]), gather([west, east])
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert np.array_equal(a, b)
    assert one.members.tolist() == [7, 9, 5] and one.levels.tolist() == [3, 0, 2]


def test_a_saved_roster_comes_back_whole(tmp_path: Path) -> None:
    roster = gather([answer("east", [2**62 + 1, 9], [MAX_LEVEL, 0])])
    roster.save(tmp_path / "roster.json")
    found = Roster.load(tmp_path / "roster.json")
    assert found.members.tolist() == [2**62 + 1, 9]
    assert found.levels.tolist() == [MAX_LEVEL, 0] and found.gateways == ("east",)


@pytest.mark.parametrize("text", ["", "{}", '{"gateways": [], "gateway": [], "members": [], '
                                  '"levels": []}', '{"gateways": ["a"], "gateway": [0], '
                                  '"members": [1, 2], "levels": [0]}'])
def test_a_damaged_roster_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(text)
    with pytest.raises(RunError, match="roster"):
        Roster.load(path)


def test_two_gateways_of_one_name_are_refused() -> None:
    with pytest.raises(RunError, match="east"):
        gather([answer("east", [1], [0]), answer("east", [2], [0])])


def test_a_level_beyond_the_last_is_refused() -> None:
    with pytest.raises(RunError, match="level"):
        gather([answer("east", [1], [MAX_LEVEL + 1])])


def test_a_run_begins_only_with_enough_devices() -> None:
    grid = gateways(answer("east", [1], [0]), answer("west", [2, 3], [1, 1]))
    assert len(close_roster(grid, "a run", devices=3, wait_s=0, gateways=2)) == 3
    with pytest.raises(RunError, match="min_devices=4"):
        close_roster(grid, "a run", devices=4, wait_s=0)


# -- placement -------------------------------------------------------------------------------------


class Nodes:
    """A grid that shows some of its nodes only."""

    def __init__(self, grid: LocalGrid, hidden: set[int]) -> None:
        self._grid, self.hidden = grid, hidden

    def get_node_ids(self) -> list[int]:
        return [node for node in self._grid.get_node_ids() if node not in self.hidden]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self._grid.send_and_receive(messages)


def test_every_device_is_asked_at_its_own_gateway_and_nowhere_else() -> None:
    answers = [answer("west", [5], [2]), answer("east", [7, 9], [3, 0])]
    placement = RosterPlacement(gather(answers), "a run")
    grid = gateways(*answers)
    shares = placement.shares(np.array([0, 1, 2]), grid)
    west, east = list(grid.get_node_ids())
    assert {s.node: s.members.tolist() for s in shares if s.members is not None} == {
        east: [7, 9], west: [5],
    }
    assert sorted(np.concatenate([share.rows for share in shares]).tolist()) == [0, 1, 2]


def test_devices_of_a_gateway_that_is_gone_are_asked_in_vain_until_it_is_back() -> None:
    answers = [answer("east", [7, 9], [3, 0]), answer("west", [5], [2])]
    placement = RosterPlacement(gather(answers), "a run")
    grid: Any = Nodes(gateways(*answers), set())
    east, west = grid.get_node_ids()
    grid.hidden = {west}
    assert [share.node for share in placement.shares(np.array([0, 2]), grid)] == [east, None]
    grid.hidden = set()
    assert [share.node for share in placement.shares(np.array([0, 2]), grid)] == [east, west]


# -- the fleet of a gateway ------------------------------------------------------------------------


class Scripted:
    """A gateway that keeps the order and answers with `result`."""

    def __init__(self, accepted: dict[int, int], value: float = 1.0) -> None:
        self.accepted, self.value = accepted, value
        self.orders: list[RoundOrder] = []

    def announce(self, run: str) -> None: ...

    def note_privacy(self, unit: str, spent: float, budget: float | None) -> None: ...

    def roster(self, run: str) -> list[Member]:
        return [Member(9, 1), Member(4, 0)]

    def train(self, order: RoundOrder) -> RoundResult:
        self.orders.append(order)
        sums = {
            name: torch.full(tensor.shape, self.value, dtype=torch.float64)
            for name, tensor in order.parameters.items()
        }
        left = len(order.devices) - sum(self.accepted.values())
        return RoundResult(sums, self.accepted, silent=left)


def ask(config: Any, gateway: Scripted) -> Any:
    from sottovoce.server.setup import settings_text

    experiment = build_experiment(settings_text(config))
    fleet = LiveFleet(experiment, gateway)
    parameters = {
        name: p.detach() for name, p in experiment.initial_model().named_parameters()
    }
    fleet.call(np.array([0, 2]), np.array([4, 9]))
    return fleet.train(parameters, np.array([0, 2]), 1, np.array([0, 1], dtype=np.uint8))


def test_a_fleet_asks_for_the_devices_by_their_numbers_at_the_gateway(public: Path) -> None:
    gateway = Scripted({0: 1, 1: 1})
    reply = ask(settings(public, "privacy=none"), gateway)
    (order,) = gateway.orders
    assert order.devices.tolist() == [4, 9] and order.numbers == [0, 2]
    assert order.levels.tolist() == [0, 1] and order.round == 1 and order.run == "test"
    assert reply.devices_by_level == {0: 1, 1: 1} and reply.dropped == 0
    order.check()


def test_a_sum_of_too_few_devices_never_leaves_the_gateway(public: Path) -> None:
    config = settings(public, "privacy=none", "population.min_cohort=2")
    reply = ask(config, Scripted({0: 1}))
    assert all(not tensor.any() for tensor in reply.sums.values())
    assert reply.devices_by_level == {} and reply.dropped == 2


def test_the_norm_of_updates_is_bounded_by_what_an_honest_device_can_send(public: Path) -> None:
    clipped = settings(public, "privacy=device", "privacy.device.clip_norm=0.5")
    gateway = Scripted({0: 1, 1: 1})
    ask(clipped, gateway)
    (order,) = gateway.orders
    assert all(0.5 <= bound <= 0.5 * 1.01 for bound in order.norm_bounds.values())
    ask(settings(public, "privacy=none"), gateway)
    assert gateway.orders[-1].norm_bounds == {}


@pytest.mark.parametrize("level", [0, 3, 8])
def test_noise_of_its_own_does_not_make_an_honest_device_refused(public: Path, level: int) -> None:
    from sottovoce.server.setup import settings_text

    both = settings(public, "privacy=both", "privacy.example.noise_multiplier=1")
    training = build_experiment(settings_text(both)).training
    size = 5000
    bound = norm_bounds(training, size)[level]
    deviation = training.noise_variance(level) ** 0.5
    noise = np.random.default_rng(0).normal(0, deviation, (200, size))
    assert training.update_clip_norm is not None
    worst = training.update_clip_norm + np.linalg.norm(noise, axis=1)
    assert (worst < bound).all() and bound < 1.3 * worst.min()


def test_a_node_finds_the_gateway_of_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_fleet, "_here", {})
    serve_here(tmp_path, "here", Scripted({}))
    grid = LocalGrid(real_app, {}, [{"gateway": str(tmp_path)}])
    roster = close_roster(grid, "a run", devices=2, wait_s=0)
    assert roster.gateways == ("here",)
    assert roster.members.tolist() == [4, 9] and roster.levels.tolist() == [0, 1]


def test_a_node_without_a_gateway_says_how_to_give_it_one(public: Path) -> None:
    grid = LocalGrid(real_app, {}, [{}])
    with pytest.raises(ConfigError, match="--node-config"):
        close_roster(grid, "a run", devices=1, wait_s=0)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    "timeline=continual", "conditions=phones", "audit.canaries=natural", "audit.codes=1",
    "audit.device_canaries=4", "strategy.level_epsilon=2", "noise_cohort_size=50",
    "privacy.example.engine=opacus",
])
def test_what_real_devices_cannot_do_is_refused_by_name(public: Path, setting: str) -> None:
    with pytest.raises(ConfigError):
        validate(settings(public, "privacy=device", setting))


def test_rounded_uploads_do_not_go_with_noise_of_both_kinds(public: Path) -> None:
    rounded = "population.upload_encoding=int8"
    for privacy in ("none", "device", "example"):
        validate(settings(public, f"privacy={privacy}", rounded))
    with pytest.raises(ConfigError, match="upload_encoding"):
        validate(settings(public, "privacy=both", rounded))


def test_simulate_sends_a_live_run_to_serve(
    public: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["simulate", "population=live", f"population.path={public}"])
    assert code == 1 and "sottovoce serve" in capsys.readouterr().err


def test_a_live_population_has_no_text_of_its_devices(public: Path) -> None:
    config = settings(public, "privacy=none", "task.vocabulary.source=training_text")
    from sottovoce.client.errors import DataError
    from sottovoce.server.setup import settings_text

    with pytest.raises(DataError, match="vocabulary"):
        build_experiment(settings_text(config))


def test_a_live_population_is_evaluated_on_every_public_example(public: Path) -> None:
    from sottovoce.server.setup import settings_text

    population = build_experiment(settings_text(settings(public, "privacy=none"))).population
    found = population.held_out_examples()
    assert found is not None and len(found) == len(ROWS) and len(population) == 3
    assert set(population.schema.intents) == {"music", "alarm"}


