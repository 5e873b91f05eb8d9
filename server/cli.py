"""The command `sottovoce`: every verb is a Hydra application, every failure one line.

Nothing heavy is imported before a verb runs, so that help is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn, TypeVar

from sottovoce.client.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from omegaconf import DictConfig

Settings = TypeVar("Settings")

# Set before flwr, ray or torch is imported; what the user has set stays.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GRPC_VERBOSITY": "NONE",  # it logs a line for whoever knocks with another protocol or CA
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",  # of 1024 compiled products, most are met once
}
FULL_ERROR = "HYDRA_FULL_ERROR"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `sottovoce` with `arguments` (default: the command line's); its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text("sottovoce"), end="")
        return 0
    if words[0] == "--version":
        print(f"sottovoce {version('sottovoce')}")
        return 0
    if words[0] in DEVICE_VERBS:
        agent: Callable[[Sequence[str]], int] = import_module(DEVICE_VERBS[words[0]]).main
        return agent(words[1:])
    return _reported(words[0], words[1:])


def help_text(name: str) -> str:
    """What `sottovoce` (or one of its verbs) prints about itself."""
    return resources.files("sottovoce.server").joinpath("help", f"{name}.txt").read_text("utf-8")


def _reported(verb: str, words: list[str]) -> int:
    """Exit code of the verb; what goes wrong becomes one line, or a traceback if asked for."""
    wants_traceback = os.environ.get(FULL_ERROR) == "1"
    try:
        return _run(verb, words)
    except KeyboardInterrupt:
        print("sottovoce: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if wants_traceback:
            raise
        from sottovoce.server.complaint import complaint

        print(f"sottovoce: {complaint(error, lambda: _settings(verb, words))}", file=sys.stderr)
        return 1


# -- the verbs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """`run`: does the work of one composed config and returns the exit code.

    `configs`: the package with its YAML. The groups are simulate's alone, or Hydra would take
    `run=RUN` of the other verbs for a choice from the group `run`.
    """

    run: Callable[[DictConfig], int]
    configs: str = "sottovoce.configs.verbs"
    writes_runs: bool = False


def _simulate(cfg: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sottovoce.server import placement
    from sottovoce.server.limits import validate

    hydra = HydraConfig.get()
    sweeps = hydra.mode == RunMode.MULTIRUN
    if cfg.resume is not None:
        cfg, folder = placement.resumed(cfg, hydra.overrides.task)
    _refuse_live(cfg)
    validate(cfg)
    if sweeps:
        folder = Path(hydra.runtime.output_dir)
        print(f"sweep {hydra.job.num}: {hydra.job.override_dirname}", file=sys.stderr)
    elif cfg.resume is None:
        folder = placement.new_folder(cfg.run.dir)
    from sottovoce.server.simulate import simulate

    try:
        code = simulate(cfg, folder)
    except Exception:
        if not sweeps and cfg.resume is None and cfg.run.dir is None:
            placement.discard_unstarted(folder)
        raise
    if sweeps and code == INTERRUPTED:
        raise KeyboardInterrupt  # the sweep ends with the run
    return code


def _refuse_live(cfg: DictConfig) -> None:
    from sottovoce.server.live_limits import is_live

    if is_live(cfg):
        again = f"resume={cfg.resume}" if cfg.resume is not None else "population.path=FILE"
        raise ConfigError(f"population=live is for real devices: use sottovoce serve {again}")


def _serve(cfg: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sottovoce.server import placement
    from sottovoce.server.limits import validate

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        raise ConfigError("-m: a sweep cannot be served to real devices; start one run at a time")
    settings = cfg.gateway
    if cfg.resume is not None:
        words = [w for w in hydra.overrides.task if not w.startswith("gateway.")]
        cfg, folder = placement.resumed(cfg, words)
    from sottovoce.server.live_limits import is_live

    if not is_live(cfg):
        raise ConfigError(
            f"population={cfg.population.get('name')} is simulated: use sottovoce simulate, or "
            "population=live"
        )
    validate(cfg)
    if cfg.resume is None:
        folder = placement.new_folder(cfg.run.dir)
    cfg = _with(cfg, gateway=settings)
    from sottovoce.server.serve import serve

    try:
        return serve(cfg, folder)
    except BaseException:
        if cfg.resume is None and cfg.run.dir is None:
            placement.discard_unstarted(folder)
        raise


def _with(cfg: DictConfig, **values: object) -> DictConfig:
    """A config with more keys than its dataclass has."""
    from omegaconf import DictConfig, OmegaConf

    found = OmegaConf.create(OmegaConf.to_container(cfg))
    assert isinstance(found, DictConfig)
    for key, value in values.items():
        found[key] = value
    return found


def _gateway(cfg: DictConfig) -> int:
    from sottovoce.server.serve import serve_gateway

    return serve_gateway(cfg)


def _status(cfg: DictConfig) -> int:
    from sottovoce.server.gateway_config import StatusConfig
    from sottovoce.server.operate import show_status

    return show_status(_typed(cfg, StatusConfig))


def _tokens(cfg: DictConfig) -> int:
    from sottovoce.server.gateway_config import TokensConfig
    from sottovoce.server.operate import make_tokens

    return make_tokens(_typed(cfg, TokensConfig))


def _revoke(cfg: DictConfig) -> int:
    from sottovoce.server.gateway_config import RevokeConfig
    from sottovoce.server.operate import revoke_device

    return revoke_device(_typed(cfg, RevokeConfig))


def _account(cfg: DictConfig) -> int:
    from sottovoce.server.account import AccountConfig, run_account

    return run_account(_typed(cfg, AccountConfig))


def _audit(cfg: DictConfig) -> int:
    from sottovoce.privacy.audit.run import AuditConfig, run_audit

    return run_audit(_typed(cfg, AuditConfig))


def _typed(cfg: DictConfig, kind: type[Settings]) -> Settings:
    """A composed config as the dataclass that it was checked against."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_object(cfg)
    assert isinstance(settings, kind)
    return settings


def _report(cfg: DictConfig) -> int:
    from sottovoce.server.report import write_report

    if cfg.run is None:
        raise ConfigError("run is missing: give the run's folder, run=runs/<date>/<time>")
    print(write_report(Path(cfg.run).expanduser()))
    return 0


def _study(cfg: DictConfig) -> int:
    from sottovoce.server.study import run_study

    return run_study(cfg)


VERBS = {
    "simulate": Verb(_simulate, configs="sottovoce.configs", writes_runs=True),
    "account": Verb(_account),
    "audit": Verb(_audit),
    "report": Verb(_report),
    "study": Verb(_study, configs="sottovoce.configs"),
    "serve": Verb(_serve, configs="sottovoce.configs", writes_runs=True),
    "gateway": Verb(_gateway),
    "status": Verb(_status),
    "tokens": Verb(_tokens),
    "revoke": Verb(_revoke),
}

# What runs on a device: no Hydra, no Flower, arguments as any small command has them.
DEVICE_VERBS = {
    "join": "sottovoce.client.agent.join_cli",
    "device": "sottovoce.client.agent.device_cli",
}


# -- Hydra -----------------------------------------------------------------------------------------


def _run(name: str, words: list[str]) -> int:
    """Compose the config of the verb `name` and run it, once or over a sweep."""
    if name not in VERBS:
        from sottovoce.server.complaint import similar

        raise ConfigError(
            f"{name} is no verb{similar(name, [*VERBS, *DEVICE_VERBS])}: choose "
            f"{', '.join([*VERBS, *DEVICE_VERBS])}; "
            "`sottovoce --help` shows examples"
        )
    if "--help" in words or "-h" in words:  # Hydra would list all groups, for half a second
        print(help_text(name), end="")
        return 0
    import hydra

    from sottovoce.server.config import register

    verb, flags = VERBS[name], _flags(words)
    for setting in flags.overrides if name in ("status", "tokens", "revoke") else ():
        if setting.startswith("gateway."):
            raise ConfigError(f"{setting}: sottovoce {name} takes the folder alone, gateway=FOLDER")
    codes, failures = [0], list[Exception]()

    def task(cfg: DictConfig) -> None:
        try:
            codes.append(verb.run(cfg))
        except Exception as error:  # through Hydra it would print lines of its own
            failures.append(error)

    register(name)
    application = hydra.main(
        config_path=f"pkg://{verb.configs}", config_name=name, version_base="1.3"
    )(task)
    with _sweep_folder(verb, flags) as sweep, _command_line(name, [*words, *sweep]):
        try:
            application()
        except SystemExit as stop:  # --hydra-help
            return int(stop.code or 0)
    for failure in failures:
        raise failure
    return max(codes)


def _flags(words: list[str]) -> argparse.Namespace:
    """The parsed command line of a verb; ConfigError where it is not one."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}: settings are key=value, as in rounds=5; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_args(words)
    for setting in flags.overrides:
        if setting.startswith(("+", "~")):
            raise ConfigError(
                f"{setting}: settings can be set, as in rounds=5, not added or removed"
            )
        if flags.multirun and setting.startswith("resume="):
            raise ConfigError(f"{setting} cannot be part of a sweep: resume one run at a time")
        if flags.multirun and setting.startswith("run.dir="):
            raise ConfigError(f"{setting} would be shared by a sweep: give hydra.sweep.dir instead")
    return flags


@contextmanager
def _sweep_folder(verb: Verb, flags: argparse.Namespace) -> Iterator[list[str]]:
    """The override that gives a sweep its folder: a new one, or none that stays."""
    chosen = any(setting.startswith("hydra.sweep.dir=") for setting in flags.overrides)
    if not flags.multirun or chosen:
        yield []
    elif verb.writes_runs:
        from sottovoce.server.placement import dated_folder, discard_empty

        folder = dated_folder(Path("multirun"))
        try:
            yield [f"hydra.sweep.dir={folder}"]
        finally:
            discard_empty(folder, folder.parent, folder.parent.parent)
    else:
        with TemporaryDirectory() as scratch:
            yield [f'hydra.sweep.dir="{scratch}"']


@contextmanager
def _command_line(verb: str, words: list[str]) -> Iterator[None]:
    """Hydra reads the command line itself; its errors reach us only with its tracebacks on."""
    before, setting = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = [f"sottovoce {verb}", *words]
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if setting is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = setting


def _settings(verb: str, words: list[str]) -> list[str]:
    """Every setting of a verb under the groups chosen in `words`, to find what was meant."""
    from hydra import compose, initialize_config_module

    from sottovoce.server.complaint import flat_keys

    with initialize_config_module(VERBS[verb].configs, version_base="1.3"):
        plain = compose(verb)
        groups = [word for word in words if word.partition("=")[0] in plain]
        try:
            return list(flat_keys(compose(verb, groups)))
        except Exception:  # the groups are what is wrong
            return list(flat_keys(plain))


if __name__ == "__main__":
    sys.exit(main())
