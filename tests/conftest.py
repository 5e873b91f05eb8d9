"""One thread a process, no telemetry, and the same hypotheses on every machine."""

from __future__ import annotations

import os

from hypothesis import settings

from sottovoce.server.cli import ENVIRONMENT

# Before any test imports torch or flwr.
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
os.environ.pop("HYDRA_FULL_ERROR", None)

settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")
