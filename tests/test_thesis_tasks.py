"""The tasks as the authors' code ran them, on small made-up files and against the harness's own tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers_tasks import HARNESS, SPIDER, STORY, coqa_row, load, prompt, write_csv, write_jsonl
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from test_paper_tasks import Parrot

from dynamax_lm_eval import tasks_dir

NAMES = ("triviaqa_thesis", "coqa_thesis", "truthfulqa_gen_thesis")
STOCK = {"triviaqa_thesis": "triviaqa/default.yaml", "truthfulqa_gen_thesis": "truthfulqa/truthfulqa_gen.yaml"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose shortest aliases have 3000, 2999, ... characters, and such files for the other tasks."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question_id": f"q-{i:04d}", "question": f"Question {i}?", "aliases": ["b" * (3001 - i), "a" * (3000 - i)]}
        for i in range(2010)
    ]
    write_jsonl(folder / "triviaqa.jsonl", rows)
    one = coqa_row()
    write_jsonl(folder / "coqa.jsonl", [one, one | {"id": "invented-2"}])
    write_csv(folder / "truthfulqa.csv", [SPIDER, SPIDER | {"Question": "Second?"}, SPIDER | {"Question": "Third?"}])
    return folder


def test_the_group(data_dir: Path) -> None:
    metadata = {"data_dir": str(data_dir)}
    loaded = TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata).load(
        ["dynamax_thesis"]
    )
    assert tuple(loaded["tasks"]) == NAMES
    assert loaded["group_map"] == {"dynamax_thesis": list(NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_offline(name: str, data_dir: Path) -> None:
    task = load(name, data_dir)
    assert task.config.generation_kwargs["max_gen_toks"] == 64 and task.config.generation_kwargs["do_sample"] is False
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(Parrot(), tasks=[task], task_manager=manager, limit=2, bootstrap_iters=0)
    metrics = {key.split(",")[0] for key in results["results"][name] if "," in key and "stderr" not in key}
    assert metrics == set(task.higher_is_better())


def test_ranks_by_characters_of_the_first_alias(data_dir: Path) -> None:
    task = load("triviaqa_thesis", data_dir)
    assert [doc["question_id"] for doc in task.eval_docs] == [f"q-{i:04d}" for i in range(1000, 2000)]
    assert {doc["question_id"] for doc in task.dataset["train"]} == {f"q-{i:04d}" for i in range(2000, 2010)}


def test_too_few_questions(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "triviaqa.jsonl", [{"question_id": "1", "question": "Which?", "aliases": ["a"]}])
    with pytest.raises(ValueError, match="1 questions are too few; triviaqa_thesis needs more than 2000"):
        load("triviaqa_thesis", tmp_path)


@pytest.mark.parametrize("name", STOCK)
def test_prompts_are_those_of_the_harness(name: str, data_dir: Path) -> None:
    stock, task = load_yaml(HARNESS / STOCK[name]), load(name, data_dir)
    doc = task.eval_docs[0]
    assert prompt(task, num_fewshot=0).strip() == apply_template(stock["doc_to_text"], doc)
    until = stock.get("generation_kwargs", {}).get("until", ["\n\n"])
    assert task.config.generation_kwargs["until"] == until


def test_the_example_of_truthfulqa_has_no_answer(data_dir: Path) -> None:
    task = load("truthfulqa_gen_thesis", data_dir)
    example, _, question = prompt(task).rpartition("\n\nQ: What is human life expectancy in the United States?")
    assert example.rstrip(" ").endswith("?") and "A: " in example
    assert question.endswith(str(task.eval_docs[0]["question"]))
    assert example.count("Q: ") == 7


def test_equal_references_of_coqa_count_once(tmp_path: Path) -> None:
    row: dict[str, Any] = coqa_row()
    for turns, answer in zip(row["additional_answers"].values(), ("A Fence", "a fence", "a gate"), strict=True):
        turns[-1]["input_text"] = answer
    write_jsonl(tmp_path / "coqa.jsonl", [row])
    task = load("coqa_thesis", tmp_path)
    assert task.eval_docs[0]["references"] == ["a fence", "a gate"]
    assert prompt(task).startswith(STORY)
    assert load("coqa_exit", tmp_path).eval_docs[0]["references"] == ["a fence", "A Fence", "a fence", "a gate"]
    assert task.process_results(task.eval_docs[0], [" a fence"]) == {"em": 0.5, "f1": 0.5}
