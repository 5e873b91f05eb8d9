"""The gateway's log: one event a line, as words or as JSON. Never a payload, never a secret."""

from __future__ import annotations

import json
import logging
import sys
import time

LOGGER = logging.getLogger("sottovoce.gateway")


def event(what: str, level: int = logging.INFO, **facts: object) -> None:
    """Log that `what` happened. `facts`: names and short values, in the order given."""
    if LOGGER.isEnabledFor(level):
        words = " ".join(f"{name}={value}" for name, value in facts.items())
        LOGGER.log(level, "%s", f"{what} {words}".rstrip(), extra={"event": what, "facts": facts})


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, event, and the event's facts."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.getMessage()),
        }
        return json.dumps(line | getattr(record, "facts", {}), default=str)


def set_up(log_format: str) -> None:
    """Log to standard error in `log_format`, text or json; the root logger is left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    LOGGER.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
