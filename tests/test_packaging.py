"""What the project says of versions is the same wherever it says it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: They check the code and do not run it.
CHECKERS = {"mypy", "ruff"}


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_lowest_constraints_are_the_lower_bounds(project: Any) -> None:
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *extras["dev"], *extras["gguf"], *extras["report"]]
    bounds = dict(re.split("[>,;=]+", line)[:2] for line in declared if ">=" in line)
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned == {name: bound for name, bound in bounds.items() if name not in CHECKERS}


def test_one_lowest_version_of_python(project: Any) -> None:
    lowest = project["project"]["requires-python"].removeprefix(">=")
    listed = [name.rpartition(" ")[2] for name in project["project"]["classifiers"] if ":: Python :: 3." in name]
    assert listed[0] == lowest
    assert project["tool"]["mypy"]["python_version"] == lowest
    assert project["tool"]["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
