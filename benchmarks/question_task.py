"""A two-shot question-answering task over a local JSON Lines file, shared by the benchmarks.

Each line holds ``question`` and ``aliases`` (all accepted answers), as in TriviaQA files.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

import dynamax_lm_eval

NAME = "local_questions"


def read_questions(path: Path, limit: int, longest_answers: bool) -> list[dict[str, Any]]:
    """The first ``limit`` questions of a file; with ``longest_answers`` those whose shortest alias is longest."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if longest_answers:
        rows.sort(key=lambda row: (-min(len(alias.split()) for alias in row["aliases"]), row["question"]))
    return [
        {"question": row["question"], "aliases": row["aliases"], "answer": row["aliases"][0]} for row in rows[:limit]
    ]


def read_shots() -> list[dict[str, Any]]:
    """The two shots of ``trivia_demo``."""
    file = dynamax_lm_eval.tasks_dir() / "trivia_demo" / "fewshot.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:2]]


def question_task(path: Path, limit: int, max_gen_toks: int, longest_answers: bool = False) -> dict[str, Any]:
    """A task configuration for ``simple_evaluate``; the two shots are those of ``trivia_demo``."""
    questions = read_questions(path, limit, longest_answers)
    shots = read_shots()

    def load(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(questions), "fewshot": Dataset.from_list(shots)}

    return {
        "task": NAME,
        "custom_dataset": load,
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "fewshot",
        "num_fewshot": 2,
        "fewshot_config": {"sampler": "first_n", "doc_to_target": "answer"},
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "aliases",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": max_gen_toks},
        # The harness's default filter is called "none" and strips nothing; answers start with a space.
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    }
