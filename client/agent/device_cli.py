"""The command `sottovoce device`: what is on a device, for the person who owns it.

Nothing that it prints holds a word of an example.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from sottovoce.client.agent.device_facts import day, examples, facts, listing
from sottovoce.client.agent.policy import FILE, Policy
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.agent.stored_rows import EARLIEST, checked_row
from sottovoce.client.errors import ConfigError, DataError, SottovoceError
from sottovoce.client.rows import Fault, parse

INTERRUPTED = 130


def main(words: Sequence[str]) -> int:
    """Run `sottovoce device` with `words`; its exit code: 0, or 1 where the input is bad."""
    if not words or words[0] in ("-h", "--help", "help") or {"-h", "--help"} & set(words[1:]):
        print(help_text(), end="")
        return 0
    try:
        flags = _parser().parse_args(words)
        return int(flags.run(flags))
    except SottovoceError as error:
        print(f"sottovoce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sottovoce: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `sottovoce device list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def help_text() -> str:
    """What `sottovoce device --help` prints."""
    return resources.files("sottovoce.server").joinpath("help", "device.txt").read_text("utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see `sottovoce device --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sottovoce device", add_help=False)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for name, run in (
        ("add", _add), ("list", _list), ("purge", _purge), ("forget", _forget), ("policy", _policy)
    ):
        verb = verbs.add_parser(name, add_help=False)
        verb.set_defaults(run=run)
        verb.add_argument("--store", type=Path, required=True)
        if name == "add":
            verb.add_argument("file")
        if name in ("list", "policy"):
            verb.add_argument("--json", action="store_true")
    return parser


# -- add -------------------------------------------------------------------------------------------


def _add(flags: argparse.Namespace) -> int:
    """All rows of the file or none: they are checked before the first one is stored."""
    now = time.time()
    with _lines(flags.file) as lines:
        found, empty = [], 0
        for number, line in enumerate(lines, start=1):
            try:
                row = None if line.isspace() else checked_row(parse(line), now)
            except Fault as fault:
                raise fault.at(_name(flags.file), "line", number) from None
            if row is None:
                empty += 1
            else:
                found.append(row)
    if not found:
        raise DataError(f"{_name(flags.file)} has no example with a word in it: nothing was stored")
    with _store(flags.store, create=True) as store:
        added, total = store.add_checked(found), store.count()
    left_out = f", {empty} without a word left out" if empty else ""
    print(f"{examples(added)} added{left_out}; {total} in {flags.store}")
    if now < EARLIEST:
        print("this machine's clock is not set: they get their date at the first purge after it is")
    return 0


def _name(file: str) -> str:
    return "standard input" if file == "-" else file


@contextmanager
def _lines(file: str) -> Iterator[Iterator[bytes]]:
    """Lines of a file or of standard input, unzipped where they are gzipped."""
    name = _name(file)
    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as raw:
            stream = cast(io.BufferedReader, raw)
            zipped = stream.peek(2)[:2] == b"\x1f\x8b"
            if file.endswith(".gz") and not zipped:
                raise DataError(
                    f"{name} is not a gzip file: fetch it again, or name it without .gz"
                )
            lines = cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if zipped else stream
            yield _without_mark(lines)
    except FileNotFoundError:
        raise DataError(f"{name} does not exist: give a JSONL file, or - for stdin") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is a broken gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}): give a JSONL file") from None


def _without_mark(lines: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


# -- list ------------------------------------------------------------------------------------------


def _list(flags: argparse.Namespace) -> int:
    with _store(flags.store) as store:
        found = facts(store)
    print(json.dumps(found) if flags.json else listing(found))
    return 0


# -- purge, forget, policy -------------------------------------------------------------------------


def _purge(flags: argparse.Namespace) -> int:
    days = Policy.load(flags.store).retention_days
    if days is None:
        raise ConfigError(
            f"{flags.store / FILE} has no retention_days: write retention_days = 30, or delete all "
            "by `sottovoce device forget`"
        )
    now = time.time()
    if now < EARLIEST:
        raise ConfigError(f"this machine's clock says {day(now)}: set it before a purge")
    with _store(flags.store) as store:
        deleted, left = store.purge(now, days), store.count()
    print(f"{examples(deleted)} older than {days:g} days deleted; {left} left")
    return 0


def _forget(flags: argparse.Namespace) -> int:
    with _store(flags.store) as store:
        deleted = store.forget()
    print(f"{examples(deleted)} deleted, with updates that were not sent yet")
    print("the journal stays: what was spent in epsilon cannot be taken back")
    return 0


def _policy(flags: argparse.Namespace) -> int:
    with _store(flags.store):
        policy = Policy.load(flags.store)
    values = {f.name: getattr(policy, f.name) for f in fields(policy) if f.name != "eligibility"}
    conditions = {f.name: getattr(policy.eligibility, f.name) for f in fields(policy.eligibility)}
    if flags.json:
        print(json.dumps({**values, "eligibility": conditions}))
        return 0
    here = (flags.store / FILE).exists()
    print(f"# {flags.store / FILE}" + ("" if here else " does not exist: all is as by default"))
    print(_toml(values), "[eligibility]", _toml(conditions), sep="\n")
    return 0


def _toml(values: dict[str, Any]) -> str:
    """The values as they would stand in the file; what is not set as a comment."""
    return "\n".join(
        f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}"
        for name, value in values.items()
    )


@contextmanager
def _store(folder: Path, *, create: bool = False) -> Iterator[DeviceStore]:
    store = DeviceStore(folder, create=create)
    try:
        yield store
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
