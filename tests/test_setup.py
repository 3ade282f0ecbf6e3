"""What `make` needs: one resolved set of versions, and a Python that is new enough."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", line) for line in pinned)  # no index, no local build
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in pinned)}


def test_every_dependency_is_pinned_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["bench"]]
    pinned = constraints()
    for requirement in map(Requirement, wanted):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_pins_prefect_needs_are_ranges_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {Requirement(text).name: str(Requirement(text).specifier) for text in project["dependencies"]}
    assert "<0.151" in ranges["fastapi"]
    assert "<2.1" in ranges["sqlalchemy"]


def test_an_old_python_is_refused_with_the_way_out(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tools / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
        (tools / name).chmod(0o755)
    for name in ("sh", "make"):
        (tools / name).symlink_to(shutil.which(name) or name)
    ended = subprocess.run(
        ["make", "test"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "gemst needs Python 3.11 or newer with its venv module; found: Python 3.9.2" in ended.stderr
    assert "make PYTHON=/path/to/python3.11 test" in ended.stderr
    assert not (tmp_path / ".venv").exists()
