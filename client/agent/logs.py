"""What an agent says of itself: one line an event, for people or as JSON, never a payload.

Events have names and a few fields (task id, round, reason, bytes, seconds): no text, no labels, no
counts of examples, no keys.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

LOGGER = logging.getLogger("sottovoce.agent")


def say(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields."""
    LOGGER.log(level, event, extra={"fields": fields})


def plain(text: object) -> str:
    """What another machine wrote, fit for a terminal and for one line of a log."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Lines(logging.Formatter):
    """`12:00:05 uploaded task=… bytes=…`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        rest = "".join(f" {name}={plain(value)}" for name, value in fields.items())
        return f"{at} {record.getMessage()}{rest}"


class JsonLines(logging.Formatter):
    """One object a line: time (seconds since 1970), level, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": round(record.created, 3), "level": record.levelname.lower(),
                "event": record.getMessage()}  # fmt: skip
        return json.dumps(head | getattr(record, "fields", {}), default=str)


def log_to(stream: TextIO | None = None, *, as_json: bool, verbose: bool = False) -> None:
    """Log of this package to a stream (standard error) from now on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else Lines())
    root = logging.getLogger("sottovoce")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
