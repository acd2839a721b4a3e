"""The task local_text: documents of files, and a run of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers import TEXT
from lm_eval.tasks import TaskManager

from dynamax_lm_eval import tasks_dir
from dynamax_lm_eval.lm import DynamaxLM


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata)


def documents(**metadata: Any) -> list[str]:
    (task,) = manager(**metadata).load(["local_text"])["tasks"].values()
    return [document["text"] for document in task.eval_docs]


def test_documents_end_with_whole_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100)) + "no newline at the end"
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(text)
    for name in ("a.txt", "a.txt.gz"):
        found = documents(file=str(tmp_path / name), characters="50")
        assert "".join(found) == text
        assert all(50 <= len(part) < 60 and part.endswith("\n") for part in found[:-1])
    assert documents(file=str(tmp_path / "a.txt")) == [text]


def test_texts_of_json_lines_are_not_joined(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo\n"}, {"text": " \n"}, {"text": "three", "more": 1}]
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n\n".join(map(json.dumps, rows)))
    assert documents(file=str(path)) == ["one\ntwo\n", "three"]
    assert documents(file=str(path), characters=4) == ["one\n", "two\n", "three"]


@pytest.mark.parametrize(
    ("metadata", "content", "message"),
    [
        ({}, None, "name a text file"),
        ({"file": "missing.txt"}, None, "there is no file"),
        ({"file": "a.txt"}, " \n", "holds no text"),
        ({"file": "a.txt", "characters": 0}, "a", "characters must be at least 1"),
        ({"file": "a.jsonl"}, '{"txt": "a"}', "line 1 of .* has no text"),
        ({"file": "a.jsonl"}, '{"text": "a"}\n{"text"', r"a\.jsonl: line 2 is no JSON"),
        ({"file": "a.json"}, '{"text": "a"}', r"write \.jsonl"),
    ],
)
def test_what_is_no_text_is_refused(
    metadata: dict[str, Any],
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(metadata["file"]).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        documents(**metadata)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "".join(chr(33 + i % 90) for i in range(999))}).encode())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[:-9], whole[:30], whole[:3], bytes(flipped), whole[:10] + whole[20:]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            documents(file=str(tmp_path / name))


def test_it_runs_through_exits(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    lm = DynamaxLM(str(model_folder), threshold=0.02, confidence="softmax", exit_scope="all", device="cpu")
    results: Any = lm_eval.simple_evaluate(
        lm, tasks=["local_text"], task_manager=manager(file=str(tmp_path / "a.txt")), bootstrap_iters=0
    )
    found = results["results"]["local_text"]
    assert found["bits_per_byte,none"] > 0
    assert found["mean_exit_layer,none"] < lm.engine.backbone.num_layers
