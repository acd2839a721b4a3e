"""Exits to and from the Hub, with the Hub's library replaced: what is asked of it, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from helpers_engine import CLASSIFIERS, exits_config
from helpers_training import training_options

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint, lookup
from dynamax_lm_eval.training import command
from dynamax_lm_eval.training.options import RunOptions


class FakeApi:
    """Records calls; fails where it is told to."""

    calls: list[tuple[str, dict[str, Any]]]
    failing: str = ""

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        type(self).calls.append((name, arguments))
        if self.failing == name:
            raise OSError("401 unauthorised")
        return "https://hub/x"

    def create_repo(self, repo_id: str, **arguments: Any) -> str:
        return self._call("create_repo", {"repo_id": repo_id, **arguments})

    def upload_folder(self, **arguments: Any) -> str:
        return self._call("upload_folder", arguments)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    class Api(FakeApi):
        calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - made anew for each test

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def run(output: Path, **changes: Any) -> RunOptions:
    return RunOptions(output=str(output), device="cpu", push_to_hub="me/exits", private=True, **changes)


def test_exits_are_downloaded_at_the_revision_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, exits_config(), CLASSIFIERS)
    asked: list[Any] = []

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert lookup.open_exits("me/exits").config == exits_config()
    lookup.open_exits("me/exits@v2")
    files = ["config.json", "exits.safetensors"]
    assert asked == [("me/exits", None, files), ("me/exits", "v2", files)]


def test_a_repository_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("404\nnot found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="could not be downloaded from the Hub: 404 not found"):
        lookup.open_exits("me/exits")


def test_push(model_folder: Path, texts: Path, tmp_path: Path, api: type[FakeApi]) -> None:
    command.train(training_options(model_folder, texts), run(tmp_path))
    (first, made), (second, sent) = api.calls
    assert (first, second) == ("create_repo", "upload_folder")
    assert made == {"repo_id": "me/exits", "private": True, "exist_ok": True}
    assert sent["folder_path"] == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "curve.png",
        "evaluation.json",
        "exits.safetensors",
        "training.jsonl",
    ]


def test_a_wrong_token_shows_before_training(
    model_folder: Path,
    texts: Path,
    tmp_path: Path,
    api: type[FakeApi],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api.failing = "create_repo"
    monkeypatch.setattr(command, "_loop", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match="--push_to_hub 'me/exits': 401 unauthorised"):
        command.train(training_options(model_folder, texts), run(tmp_path))


def test_what_was_trained_outlives_a_failed_upload(
    model_folder: Path,
    texts: Path,
    tmp_path: Path,
    api: type[FakeApi],
) -> None:
    api.failing = "upload_folder"
    with pytest.raises(UserError, match=r"trained and in .* try again with: hf upload me/exits"):
        command.train(training_options(model_folder, texts), run(tmp_path))
    assert checkpoint.ExitCheckpoint.open(tmp_path).load()
