"""The same run on Flower's own runtimes: a real SuperLink with two SuperNodes, each a process of
its own on loopback, and Flower's simulation on Ray, where it is installed.

SOTTOVOCE_FLOWER=1 pytest tests/test_flower_runtime.py
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from flower_processes import (
    BIN,
    FLOWER,
    ROOT,
    TIMEOUT_S,
    flower_environment,
    free_ports,
    process,
    wait_until_open,
)
from safetensors.torch import load_file

from sottovoce.server.cli import main

pytestmark = FLOWER
TOLERANCE = 1e-6  # of a parameter: each node's sum is rounded to float32 before they are added
TINY = (
    "population.devices=1000 population.held_out_devices=20 cohort_size=150 rounds=2 seed=7 "
    "strategy=fedavg privacy=device model.embedding_size=6 model.hidden_size=5 run.report=false "
    "run.progress=false"
)


def flower_run(environment: dict[str, str], *federation: str) -> str:
    """What `flwr run` of the tiny run over two fleets said; it must end well."""
    settings = f'fleets=2 overrides="{TINY} run.dir=run"'
    done = subprocess.run(
        [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", settings, *federation],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_like_alone(folder: Path, model: Path) -> None:
    """Compare with `sottovoce simulate`: only the order in which float32 sums are added differs."""
    assert main(["simulate", *TINY.split(), f"run.dir={folder / 'alone'}"]) == 0
    alone, together = load_file(folder / "alone" / "model.safetensors"), load_file(model)
    assert alone.keys() == together.keys()
    furthest = max(float((alone[name] - together[name]).abs().max()) for name in alone)
    print(f"furthest parameter: {furthest:.2g}")
    assert furthest < TOLERANCE


def test_two_supernodes_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    link, *nodes = free_ports(3)
    environment = flower_environment(tmp_path / "flower", link)
    here = ("--insecure", "--host", "127.0.0.1", "--port")
    with ExitStack() as stack:
        logs = [
            stack.enter_context(
                process(tmp_path / "link", environment, "flower-superlink", *here, str(link))
            )
        ]
        for port in nodes:
            command = ("flower-supernode", "--superlink", f"127.0.0.1:{link}", *here, str(port))
            folder = tmp_path / f"node-{port}"
            logs.append(stack.enter_context(process(folder, environment, *command)))
        wait_until_open(link)
        said = [flower_run(environment), *(log.read_text()[-3000:] for log in logs)]
    model = tmp_path / "link" / "run" / "model.safetensors"
    assert model.is_file(), "\n".join(said)
    assert_like_alone(tmp_path, model)
    assert all("Sent successfully" in log.read_text() for log in logs[1:]), "a node was not asked"


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: sottovoce[simulation]")
def test_two_nodes_on_ray_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    (link,) = free_ports(1)
    environment = flower_environment(tmp_path / "flower", link)
    command = ("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1")
    with process(tmp_path / "link", environment, *command, "--port", str(link)) as log:
        wait_until_open(link)
        said = flower_run(environment, "--federation-config", "num-supernodes=2")
        said += log.read_text()[-3000:]
    model = tmp_path / "link" / "run" / "model.safetensors"
    assert model.is_file(), said
    assert_like_alone(tmp_path, model)
