"""What an operator installs: requirements, images and units name things that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from sottovoce.client.agent.store import DeviceStore
from sottovoce.server.cli import DEVICE_VERBS, VERBS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FOLDERS = ("client", "configs", "privacy", "server", "simulations", "strategies")


def lines(path: Path) -> list[str]:
    """Lines of a file that are no comments."""
    found = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in found if line]


def test_a_device_needs_a_pinned_part_of_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = set(lines(DEPLOY / "device-requirements.txt"))
    assert wanted < set(project["dependencies"])
    pinned = {line.partition("==")[0] for line in lines(ROOT / "constraints.txt")}
    assert {re.split("[<>=]", requirement)[0] for requirement in wanted} <= pinned


def test_every_place_that_names_a_torch_names_the_pinned_one() -> None:
    (pin,) = [line for line in lines(ROOT / "constraints.txt") if line.startswith("torch==")]
    for path in (DEPLOY / "device-requirements.txt", ROOT / "docs" / "deploy.md"):
        named = re.findall(r"torch==[\d.]+\d", path.read_text("utf-8"))
        assert named and set(named) == {pin}


def test_the_images_hold_the_whole_package_and_run_as_somebody_else_than_root() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text("utf-8")
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8")
    for folder in FOLDERS:
        assert f"COPY {folder} {folder}\n" in dockerfile
        assert f"!{folder}\n" in ignored
    for target in ("server", "device"):
        stage = dockerfile.split(f"FROM runtime AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER sottovoce" in stage


def test_the_demo_has_a_server_and_five_devices_that_wait_for_what_they_need() -> None:
    demo: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    services = demo["services"]
    devices = [service for name, service in services.items() if name.startswith("device-")]
    assert [device["environment"]["NUMBER"] for device in devices] == [1, 2, 3, 4, 5]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            here = source.startswith(".") and (DEPLOY / source).exists()
            assert here or source in demo["volumes"]
    mounts = [volume for device in devices for volume in device["volumes"]]
    assert not [mount for mount in mounts if mount.startswith("server")]
    assert all(mount.endswith(":ro") for mount in mounts if mount.startswith("shared"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_run_a_verb_that_exists_with_few_rights(unit: Path, tmp_path: Path) -> None:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    service = parser["Service"]
    program, verb = service["ExecStart"].split()[:2]
    assert program == "/opt/sottovoce/bin/sottovoce"
    assert verb in (*VERBS, *DEVICE_VERBS)
    assert service["User"] != "root" and service["NoNewPrivileges"] == "yes"
    if shutil.which("systemd-analyze") is None:
        return
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text("utf-8").replace(program, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60
    )
    assert str(copy) not in done.stderr, done.stderr


def test_a_raspberry_pi_s_unit_bounds_memory_and_steps_back() -> None:
    unit = (DEPLOY / "systemd" / "sottovoce-device.service").read_text("utf-8")
    for setting in ("MemoryMax=", "Nice=", "Restart=always"):
        assert f"\n{setting}" in unit


def test_the_demo_s_examples_fit_stores_and_their_labels_are_public(tmp_path: Path) -> None:
    script = [sys.executable, str(DEPLOY / "demo_examples.py"), str(tmp_path), "2"]
    subprocess.run(script, check=True, capture_output=True, timeout=60)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in tmp_path.glob("*.jsonl")
    }
    assert rows.keys() == {"public", "device-1", "device-2"}
    assert DeviceStore(tmp_path / "store").add(rows["device-1"]) == len(rows["device-1"]) == 200
    known = {row["intent"] for row in rows["public"]}
    assert {row["intent"] for name in rows for row in rows[name]} <= known


def test_the_pages_name_files_and_verbs_that_exist() -> None:
    for name in ("deploy.md", "threat-model.md"):
        page = (ROOT / "docs" / name).read_text("utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (ROOT / "docs" / target).exists(), target
        for verb in re.findall(r"`sottovoce ([a-z]+)", page):
            assert verb in (*VERBS, *DEVICE_VERBS), verb
