"""Files and folders that are written: checksums, formats and names."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import (
    JsonFormat,
    check_writable,
    checksum,
    naming,
    short_name,
    write_tensors,
    write_text,
)

STRICT = JsonFormat("dynamax-test", 2, "a test", "make it again")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"the folder .*file.* cannot be written .*; do this"):
            check_writable(folder, "the folder", "do this")


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"), naming(tmp_path / "x.json"):
        raise OSError(28, "No space left on device")


def test_formats(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    data = {"a": (1, 2.5), "b": float("inf"), "c": "\u2028é\ud800", "d": {1: None}}
    STRICT.write(file, data)
    assert STRICT.read(file) == {"a": [1, 2.5], "b": float("inf"), "c": "\u2028é\ud800", "d": {"1": None}}
    stored = json.loads(file.read_text())
    assert list(stored)[-1] == "checksum"
    for changed, message in (
        ({"b": 1}, "its checksum is not that .*; make it again"),
        ({"format": "dynamax-other"}, "it is not a test .*; make it again"),
        ({"format_version": 3}, "format_version is 3 .*; make it again, or update dynamax-lm-eval"),
        ({"checksum": None}, "its checksum is not that .*; make it again"),
    ):
        file.write_text(json.dumps({**stored, **changed}))
        with pytest.raises(UserError, match=rf"x\.json cannot be used: .*{message}"):
            STRICT.read(file)
    by_hand = JsonFormat("dynamax-test", 1, "a test", "make it again", by_hand=True)
    file.write_text('{"format": "dynamax-test", "a": 1}')
    assert by_hand.read(file) == {"a": 1}
    with pytest.raises(UserError, match="missing"):
        STRICT.read(tmp_path / "missing")


def test_a_checksum_is_of_the_content() -> None:
    assert checksum({"a": 1, "b": [0.1, (2,)]}) == checksum({"b": [0.1, [2]], "a": 1})
    assert len({checksum(1), checksum(1.0), checksum("1"), checksum(True), checksum(1, "salt")}) == 5


@pytest.mark.parametrize("name", ["tiny_generate", "calm-recompute-0.9+0.8", "x" * 120])
def test_names_that_can_be_files_stay(name: str) -> None:
    assert short_name(name) == name


def test_other_names_become_files(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a b", "..", "../x", "x" * 121, "x" * 5000, "東" * 200, "", ".hidden", "a\x00b"]
    made = [short_name(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        (tmp_path / f"samples_{name}_2026-11-25T21-17-55.327231.jsonl").touch()


@pytest.fixture(params=[0o077, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "new", "text\n")
    write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
    assert mode(tmp_path / "new") == mode(tmp_path / "tensors") == 0o666 & ~umask


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
