"""What runs on a device starts without the libraries of the server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "flwr", "hydra", "omegaconf", "ray", "opacus", "transformers", "peft", "tokenizers",
    "matplotlib", "rich", "dp_accounting", "jinja2", "sqlalchemy", "pandas", "seqeval",
    "torchmetrics", "prometheus_client",
)
WITHOUT_TORCH = (
    "sottovoce.client.agent.store",
    "sottovoce.client.agent.journal",
    "sottovoce.client.agent.policy",
    "sottovoce.client.agent.eligibility",
    "sottovoce.client.agent.spending",
    "sottovoce.client.agent.device_cli",
    "sottovoce.privacy.accounting.local_bound",
)
WITH_TORCH = (
    "sottovoce.client.wire",
    "sottovoce.client.task_spec",
    "sottovoce.client.agent.agent",
    "sottovoce.client.agent.connection",
    "sottovoce.client.agent.join_cli",
    "sottovoce.client.agent.work",
)


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are in memory after `code` in a fresh interpreter."""
    tail = f"\nimport json, sys; print(json.dumps([n for n in {names!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=120, check=True
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_stores_and_policies_need_numpy_at_most(module: str) -> None:
    assert loaded(f"import {module}", (*HEAVY, "torch", "scipy", "grpc")) == []


def test_the_agent_needs_torch_and_grpc_at_most() -> None:
    assert loaded(f"import {', '.join(WITH_TORCH)}", (*HEAVY, "scipy")) == []


def test_an_app_adds_examples_with_the_standard_library_and_numpy() -> None:
    code = (
        "import tempfile; from sottovoce.client.agent.store import DeviceStore;"
        "DeviceStore(tempfile.mkdtemp()).add([{'text': 'play some jazz'}])"
    )
    assert loaded(code, (*HEAVY, "torch", "scipy", "grpc")) == []


@pytest.mark.parametrize("verb", ["device", "join"])
def test_the_command_line_reaches_the_device_without_the_server_s_libraries(verb: str) -> None:
    code = f"""
from sottovoce.server.cli import main
try:
    main([{verb!r}, "--help"])
except SystemExit:
    pass
"""
    assert loaded(code, (*HEAVY, "torch")) == []
