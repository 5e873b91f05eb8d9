"""What an operator's commands do around a live run: before it, beside it, and after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_devices import Device, ready, serving

from sottovoce.client.errors import DataError
from sottovoce.server import cli, serve
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway.settings import GatewaySettings
from sottovoce.server.live_limits import draws_anew
from sottovoce.server.live_run import with_roster
from sottovoce.server.settings import compose

ROWS = [
    {"tokens": ["play", "jazz"], "intent": "music", "slots": ["O", "B-genre"]},
    {"tokens": ["wake", "me", "up"], "intent": "alarm", "slots": ["O", "O", "O"]},
]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


class Nobody:
    """A grid that must not be asked."""

    def get_node_ids(self) -> list[int]:
        raise AssertionError("devices were waited for")


@pytest.mark.parametrize("seed", [None, 7])
def test_devices_draw_anew_whatever_the_seed_so_a_resumed_run_does_not_repeat_its_noise(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    live = compose(["population=live", f"population.path={public}"])
    live.seed = seed
    assert draws_anew(live)
    simulated = compose([])
    simulated.seed = seed
    assert draws_anew(simulated) == (seed is None)

    folder, asked = tmp_path / "run", dict[str, Any]()

    def app(grid: Any, context: Any) -> None:
        asked.update(context.run_config)
        serve.outcomes[str(folder)] = SimpleNamespace(  # type: ignore[assignment]
            status="interrupted", reason=None, run="", summary={"rounds": 1}
        )

    monkeypatch.setattr(serve, "server_app", app)
    monkeypatch.setattr(serve, "final_table", lambda *_: "")
    served = compose(["population=live", f"population.path={public}"])
    served.seed, served.resume = seed, str(folder)
    settings = {"folder": str(tmp_path / "g")}
    monkeypatch.setattr(serve, "gateway_settings", lambda _: GatewaySettings(port=0))
    config = cli._with(served, gateway=settings)
    assert serve.serve(config, folder) == serve.INTERRUPTED
    assert asked["resume"] is True and asked["afresh"] is True


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        (["population.path=nowhere.jsonl"], DataError, "nowhere.jsonl"),
        (["task.vocabulary.source=training_text"], DataError, "task.vocabulary.source"),
        (["task.vocabulary.source=file", "task.vocabulary.path=nowhere.txt"], DataError, "nowhere"),
    ],
)
def test_what_is_wrong_with_a_run_is_said_before_devices_are_waited_for(
    public: Path, tmp_path: Path, settings: list[str], error: type[Exception], line: str
) -> None:
    config = compose(["population=live", f"population.path={public}", *settings])
    with pytest.raises(error, match=line):
        with_roster(Nobody(), tmp_path, config)  # type: ignore[arg-type]
    assert not (tmp_path / "roster.json").exists()
    with pytest.raises(AssertionError, match="waited for"):
        with_roster(Nobody(), tmp_path, compose([  # type: ignore[arg-type]
            "population=live", f"population.path={public}",
        ]))  # fmt: skip


def test_a_device_that_was_revoked_in_the_registry_alone_is_shut_out_all_the_same(
    tmp_path: Path,
) -> None:
    """By an operator who is not the gateway's user, for whom its socket does not answer."""
    with serving(tmp_path) as gateway:
        device, other = ready(gateway, 2)
        registry = Registry(tmp_path / "registry.sqlite")
        assert registry.revoke(device.number)
        registry.close()
        running = gateway._open
        gateway._wait(running.shut_out_revoked())
        assert running.service.sessions.devices() == {other.number}
        other.check_in()


def test_an_operator_sees_every_device_by_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as gateway:
        one, gone = Device(gateway, name="kitchen"), Device(gateway, name="attic\x1b[2J")
        gateway.revoke(gone.number)
        asked = [f"gateway={tmp_path}", "devices=true"]
        assert cli.main(["status", *asked]) == 0
        lines = capsys.readouterr().out.splitlines()
        (line,) = (line for line in lines if line.startswith(str(one.number)))
        assert line.endswith("kitchen") and "revoked" not in line
        (line,) = (line for line in lines if line.startswith(str(gone.number)))
        assert "revoked" in line and "\x1b" not in line
        assert cli.main(["status", *asked, "format=json"]) == 0
        listed = json.loads(capsys.readouterr().out)["devices"]
        assert {row["device"] for row in listed} == {one.number, gone.number}
        assert all("key" not in row for row in listed)


@pytest.mark.parametrize(
    "words",
    [
        ["revoke", "device=99999999999999999999"], ["revoke", "device=-1"], ["revoke"],
        ["tokens", "number=1000000000"], ["tokens", "number=0"], ["tokens", "hours=1e300"],
    ],
)  # fmt: skip
def test_impossible_numbers_are_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Error" not in line
    assert not list(tmp_path.iterdir())
