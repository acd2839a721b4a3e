"""Text files written in one step."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamax_lm_eval.files import write_text


@pytest.fixture(params=[0o077, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "new", "text\n")
    assert mode(tmp_path / "new") == 0o666 & ~umask


@pytest.mark.parametrize("permissions", [0o600, 0o664])
def test_existing_files_keep_theirs(tmp_path: Path, umask: int, permissions: int) -> None:
    file = tmp_path / "old"
    file.write_text("before")
    file.chmod(permissions)
    write_text(file, "after")
    assert (file.read_text(), mode(file)) == ("after", permissions)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if exists:
        target.write_text("before")
    link.symlink_to(Path("elsewhere") / "target")
    write_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link", "target"]


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
