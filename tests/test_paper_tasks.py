"""What holds for each of the tasks of the paper, on small made-up files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers_tasks import NAMES, coqa_row, load, prompt, write_jsonl
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from dynamax_lm_eval import tasks_dir


class Parrot(LM):
    """Always the same answer. The harness's dummy model would look for a tokenizer on the Hub."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [" a fence" for _ in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


class TestEveryTask:
    def test_group(self, data_dir: Path) -> None:
        manager = TaskManager(
            include_path=str(tasks_dir()), include_defaults=False, metadata={"data_dir": str(data_dir)}
        )
        assert "dynamax" in manager.all_groups
        assert set(NAMES) <= set(manager.all_subtasks)
        assert not any(name.startswith("_") for name in manager.all_tasks)
        loaded = manager.load(["dynamax"])
        assert tuple(loaded["tasks"]) == NAMES
        assert loaded["group_map"] == {"dynamax": list(NAMES)}

    @pytest.mark.parametrize("name", NAMES)
    def test_config(self, name: str, data_dir: Path) -> None:
        task = load(name, data_dir)
        assert task.VERSION == 1.0
        assert task.higher_is_better() and all(task.higher_is_better().values())
        assert task.config.test_split == "validation"
        assert task.config.generation_kwargs["do_sample"] is False

    @pytest.mark.parametrize("name", NAMES)
    def test_the_readme_shows_the_prompt(self, name: str, data_dir: Path) -> None:
        readme = (tasks_dir() / name / "README.md").read_text(encoding="utf-8")
        assert f"```\n{prompt(load(name, data_dir))}\n```" in readme

    @pytest.mark.parametrize("name", NAMES)
    def test_evaluates(self, name: str, data_dir: Path) -> None:
        task = load(name, data_dir)
        tasks = {"tasks": {name: task}, "groups": {}, "group_map": {}}
        results = lm_eval.evaluate(Parrot(), tasks, limit=2, bootstrap_iters=0)
        metrics = {key.split(",")[0] for key in results["results"][name] if "," in key and "stderr" not in key}
        assert metrics == set(task.higher_is_better())

    @pytest.mark.parametrize("name", NAMES)
    def test_read_once(self, name: str, data_dir: Path) -> None:
        assert load(name, data_dir).dataset["validation"] is load(name, data_dir).dataset["validation"]

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        file = tmp_path / "coqa.jsonl"
        write_jsonl(file, [coqa_row()])
        assert len(load("coqa_exit", tmp_path).eval_docs) == 1
        write_jsonl(file, [coqa_row()] * 3)
        os.utime(file, ns=(0, 0))
        assert len(load("coqa_exit", tmp_path).eval_docs) == 3

    def test_relative_folder(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(data_dir.parent)
        assert len(load("coqa_exit", data_dir.name).eval_docs) == 2

    @pytest.mark.parametrize(
        ("name", "pattern"), zip(NAMES, ("triviaqa*.jsonl*", "coqa*.jsonl*", "truthfulqa*.csv*"), strict=True)
    )
    def test_missing_file(self, name: str, pattern: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError) as error:
            load(name, tmp_path)
        assert pattern in str(error.value) and str(tmp_path) in str(error.value) and name in str(error.value)
        with pytest.raises(FileNotFoundError, match="is not a folder") as error:
            load(name, tmp_path / "none")
        assert pattern in str(error.value)

    def test_ambiguous_or_empty_data_dir(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "coqa_a.jsonl", [coqa_row()])
        write_jsonl(tmp_path / "coqa_b.jsonl.gz", [coqa_row()], gzipped=True)
        with pytest.raises(ValueError, match=r"coqa_a\.jsonl, coqa_b\.jsonl\.gz; keep one"):
            load("coqa_exit", tmp_path)
        with pytest.raises(ValueError, match="data_dir is empty"):
            load("coqa_exit", "")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "holds no rows"),
            (b'{"id": 1', r"coqa\.jsonl: line 1 is no JSON \(Expecting"),
            (b'{"id": "a", "source": "b"}\n', "line 1 lacks story, questions, answers, additional_answers"),
            (b"[]\n", "line 1 lacks id"),
            (gzip.compress(b"{}" * 500, mtime=0)[:-9], r"coqa\.jsonl: Compressed file ended"),
            (b"\xff\xfe\x00", "can't decode"),
        ],
    )
    def test_damaged_file(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "coqa.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("coqa_exit", tmp_path)

    def test_damaged_csv(self, tmp_path: Path) -> None:
        file = tmp_path / "truthfulqa.csv"
        file.write_text("Question,Category\nWhy?,None\n")
        with pytest.raises(ValueError, match="the header lacks Best Answer, Correct Answers, Incorrect Answers"):
            load("truthfulqa_gen_1shot", tmp_path)
        file.write_text("Category,Question,Best Answer,Correct Answers,Incorrect Answers\na,b,c,d\n")
        os.utime(file, ns=(0, 0))
        with pytest.raises(ValueError, match="line 2 has fewer cells"):
            load("truthfulqa_gen_1shot", tmp_path)
