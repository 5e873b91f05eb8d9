"""`sottovoce join`: this device takes part, from enrolment to the end of the process."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sottovoce.client.errors import ConfigError, DataError, SottovoceError

if TYPE_CHECKING:
    from sottovoce.client.agent.agent import Agent
    from sottovoce.client.agent.identity import Identity
    from sottovoce.client.agent.store import DeviceStore

TOKEN = "SOTTOVOCE_TOKEN"
FAILED, UNKNOWN, INTERRUPTED = 1, 3, 130
LARGEST_FILE = 1 << 20

HELP = """\
sottovoce join HOST:PORT --store FOLDER: take part in training, with the examples in FOLDER.

  HOST:PORT            of the gateway (sottovoce serve); not needed again once this device joined
  --store FOLDER       this device's examples, journal, policy and identity; made if it is not there
                       (sottovoce device add FILE --store FOLDER puts examples into it)

The first time, a one-time token from the operator is needed. It is read from --token-file, else
from SOTTOVOCE_TOKEN in the environment, else asked for; it is never part of the command.
  --token-file FILE    a file that holds the token
  --ca FILE            certificate (PEM) that the gateway's must chain to; kept in the store.
                       Without it: those that this system trusts
  --enrol-port PORT    of the gateway, where it asks for certificates of devices (mutual TLS)
  --name NAME          of this device, for the operator's list
  --insecure           no TLS: for a gateway on this very machine

How it works:
  --models FOLDER      pretrained models, a folder each, found by the SHA-256 of their weights;
                       tasks that need another one are declined
  --threads N          that training may use (1)
  --nice N             how far it steps back behind other programs, 0 to 19 (10)
  --memory-mb N        that training may take; by default what is free. Larger tasks are declined
  --once               leave when one task is over
  --log text|json      lines on standard error: events, never examples

What it takes part in, when, and up to which epsilon is written in FOLDER/policy.toml; what it took
part in: sottovoce device list --store FOLDER. It may be killed at any time.

Exit codes: 0 done or told to stop (SIGTERM), 1 an error (one line says which), 2 wrong arguments,
3 the gateway does not know this device any more, 130 interrupted.

Examples:
  sottovoce join fleet.example.org:9400 --store ~/.sottovoce --ca ca.pem --token-file token.txt
  sottovoce join --store ~/.sottovoce
"""


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return HELP

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"sottovoce: join: {message}; `sottovoce join --help` shows how\n")


def main(words: Sequence[str]) -> int:
    """Run `sottovoce join` with `words`; its exit code."""
    asked = _parser().parse_args(list(words))
    try:
        return _join(asked)
    except KeyboardInterrupt:
        print("sottovoce: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (SottovoceError, OSError) as error:
        from sottovoce.client.agent.connection import NoLongerKnown
        from sottovoce.client.agent.logs import plain

        print(f"sottovoce: {plain(error)}", file=sys.stderr)

        return UNKNOWN if isinstance(error, NoLongerKnown) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sottovoce join", allow_abbrev=False)
    parser.add_argument("address", nargs="?", metavar="HOST:PORT")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--enrol-port", type=int)
    parser.add_argument("--name", default="")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--memory-mb", type=int)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--log", choices=("text", "json"), default="text")
    return parser


def _join(asked: argparse.Namespace) -> int:
    _check(asked)
    from sottovoce.client.agent.store import DeviceStore

    store = DeviceStore(asked.store.expanduser())
    with store.held():
        return asyncio.run(_take_part(asked, store))


def _check(asked: argparse.Namespace) -> None:
    """Raise ConfigError for impossible arguments."""
    if asked.address is not None:
        host, _, port = asked.address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise ConfigError(f"{asked.address} is no HOST:PORT: write fleet.example.org:9400")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ConfigError(f"{asked.address} is no HOST:PORT: write [{host}]:{port}")
    if asked.threads < 1:
        raise ConfigError(f"--threads {asked.threads} must be at least 1")
    if not 0 <= asked.nice <= 19:
        raise ConfigError(f"--nice {asked.nice} must be from 0 to 19")
    if asked.memory_mb is not None and asked.memory_mb < 1:
        raise ConfigError(f"--memory-mb {asked.memory_mb} must be at least 1")
    if asked.models is not None and not asked.models.expanduser().is_dir():
        raise ConfigError(f"--models {asked.models} is no folder: give the one that holds models")


# -- enrolment -------------------------------------------------------------------------------------


async def _identity(asked: argparse.Namespace, store: DeviceStore) -> Identity:
    """Who this device is: as kept in the store, or enrolled now."""
    from dataclasses import replace

    from sottovoce.client.agent.connection import enrol, loopback
    from sottovoce.client.agent.identity import Identity
    from sottovoce.client.agent.logs import plain

    folder = store.folder / "identity"
    kept = Identity.load(folder)
    if asked.insecure and asked.address and not loopback(asked.address):
        raise ConfigError(f"--insecure is for loopback, not for {asked.address}: leave it out")
    if kept is not None:
        moved = kept if asked.address is None else replace(kept, address=asked.address)
        if asked.ca is not None:
            moved = replace(moved, ca=_read(asked.ca, "--ca"))
        if moved != kept:
            moved.save(folder)
        return moved
    if asked.address is None:
        raise ConfigError(
            f"{asked.store} has not joined a gateway yet: give its HOST:PORT, and a token"
        )
    ca = _read(asked.ca, "--ca") if asked.ca is not None else b""
    token = _token(asked.token_file)
    host = asked.address.rpartition(":")[0]
    door = asked.address if asked.enrol_port is None else f"{host}:{asked.enrol_port}"
    found = await enrol(door, token, ca=ca, insecure=asked.insecure, name=asked.name)
    found = replace(found, address=asked.address)
    found.save(folder)
    name = plain(found.gateway) or asked.address
    print(f"joined {name} as device {found.device}", file=sys.stderr)
    return found


def _token(file: Path | None) -> str:
    """The one-time token, from wherever it may come."""
    if file is not None:
        found = _read(file, "--token-file").decode("utf-8", "replace")
    elif TOKEN in os.environ:
        found = os.environ.pop(TOKEN)
    elif sys.stdin.isatty():
        found = getpass.getpass("token: ")
    else:
        found = sys.stdin.readline()
    if not found.strip():
        raise ConfigError(f"there is no token: give --token-file FILE, or set {TOKEN}")
    return found.strip()


def _read(file: Path, option: str) -> bytes:
    try:
        with file.expanduser().open("rb") as content:
            return content.read(LARGEST_FILE)
    except OSError as error:
        raise DataError(f"{option} {file} cannot be read ({error.strerror})") from None


# -- work ------------------------------------------------------------------------------------------


async def _take_part(asked: argparse.Namespace, store: DeviceStore) -> int:
    """Enrol if need be, then work until a signal, or until a task is over; the exit code."""
    from sottovoce.client.agent.logs import log_to

    log_to(as_json=asked.log == "json")
    identity = await _identity(asked, store)
    agent = _agent(asked, store, identity)
    loop, codes = asyncio.get_running_loop(), [0]

    def told(code: int) -> None:
        codes.append(code)
        agent.stop()

    loop.add_signal_handler(signal.SIGTERM, told, 0)
    loop.add_signal_handler(signal.SIGINT, told, INTERRUPTED)
    await agent.run((lambda agent: sum(agent.counts.values()) > 0) if asked.once else None)
    if agent.training:  # a thread cannot be stopped, and nothing of its work was sent
        sys.stderr.flush()
        os._exit(codes[-1])
    return codes[-1]


def _agent(asked: argparse.Namespace, store: DeviceStore, identity: Identity) -> Agent:
    from sottovoce.client.agent.machine import lean_memory

    lean_memory()
    os.nice(asked.nice)
    import torch

    torch.set_num_threads(asked.threads)
    from sottovoce.client.agent.agent import Agent

    return Agent(
        identity.address, store, credentials=identity, threads=asked.threads,
        models=asked.models and asked.models.expanduser(),
        memory_mb=asked.memory_mb,
    )  # fmt: skip
