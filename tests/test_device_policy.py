"""A device's policy and eligibility: what it refuses, whatever the server asks for."""

from __future__ import annotations

import calendar
import copy
import itertools
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sottovoce.client.agent import device_cli, eligibility
from sottovoce.client.agent.eligibility import Conditions, Probes, machine
from sottovoce.client.agent.journal import Journal, StepCost
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.spending import epsilon_spent
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.errors import ConfigError
from sottovoce.client.protocol import REASONS

COST = StepCost(1.0, 0.25, 8)
NOISELESS = StepCost(None, 0.25, 8)

SPEC: dict[str, Any] = {
    "task": {"name": "intent_slots"},
    "training": {
        "plan": {"batch_size": 8, "local_epochs": 1, "max_examples": 64, "poisson": True},
        "example": {"clip_norm": 1.0, "noise_multiplier": 1.0},
        "update_clip_norm": 0.5,
    },
    "privacy": {
        "example": {"noise_multiplier": 1.0},
        "device": {"noise_multiplier": 0.8, "clip_norm": 0.5},
    },
    "parameters": [("weight", (1000, 500)), ("bias", (500,))],
}


def spec(**changes: Any) -> Any:
    """A task's specification; `training__plan__poisson=False` changes one value deep inside."""
    values = copy.deepcopy(SPEC)
    for path, value in changes.items():
        *outer, name = path.split("__")
        place = values
        for step in outer:
            place = place[step]
        place[name] = value
    return SimpleNamespace(**values)


def reason(policy: Policy, of: Any = None, cost: StepCost = COST, before: Any = ()) -> str | None:
    found = policy.complaint(spec() if of is None else of, cost, list(before))
    if found is None:
        return None
    assert found[0] in REASONS and "\n" not in found[1]
    return found[0]


# -- what is refused -------------------------------------------------------------------------------


def test_by_default_a_device_takes_any_task_of_bearable_size() -> None:
    assert reason(Policy()) is None
    assert reason(Policy(), cost=NOISELESS) is None
    assert reason(Policy(), spec(privacy__device=None, training__update_clip_norm=None)) is None
    assert reason(Policy(), spec(parameters=[("w", (20_000, 20_000))])) == "memory"
    assert reason(Policy(), cost=StepCost(1.0, 0.25, 100_001)) == "policy"


@pytest.mark.parametrize(
    ("policy", "fits", "does_not"),
    [
        (Policy(require_example_privacy=True), COST, NOISELESS),
        (Policy(min_noise_multiplier=0.9), COST, NOISELESS),
        (Policy(min_noise_multiplier=0.9), StepCost(0.9, 1.0, 1), StepCost(0.89, 1.0, 1)),
        (Policy(max_epsilon=1e9), COST, NOISELESS),
        (Policy(max_steps=8), COST, StepCost(1.0, 0.25, 9)),
    ],
)
def test_a_participation_that_protects_examples_less_is_refused(
    policy: Policy, fits: StepCost, does_not: StepCost
) -> None:
    assert reason(policy, cost=fits) is None
    assert reason(policy, cost=does_not) == "policy"


def test_noise_without_coins_for_batches_is_no_privacy() -> None:
    walked = spec(training__plan__poisson=False)
    assert reason(Policy(), walked) == "policy"
    assert reason(Policy(), walked, cost=NOISELESS) is None
    assert reason(Policy(), walked, cost=StepCost(1.0, 1.0, 8)) is None


@pytest.mark.parametrize(
    "claim",
    [
        None, {}, {"noise_multiplier": 0.0, "clip_norm": 1.0}, {"noise_multiplier": 1.0},
        {"noise_multiplier": math.nan, "clip_norm": 1.0},
        {"noise_multiplier": 1.0, "clip_norm": math.inf},
        {"noise_multiplier": 1.0, "clip_norm": None},
    ],
)
def test_device_level_privacy_is_asked_for_as_a_whole(claim: Any) -> None:
    policy = Policy(require_device_privacy=True)
    assert reason(policy) is None
    assert reason(policy, spec(privacy__device=claim)) == "policy"


def test_updates_are_clipped_at_least_as_the_policy_says() -> None:
    policy = Policy(max_clip_norm=0.5)
    assert reason(policy) is None
    for bound in (0.6, None, math.nan, math.inf, 0.0):
        expected = "policy"
        assert reason(policy, spec(training__update_clip_norm=bound)) == expected
    assert policy.complaint(spec(), COST, [], clip_norm=0.6) is not None
    assert policy.complaint(spec(training__update_clip_norm=9.0), COST, [], clip_norm=0.4) is None


def test_only_tasks_on_the_list_are_done() -> None:
    assert reason(Policy(tasks=("intent_slots",))) is None
    assert reason(Policy(tasks=("next_word",))) == "policy"
    assert reason(Policy(tasks=())) == "policy"


# -- the budget ------------------------------------------------------------------------------------


def test_the_participation_that_would_exceed_the_budget_is_the_first_refused(
    tmp_path: Path,
) -> None:
    journal, policy = Journal(tmp_path), Policy(max_epsilon=12.0, delta=1e-5)
    taken = 0
    while policy.complaint(spec(), COST, journal.costs()) is None:
        journal.begin(str(taken), "run", taken, COST)
        taken += 1
    assert taken > 1
    assert reason(policy, before=journal.costs()) == "budget"
    assert epsilon_spent([(COST, taken)], 1e-5) <= 12.0 < epsilon_spent([(COST, taken + 1)], 1e-5)
    lighter = StepCost(30.0, 0.01, 1)
    assert reason(policy, cost=lighter, before=journal.costs()) is None


def test_a_policy_loosened_later_applies_from_then_on_and_the_past_counts(tmp_path: Path) -> None:
    Journal(tmp_path).begin("a", "run", 1, NOISELESS)
    before = Journal(tmp_path).costs()
    assert reason(Policy(), before=before) is None
    assert reason(Policy(max_epsilon=1e9), before=before) == "budget"
    once = [(COST, 1)]
    tight, loose = (Policy(max_epsilon=epsilon_spent(once, 1e-5) * f) for f in (1.01, 3.0))
    assert reason(tight, before=once) == "budget"
    assert reason(loose, before=once) is None


def test_the_number_of_participations_is_bounded() -> None:
    policy = Policy(max_participations=3)
    assert reason(policy, before=[(COST, 2)]) is None
    assert reason(policy, before=[(COST, 2), (NOISELESS, 1)]) == "budget"
    assert reason(Policy(max_participations=0)) == "budget"


# -- policy.toml -----------------------------------------------------------------------------------


def test_a_policy_is_read_from_its_file(tmp_path: Path) -> None:
    assert Policy.load(tmp_path) == Policy()
    (tmp_path / "policy.toml").write_text(
        "require_example_privacy = true\nmax_epsilon = 8\ntasks = ['next_word']\n"
        "retention_days = 30\n[eligibility]\ncharging = true\nhours = ['22:00-06:00']\n"
    )
    assert Policy.load(tmp_path) == Policy(
        require_example_privacy=True, max_epsilon=8.0, tasks=("next_word",), retention_days=30.0,
        eligibility=Conditions(charging=True, hours=("22:00-06:00",)),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_epsilom = 8", "max_epsilom is no setting, did you mean max_epsilon"),
        ("zzz = 8", "zzz is no setting: choose"),
        ("max_epsilon = '8'", "max_epsilon='8' must be a number"),
        ("max_epsilon = true", "max_epsilon=True must be a number"),
        ("max_epsilon = nan", "max_epsilon=nan must be a number"),
        ("max_epsilon = inf", "max_epsilon=inf must be a number"),
        ("max_epsilon = -1", "max_epsilon=-1.0 must be at least 0"),
        ("max_steps = 1.5", "max_steps=1.5 must be a whole number"),
        ("require_example_privacy = 1", "require_example_privacy=1 must be true or false"),
        ("delta = 1", "delta=1.0 must be above 0 and below 1"),
        ("tasks = 'next_word'", "must be a list of strings"),
        ("retention_days = 0", "retention_days=0.0 must be above 0"),
        ("eligibility = 3", "eligibility is a table"),
        ("[eligibility]\nchargin = true", "eligibility.chargin is no setting, did you mean"),
        ("[eligibility]\nhours = ['25:00-06:00']", "eligibility.hours has '25:00-06:00'"),
        ("[eligibility]\nhours = ['22:00-24:30']", "eligibility.hours has '22:00-24:30'"),
        ("[eligibility]\nunmetered = true", "needs unmetered_command"),
        ("[eligibility]\nmax_load = 0", "max_load=0.0 must be above 0"),
        ("max_epsilon", "is not TOML"),
    ],
)
def test_a_wrong_policy_is_one_line_with_its_file_and_the_remedy(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Policy.load(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'policy.toml'}") and complaint in line
    assert "\n" not in line


def test_the_policy_that_the_command_prints_is_the_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DeviceStore(tmp_path)
    written = "max_epsilon = 8.0\ntasks = [\"a\"]\n[eligibility]\nhours = [\"01:00-02:00\"]\n"
    for text in ("", "tasks = []", written):
        (tmp_path / "policy.toml").write_text(text)
        before = Policy.load(tmp_path)
        assert device_cli.main(["policy", "--store", str(tmp_path)]) == 0
        (tmp_path / "policy.toml").write_text(capsys.readouterr().out)
        assert Policy.load(tmp_path) == before


# -- eligibility -----------------------------------------------------------------------------------


def probes(charging: bool | None, load: float | None, unmetered: bool | None) -> Probes:
    return Probes(lambda: charging, lambda: load, lambda _: unmetered)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    eligibility._say_once.cache_clear()
    yield


def test_a_device_is_eligible_exactly_when_every_condition_is_known_to_hold() -> None:
    answers = list(itertools.product((True, False, None), (0.1, 0.9, None), (True, False, None)))
    for wants in itertools.product((True, False), repeat=3):
        conditions = Conditions(
            charging=wants[0], idle=wants[1], unmetered=wants[2], unmetered_command=("true",)
        )
        for charging, load, unmetered in answers:
            holds = (charging is True, load == 0.1, unmetered is True)
            expected = all(held or not wanted for held, wanted in zip(holds, wants, strict=True))
            found = conditions.eligible(0.0, probes(charging, load, unmetered))
            assert (found is None) == expected


def test_what_cannot_be_found_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    conditions = Conditions(charging=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert conditions.eligible(0.0, probes(None, None, None)) == "not charging"
    assert [record.getMessage() for record in caplog.records] == [
        "charging cannot be found out on this machine: the condition counts as not met"
    ]


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        (("22:00-06:00",), ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        (("09:30-17:00",), ("09:30", "16:59"), ("09:29", "17:00", "00:00")),
        (("01:00-02:00", "20:00-24:00"), ("01:30", "20:00", "23:59"), ("02:00", "00:00")),
        (("00:00-00:00",), ("00:00", "12:00"), ()),
    ],
)
def test_hours_are_local_and_may_pass_midnight(
    hours: tuple[str, ...], inside: tuple[str, ...], outside: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        for clock in (*inside, *outside):
            at = calendar.timegm(time.strptime(f"2026-05-04 {clock}", "%Y-%m-%d %H:%M")) - 19_800
            found = Conditions(hours=hours).eligible(at, probes(None, None, None))
            assert (found is None) == (clock in inside), clock
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("supplies", "charging"),
    [
        ({}, None),
        ({"AC": {"type": "Mains", "online": "1"}}, True),
        ({"AC": {"type": "Mains", "online": "0"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Charging"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, None),
        ({"BAT0": {"type": "Battery"}}, None),
        (
            {
                "AC": {"type": "Mains", "online": "0"}, "USB": {"type": "USB", "online": "1"},
                "BAT0": {"type": "Battery", "status": "Discharging"},
            },
            True,
        ),
    ],
)
def test_charging_is_read_from_the_kernel(
    tmp_path: Path, supplies: dict[str, dict[str, str]], charging: bool | None
) -> None:
    for name, files in supplies.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text + "\n")
    assert machine(tmp_path).charging() is charging


def test_the_machine_tells_its_load_and_a_command_tells_of_the_connection() -> None:
    here = machine()
    load = here.load()
    assert load is not None and load >= 0
    assert here.unmetered(("true",)) is True
    assert here.unmetered(("false",)) is False
    assert here.unmetered(("/does/not/exist",)) is None
