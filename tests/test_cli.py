"""The command line: what it prints, what it refuses, and where a run writes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError, DataError, RunError
from sottovoce.server import cli, placement
from sottovoce.server.config import register
from sottovoce.server.limits import validate

CONFIGS = Path(cli.__file__).parent.parent / "configs"
Output = tuple[int, str, str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.fixture
def sottovoce(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*words: str) -> Output:
        code = cli.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Recorder:
    """Stands in for `simulate`: keeps what it was called with, writes a config.yaml."""

    def __init__(self) -> None:
        self.calls: list[tuple[DictConfig, Path]] = []
        self.outcome: int | BaseException = 0
        self.records = False

    def __call__(self, cfg: DictConfig, folder: Path) -> int:
        self.calls.append((cfg, folder))
        assert folder.is_dir()
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        if self.records:
            (folder / "metrics.jsonl").touch()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    @property
    def folder(self) -> Path:
        return self.calls[-1][1]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    stand_in(monkeypatch, "sottovoce.server.simulate", simulate=recorder)
    return recorder


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Put a module with these functions in the place of `name`."""
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def composed(*overrides: str) -> DictConfig:
    register("simulate")
    with initialize_config_module("sottovoce.configs", version_base="1.3"):
        return compose("simulate", list(overrides))


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- help ------------------------------------------------------------------------------------------


def test_alone_it_says_what_a_person_can_do(sottovoce: Callable[..., Output]) -> None:
    code, out, err = sottovoce()
    assert (code, err) == (0, "")
    assert all(re.search(rf"\b{verb}\b", out) for verb in (*cli.VERBS, *cli.DEVICE_VERBS))
    assert sottovoce("--help") == (0, out, "")
    assert len(examples(out)) >= 3


def test_version_is_that_of_the_distribution(sottovoce: Callable[..., Output]) -> None:
    code, out, _ = sottovoce("--version")
    assert code == 0
    assert re.fullmatch(r"sottovoce \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself(verb: str, sottovoce: Callable[..., Output]) -> None:
    code, out, _ = sottovoce(verb, "--help")
    assert code == 0
    assert out.startswith(f"sottovoce {verb}: ")
    assert re.search(r"^ +[a-z_.]+=\S", out, re.MULTILINE), "settings are shown"
    assert max(map(len, out.splitlines())) <= 100


def test_help_of_simulate_names_every_choice_of_every_group(
    sottovoce: Callable[..., Output],
) -> None:
    _, out, _ = sottovoce("simulate", "--help")
    for group in ("population", "task", "model", "strategy", "privacy", "conditions", "timeline"):
        listed = re.search(rf"^  {group} +(.*?)(?:   |$)", out, re.MULTILINE)
        assert listed is not None
        on_disk = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        assert set(listed[1].split(" | ")) == on_disk - {"live"}  # which is for serve


def examples(text: str) -> list[list[str]]:
    """Command lines in `text` that a person could type as they stand."""
    lines = [line.strip() for line in text.splitlines()]
    commands = [line for line in lines if re.match(r"sottovoce \w+( [-\w]\S*)*$", line)]
    return [shlex.split(command)[1:] for command in commands]


def test_examples_of_the_help_compose(sottovoce: Callable[..., Output]) -> None:
    texts = [cli.help_text(name) for name in ("sottovoce", "simulate", "account")]
    found = [example for text in texts for example in examples(text)]
    assert len(found) >= 9
    for verb, *words in found:
        settings = [word for word in words if word != "-m"]
        settings = [re.sub(r",.*", "", word) for word in settings]
        if verb == "simulate":
            validate(composed(*settings))
        else:
            code, _, err = sottovoce(verb, *settings, "--cfg", "job")
            assert (code, err) == (0, ""), (verb, words, err)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_yaml_begins_with_a_command_that_uses_it(
    path: Path, sottovoce: Callable[..., Output]
) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# sottovoce ")
    verb, *words = shlex.split(first.replace("<date>/<time>", "x"))[2:]
    shows = "--help" in words or "--cfg" in words
    if verb == "simulate" and not shows:
        validate(composed(*words))
        return
    code, _, err = sottovoce(verb, *words, *([] if shows else ["--cfg", "job"]))
    assert (code, err) == (0, "")


# -- composing -------------------------------------------------------------------------------------


def test_defaults_are_the_demo() -> None:
    cfg = composed()
    assert validate(cfg) == []
    assert cfg.population.name == "assistant"
    assert cfg.population.devices == 1_000_000
    assert cfg.strategy.sampler == "activity"
    assert cfg.privacy.device.enabled and cfg.privacy.example.enabled
    assert cfg.privacy.device.epsilon == 4
    assert cfg.privacy.device.delta is None  # 1 / (10 devices) = 1e-7


@pytest.mark.parametrize(
    ("overrides", "task", "model"),
    [
        ((), "intent_slots", "bilstm"),
        (("task=next_word",), "next_word", "lstm"),
        (("task=next_word", "model=causal_transformer"), "next_word", "causal_transformer"),
        (("model=transformer",), "intent_slots", "transformer"),
        (("population=shakespeare",), "next_word", "lstm"),
        (("population=chitchat", "task=next_word"), "next_word", "lstm"),
        (("population=snips",), "intent_slots", "bilstm"),
        (("population=snips", "task=next_word"), "next_word", "lstm"),
    ],
)
def test_a_population_picks_its_task_and_a_task_its_model_unless_named(
    overrides: tuple[str, ...], task: str, model: str
) -> None:
    cfg = composed(*overrides)
    assert (cfg.task.name, cfg.model.name) == (task, model)


@pytest.mark.parametrize(
    ("choice", "device", "example"),
    [("none", False, False), ("device", True, False), ("example", False, True),
     ("both", True, True)],
)
def test_privacy_switches_each_layer(choice: str, device: bool, example: bool) -> None:
    privacy = composed(f"privacy={choice}").privacy
    assert (privacy.device.enabled, privacy.example.enabled) == (device, example)


def test_cfg_job_prints_all_settings_and_runs_nothing(
    sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    code, out, _ = sottovoce("simulate", "rounds=7", "--cfg", "job")
    assert code == 0
    assert OmegaConf.create(out).rounds == 7
    assert simulated.calls == []
    assert everything_in(here) == []


def test_data_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOTTOVOCE_DATA", raising=False)
    assert composed("population=hwu").population.path == "../shared/data/hwu.train.jsonl.gz"
    monkeypatch.setenv("SOTTOVOCE_DATA", "elsewhere")
    assert composed("population=hwu").population.test_path == "elsewhere/hwu.test.jsonl.gz"


# -- refusals --------------------------------------------------------------------------------------

REFUSED = {
    "simulat": ["simulat is no verb", "did you mean simulate"],
    "simulate rouns=5": ["rouns", "did you mean rounds"],
    "simulate epsilon=3": ["epsilon is no setting", "privacy.device.epsilon"],
    "simulate population.deviecs=5": ["population.deviecs", "population.devices"],
    "simulate popluation=snips": ["popluation", "did you mean population"],
    "simulate strategy=fedavg strategy.beta1=0.9": ["strategy.beta1 is no setting"],
    "simulate population=snip": ["population=snip does not exist", "snips", "shakespeare"],
    "simulate privacy=devcie": ["privacy=devcie does not exist", "device", "none"],
    "simulate population.devices=many": ["population.devices", "many"],
    "simulate rounds=2.5": ["rounds", "2.5"],
    "simulate rounds=null": ["rounds", "cannot be null"],
    "simulate +extra=1": ["+extra=1", "not added"],
    "simulate ~rounds": ["~rounds", "not added or removed"],
    "simulate rounds": ["rounds", "key=value"],
    "simulate run.dir=a(b": ["run.dir=a(b", "quote"],
    "simulate --rounds 5": ["--rounds", "key=value"],
    "simulate --cfg everything": ["--cfg", "everything"],
    "simulate resume=nowhere": ["nowhere does not exist"],
    "simulate -m resume=a,b": ["resume=a,b", "sweep"],
    "simulate -m run.dir=a seed=1,2": ["run.dir=a", "hydra.sweep.dir"],
    "report": ["run is missing", "run="],
    "report rnu=x": ["rnu", "did you mean run"],
    "report run=nowhere": ["nowhere"],
    "simulate rounds=0": ["rounds=0 must be at least 1"],
    "simulate privacy=none privacy.device.epsilon=4": ["protects nothing", "privacy=device"],
}

IMPOSSIBLE = {
    "cohort_size=0": ["cohort_size=0 must be at least 1"],
    "cohort_size=20 population.devices=10": ["cohort_size=20", "population.devices=10"],
    "seed=-1": ["seed=-1 must be at least 0"],
    "strategy.max_rate=1.5": ["strategy.max_rate=1.5", "at most 1"],
    "strategy.learning_rate=nan": ["strategy.learning_rate=nan"],
    "strategy.sampler=best": ["strategy.sampler=best", "activity or uniform"],
    "strategy.device_optimizer=lion": ["strategy.device_optimizer=lion", "sgd or adam"],
    "strategy.momentum=1": ["strategy.momentum=1", "below 1"],
    "strategy.proximal=-0.1": ["strategy.proximal=-0.1", "at least 0"],
    "strategy.device_optimizer=adam strategy.momentum=0.9": ["momentum=0.9", "device_beta1"],
    "strategy.proximal=0.9 strategy.weight_decay=0.2": ["is 1.1", "below 1"],
    "privacy.example.engine=jax": ["privacy.example.engine=jax", "grouped or opacus"],
    "privacy.device.epsilon=0": ["privacy.device.epsilon=0", "above 0"],
    "privacy.device.epsilon=inf": ["privacy.device.epsilon=inf", "above 0"],
    "privacy.device.delta=1": ["privacy.device.delta=1", "between 0 and 1"],
    "privacy.device.clip_norm=-1": ["privacy.device.clip_norm=-1", "above 0"],
    "privacy.device.noise_multiplier=1": ["epsilon=4", "contradict", "null"],
    "privacy.device.epsilon=null": ["privacy.device", "neither noise nor a target"],
    "privacy=device privacy.example.noise_multiplier=1": ["protects nothing"],
    "task.vocabulary.source=file": ["give task.vocabulary.path=FILE"],
    "task.vocabulary.path=words.txt": ["set task.vocabulary.source=file"],
    "population=jsonl": ["population.path is missing"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_line_that_names_value_and_remedy(
    line: str, sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    code, out, err = sottovoce(*shlex.split(line))
    assert code == 1
    assert out == ""
    assert err.startswith("sottovoce: ")
    assert err.count("\n") == 1
    assert all(part in err for part in REFUSED[line]), err
    assert simulated.calls == []
    assert everything_in(here) == []


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_impossible_values_are_refused_with_value_and_remedy(line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(composed(*line.split()))
    assert all(part in str(refusal.value) for part in IMPOSSIBLE[line]), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("data.jsonl line 3: not JSON"), "sottovoce: data.jsonl line 3: not JSON\n"),
        (FileNotFoundError(2, "No such file", "x.gz"), "sottovoce: No such file: x.gz\n"),
        (RuntimeError("two\n lines"), "sottovoce: RuntimeError: two lines (HYDRA_FULL_ERROR=1 "
         "shows the traceback)\n"),
    ],
)
def test_a_run_that_cannot_begin_ends_in_one_line_and_leaves_no_folder(
    error: Exception, line: str, sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    simulated.outcome = error
    assert sottovoce("simulate") == (1, "", line)
    assert everything_in(here) == []


def test_a_run_that_fails_later_keeps_its_folder(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    simulated.records = True
    simulated.outcome = RuntimeError("out of memory")
    assert sottovoce("simulate")[0] == 1
    assert (simulated.folder / "metrics.jsonl").exists()


def test_an_error_of_ours_hides_its_technical_cause(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    simulated.outcome = DataError("words.txt is not readable: give a text file")
    simulated.outcome.__cause__ = FileNotFoundError(2, "No such file", "words.txt")
    assert "give a text file" in sottovoce("simulate")[2]


def test_the_traceback_is_shown_on_request(
    sottovoce: Callable[..., Output], simulated: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    simulated.outcome = DataError("broken")
    with pytest.raises(DataError):
        sottovoce("simulate")
    with pytest.raises(ConfigError):
        sottovoce("simulate", "rounds=0")


def test_an_interrupt_is_one_line(sottovoce: Callable[..., Output], simulated: Recorder) -> None:
    simulated.outcome = KeyboardInterrupt()
    assert sottovoce("simulate") == (130, "", "sottovoce: interrupted\n")


# -- settings that warn ----------------------------------------------------------------------------


def test_noise_of_zero_and_a_target_above_the_budget_are_named() -> None:
    (noiseless,) = validate(
        composed("privacy.device.epsilon=null", "privacy.device.noise_multiplier=0")
    )
    assert "epsilon is infinite" in noiseless
    (early,) = validate(composed("privacy.device.max_epsilon=2"))
    assert "privacy.device.max_epsilon=2" in early


def test_adam_beside_both_kinds_of_privacy_is_named() -> None:
    (whole,) = validate(composed("strategy.device_optimizer=adam"))
    assert "privacy.device.clip_norm" in whole
    for privacy in ("none", "device", "example"):
        assert validate(composed("strategy.device_optimizer=adam", f"privacy={privacy}")) == []


# -- where a run writes ----------------------------------------------------------------------------


def test_a_run_gets_a_dated_folder_and_nothing_else(
    sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    assert sottovoce("simulate", "rounds=3")[0] == 0
    folder = simulated.folder
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", folder.as_posix())
    assert [p for p in everything_in(here) if (here / p).is_file()] == [f"{folder}/config.yaml"]
    assert simulated.calls[0][0].rounds == 3


def test_the_exit_code_is_that_of_the_run(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    simulated.outcome = 3
    assert sottovoce("simulate")[0] == 3


class StoppedClock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> StoppedClock:
        return cls(2026, 1, 31, 10, 20, 30)


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(placement, "datetime", StoppedClock)
    yield


@pytest.mark.usefixtures("stopped_clock")
def test_runs_and_sweeps_of_one_second_do_not_share_a_folder(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    for _ in range(3):
        sottovoce("simulate")
    for _ in range(2):
        sottovoce("simulate", "-m", "seed=1,2")
    assert [folder.name for _, folder in simulated.calls[:3]] == [
        "10-20-30", "10-20-30-2", "10-20-30-3"
    ]
    sweeps = [folder.relative_to(Path.cwd()).as_posix() for _, folder in simulated.calls[3:]]
    root = "multirun/2026-01-31/10-20-30"
    assert sweeps == [f"{root}/0", f"{root}/1", f"{root}-2/0", f"{root}-2/1"]


def test_a_sweep_runs_every_combination_and_reports_the_worst(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    code, _, err = sottovoce("simulate", "-m", "seed=1,2", "rounds=3,0")
    assert [(cfg.seed, cfg.rounds) for cfg, _ in simulated.calls] == [(1, 3), (2, 3)]
    assert code == 1
    assert err.endswith("sottovoce: rounds=0 must be at least 1\n")


def test_an_interrupted_run_ends_its_sweep(
    sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    simulated.outcome = cli.INTERRUPTED
    assert sottovoce("simulate", "-m", "seed=1,2")[0] == 130
    assert len(simulated.calls) == 1


def test_a_named_folder_is_used_once(
    sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    assert sottovoce("simulate", "run.dir=out/first")[0] == 0
    assert simulated.folder == Path("out/first")
    code, _, err = sottovoce("simulate", "run.dir=out/first")
    assert code == 1
    assert "resume=out/first" in err
    assert len(simulated.calls) == 1


# -- resume ----------------------------------------------------------------------------------------


def test_resume_takes_the_settings_and_the_folder_of_the_run(
    sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    sottovoce("simulate", "rounds=7", "population.devices=5000", "strategy=fedavg", "run.dir=a b")
    before = everything_in(here)
    code, _, err = sottovoce("simulate", "resume=a b", "run.progress=false")
    assert (code, err) == (0, "")
    cfg, folder = simulated.calls[-1]
    assert folder == Path("a b")
    assert (cfg.rounds, cfg.population.devices, cfg.strategy.name) == (7, 5000, "fedavg")
    assert cfg.resume == "a b"
    assert cfg.run.progress is False
    assert everything_in(here) == before


def test_resume_refuses_what_is_not_a_run(
    sottovoce: Callable[..., Output], simulated: Recorder, here: Path
) -> None:
    (here / "empty").mkdir()
    assert "not a run folder" in sottovoce("simulate", "resume=empty")[2]
    for text in ("rounds: [", "nonsense: 1", "- 1", "rounds: many"):
        (here / "empty" / "config.yaml").write_text(text)
        code, _, err = sottovoce("simulate", "resume=empty")
        assert code == 1
        assert "config.yaml does not hold the settings of a run" in err
    assert simulated.calls == []


@pytest.mark.parametrize("other", ["rounds=9", "privacy=none", "seed=3", "run.dir=b"])
def test_resume_refuses_other_settings(
    other: str, sottovoce: Callable[..., Output], simulated: Recorder
) -> None:
    sottovoce("simulate", "run.dir=a")
    code, _, err = sottovoce("simulate", "resume=a", other)
    assert code == 1
    assert f"{other} cannot be changed by resume" in err
    assert len(simulated.calls) == 1


# -- the other verbs -------------------------------------------------------------------------------


def test_account_prints_and_makes_no_folder(
    sottovoce: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sottovoce.server.account")
    plan = ["noise_multiplier=1", "sampling_rate=0.01", "steps=100", "delta=1e-5", "format=json"]
    code, out, err = sottovoce("account", *plan)
    assert (code, err) == (0, "")
    assert 0 < json.loads(out)["epsilon"] < 10
    assert sottovoce("account", "-m", *plan[1:], "noise_multiplier=1,2")[0] == 0
    assert everything_in(here) == []


def test_audit_hands_on_its_settings_and_its_exit_code(
    sottovoce: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = pytest.importorskip("sottovoce.privacy.audit.run")
    seen: list[Any] = []
    monkeypatch.setattr(audit, "run_audit", lambda cfg: seen.append(cfg) or 4)
    assert sottovoce("audit", "run=x", "devices=50")[0] == 4
    assert (seen[0].run, seen[0].devices) == ("x", 50)
    assert everything_in(here) == []


def test_report_prints_where_the_page_is(
    sottovoce: Callable[..., Output], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch, "sottovoce.server.report", write_report=lambda run: run / "report.html"
    )
    assert sottovoce("report", "run=a") == (0, "a/report.html\n", "")
    assert everything_in(here) == []


def test_errors_of_other_verbs_are_one_line_too(
    sottovoce: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Path) -> Path:
        raise RunError(f"{run} is not a run")

    stand_in(monkeypatch, "sottovoce.server.report", write_report=refuse)
    assert sottovoce("report", "run=a") == (1, "", "sottovoce: a is not a run\n")


# -- the environment -------------------------------------------------------------------------------


def test_telemetry_is_off_unless_the_user_says_otherwise(
    sottovoce: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    for name in cli.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    sottovoce("--version")
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "HYDRA_FULL_ERROR" not in os.environ
