"""The task triviaqa_long on small made-up files; the Hub is replaced by rows."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers_tasks import LONG, load, module_of, prompt, trivia_rows, write_jsonl

from dynamax_lm_eval import tasks_dir


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Messages of triviaqa_long; the harness's logger may not propagate to pytest's."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = found.append  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval.tasks.triviaqa_long")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


class TestTriviaqa:
    def test_prompt(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        assert prompt(task) == (
            "Question: Which artificial waterway links the Mediterranean Sea to the Red Sea?\nAnswer: Suez Canal\n\n"
            "Question: Which mountain is the highest in Japan?\nAnswer: Mount Fuji\n\n"
            "Question: What is the full title of the book that Charles Darwin published in 1859?\nAnswer:"
        )
        assert prompt(task, 1).endswith("Answer: Mount Fuji\n\nQuestion: Question 2?\nAnswer:")
        assert task.config.generation_kwargs["until"] == ["\n"]

    def test_selection(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        documents = task.dataset["validation"]
        assert documents["question_id"] == [f"q-{i:04d}" for i in range(1, 1001)]
        assert documents[1]["answer"] == "a long accepted answer 0002"
        assert documents[1]["aliases"] == [
            "a long accepted answer 0002",
            "an even longer accepted answer numbered 0002",
        ]

    def test_examples_are_fixed_and_not_evaluated(self, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        shots = task.dataset["train"]
        # By words, then characters, then ids. "9" is the ninth.
        assert shots["question_id"] == [f"shot-{i}" for i in range(1, 9)]
        assert not set(shots["question_id"]) & set(task.dataset["validation"]["question_id"])
        starts = {prompt(task, i).rsplit("Question:", 1)[0] for i in range(0, 1000, 50)}
        assert len(starts) == 1
        assert prompt(task, num_fewshot=8).count("Question:") == 9

    def test_ranking_ties(self) -> None:
        rank = module_of("triviaqa_long")
        rows = [rank._row(f"id{i:04d}", "?", answer, []) for i, answer in enumerate(["aa bb"] * 997)]
        ties = [("z", "aa bb cc"), ("y", "aa bbb"), ("x", "aa bb"), ("id", "aa bb"), ("w", "aaaaaaaaaaaaaaaa")]
        evaluated, rest = rank._longest([*(rank._row(key, "?", answer, []) for key, answer in ties), *rows])
        # More words first, then more characters, then the smaller id; one word is never enough.
        assert [row["question_id"] for row in rest] == ["x", "w"]
        assert [row["question_id"] for row in evaluated] == ["id", *(f"id{i:04d}" for i in range(997)), "y", "z"]

    def test_shortest_alias_ties(self, tmp_path: Path) -> None:
        rows = trivia_rows()
        (row,) = (row for row in rows if row["question"] == LONG[1])
        row["aliases"] = ["b " * 10 + "cc", "b " * 10 + "bb", "c " * 9 + "ddddddddddddddd", "c " * 9 + "dddd"]
        write_jsonl(tmp_path / "triviaqa.jsonl", rows)
        assert load("triviaqa_long", tmp_path).eval_docs[0]["answer"] == "c " * 9 + "dddd"
        row["aliases"] = row["aliases"][:2]
        write_jsonl(tmp_path / "triviaqa.jsonl", rows)
        os.utime(tmp_path / "triviaqa.jsonl", ns=(0, 0))
        assert load("triviaqa_long", tmp_path).eval_docs[0]["answer"] == "b " * 10 + "bb"

    @pytest.mark.parametrize(
        ("answer", "score"),
        [
            ("  on the origin of species, by means of natural selection ", 1.0),
            ("The Origin of Species by Means of Natural Selection", 1.0),
            ("Origin of Species by Means of Natural Selection", 0.0),
            ("", 0.0),
        ],
    )
    def test_score(self, answer: str, score: float, data_dir: Path) -> None:
        task = load("triviaqa_long", data_dir)
        (filtered,) = task._filters[0].filters[0]().apply([[answer]], [{}])
        assert task.process_results(task.eval_docs[0], filtered) == {"exact_match": score}

    def test_too_few_questions(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "triviaqa.jsonl", trivia_rows()[:500])
        with pytest.raises(ValueError, match="500 questions are too few"):
            load("triviaqa_long", tmp_path)

    @pytest.mark.parametrize("aliases", [[], [" "], "a string", None, [1]])
    def test_unusable_aliases(self, aliases: Any, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "triviaqa.jsonl", [{"question_id": "q-7", "question": "?", "aliases": aliases}])
        with pytest.raises(ValueError, match="q-7 has no list of accepted answers"):
            load("triviaqa_long", tmp_path)

    @pytest.mark.parametrize("question", [None, 3, ["?"]])
    def test_a_question_is_text(self, question: Any, tmp_path: Path) -> None:
        row = {"question_id": "q-7", "question": question, "aliases": ["a"]}
        write_jsonl(tmp_path / "triviaqa.jsonl", [{**row, "question": "?"}, row])
        with pytest.raises(ValueError, match=r"triviaqa\.jsonl: line 2 has .* as question, which must be text"):
            load("triviaqa_long", tmp_path)

    def test_another_selection_is_noticed(
        self, tmp_path: Path, data_dir: Path, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        utils = module_of("triviaqa_long")
        monkeypatch.setattr(utils, "_FOLDER", tmp_path)
        utils.main(["--write-ids", "--data_dir", str(data_dir)])
        written = json.loads((tmp_path / "ids_local_dpr_dev.json").read_text())
        assert written["questions"] == 1000 and written["examples"] == [f"shot-{i}" for i in range(1, 9)]
        utils._load.cache_clear()
        load("triviaqa_long", data_dir)
        assert records == []

        written["ids_sha256"] = "0" * 64
        (tmp_path / "ids_local_dpr_dev.json").write_text(json.dumps(written))
        utils._load.cache_clear()
        load("triviaqa_long", data_dir)
        (record,) = records
        assert record.levelno == logging.WARNING
        assert "ids_local_dpr_dev.json (different: ids_sha256)" in record.getMessage()

    def test_hub(self, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The main answer is the marked one, a question listed twice counts once, train gives the examples."""

        def row(key: str, value: str, aliases: list[str]) -> dict[str, Any]:
            answer = {"value": value, "aliases": aliases, "normalized_aliases": [], "type": "WikipediaEntity"}
            return {"question_id": key, "question": f"What is {key}?", "question_source": "none", "answer": answer}

        validation = [row(f"tc_{i:04d}", "three words each", ["Yes", "three words each"]) for i in range(1005)]
        twice = [row("tc_9999", "the very longest main answer", ["short"])] * 2
        train = [row(key, f"main {key}", ["other"]) for key in ("t3", "t1", "t1", *"abcdefgh")]
        hub = {"train": train, "validation": [*validation, *twice]}
        asked = []

        def load_dataset(*names: str, **_: Any) -> dict[str, datasets.Dataset]:
            asked.append(names)
            return {split: datasets.Dataset.from_list(rows) for split, rows in hub.items()}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        utils = module_of("triviaqa_long")
        monkeypatch.setattr(utils, "_FOLDER", tmp_path)
        utils._load.cache_clear()
        task = load("triviaqa_long")
        load("triviaqa_long")
        utils._load.cache_clear()
        assert asked == [("mandarjoshi/trivia_qa", "rc.nocontext")]
        assert task.dataset["validation"]["question_id"] == [*(f"tc_{i:04d}" for i in range(999)), "tc_9999"]
        assert task.eval_docs[-1]["aliases"] == ["the very longest main answer", "short"]
        assert task.eval_docs[0]["aliases"] == ["three words each", "Yes"]
        assert task.dataset["train"]["question_id"] == ["t3", "t1", *"abcdef"]
        assert prompt(task) == (
            "Question: What is t3?\nAnswer: main t3\n\nQuestion: What is t1?\nAnswer: main t1\n\n"
            "Question: What is tc_0000?\nAnswer:"
        )
        (record,) = records
        assert record.levelno == logging.INFO
        assert "no ids_hub.json to compare" in record.getMessage()

    def test_no_ids_of_the_hub_are_made_up(self) -> None:
        """The record of the local file is there; that of the Hub only once somebody with a network has written it."""
        folder = tasks_dir() / "triviaqa_long"
        for file in folder.glob("ids_*.json"):
            record = json.loads(file.read_text())
            assert record["questions"] == 1000 and len(record["examples"]) == 8
        assert (folder / "ids_local_dpr_dev.json").is_file()
