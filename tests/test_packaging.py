"""The installed package: what is in it, what it imports, and how light it starts."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("client", "configs", "privacy", "server", "simulations", "strategies")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(*patterns: str) -> Iterator[Path]:
    """Files of the package, relative to the root."""
    for folder in TOP:
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                yield path.relative_to(ROOT)


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_every_folder_with_code_is_in_the_list_of_packages() -> None:
    on_disk = {".".join(("sottovoce", *path.parent.parts)) for path in sources("*.py")}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_package_has_an_init_and_every_folder_its_type_marker() -> None:
    assert all((ROOT / path.parent / "__init__.py").is_file() for path in sources("*.py"))
    assert all((ROOT / folder / "py.typed").is_file() for folder in TOP)


def test_the_type_checker_sees_the_same_folders() -> None:
    links = ROOT / ".typing" / "sottovoce"
    assert sorted(path.name for path in links.iterdir()) == sorted(TOP)
    for link in links.iterdir():
        assert not Path(link.readlink()).is_absolute()
        assert link.resolve() == ROOT / link.name


def test_the_namespace_has_no_file_of_its_own() -> None:
    spec = importlib.util.find_spec("sottovoce")
    assert spec is not None
    assert spec.origin is None
    for folder in TOP:
        assert importlib.util.find_spec(f"sottovoce.{folder}") is not None


def test_the_console_script_is_the_command_line() -> None:
    (script,) = entry_points(group="console_scripts", name="sottovoce")
    assert script.value == "sottovoce.server.cli:main"
    assert script.load() is importlib.import_module("sottovoce.server.cli").main
    assert version("sottovoce") == PYPROJECT["project"]["version"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sottovoce.server.cli import main; main([{words}]);"
        "print([m for m in ('torch', 'flwr', 'ray', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    for words in ("", "'--help'", "'--version'", "'simulate', '--help'", "'audit', '--help'"):
        assert python(code.format(words=words)).splitlines()[-1] == "[]"
    light = "from sottovoce.server.cli import main; main([]); import sys; print(*sys.modules)"
    assert "numpy" not in python(light).splitlines()[-1].split()


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["dependency-groups"]["dev"],
    ]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in wanted}
    assert names <= set(pins)
    assert not any("+" in pin for pin in pins.values())


def test_the_flower_app_is_one_that_flower_accepts() -> None:
    from flwr.common.config import validate_fields_in_config

    assert validate_fields_in_config(PYPROJECT) == (True, [], [])
    components = PYPROJECT["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}


def test_settings_of_the_flower_app_compose() -> None:
    from sottovoce.server.cli import main

    overrides = PYPROJECT["tool"]["flwr"]["app"]["config"]["overrides"].split()
    assert main(["simulate", *overrides, "--cfg", "job"]) == 0


def test_the_wheel_holds_all_code_and_all_configs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="a wheel is built with setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE", *TOP):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, timeout=120, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for path in sources("*.py", "*.yaml", "*.txt", "*.j2", "py.typed"):
        assert f"sottovoce/{path.as_posix()}" in inside
    assert not [name for name in inside if name.startswith(TOP)]
    assert [name for name in inside if name.endswith("LICENSE")]
