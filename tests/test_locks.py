"""Folders are held by one process at a time, and what a killed process left is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.locks import LOCK_NAME, locked


def owner(**changed: Any) -> str:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    return json.dumps({**mine, **changed})


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        held = json.loads((folder / LOCK_NAME).read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        told = f"in use by process {os.getpid()} on .* or remove .*{LOCK_NAME}"
        with pytest.raises(UserError, match=told), locked(folder):
            pass
        other = "from dynamax_lm_eval.locks import locked; from pathlib import Path\n"
        other += f"with locked(Path({str(folder)!r})): pass"
        ended = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
        assert "is in use by process" in ended.stderr
    assert not (tmp_path / "a").exists(), "nothing was written there"

    def fails() -> None:
        with locked(folder):
            (folder / "kept").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "content",
    [
        owner(pid=dead_pid()),
        owner(started=psutil.Process().create_time() - 1000),  # another process has the number now
        "",
        "{",
        '{"pid": "x"}',
        "[1]",
    ],
    ids=["process gone", "number reused", "empty", "cut", "no number", "other JSON"],  # the first two name processes
)
def test_what_a_killed_process_left_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("content", [owner(host="elsewhere", pid=dead_pid()), owner()], ids=["other host", "alive"])
def test_what_may_run_is_not_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(UserError, match=r"--output .* in use by process \d+ on .* remove"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).read_text() == content


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--output .*file.* cannot be written"), locked(folder):
            pass
