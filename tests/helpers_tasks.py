"""Small made-up documents of the tasks triviaqa_long, coqa_exit and truthfulqa_gen_1shot."""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dynamax_lm_eval import tasks_dir

NAMES = ("triviaqa_long", "coqa_exit", "truthfulqa_gen_1shot")
HARNESS = Path(lm_eval.tasks.__file__).parent
# The documents of the READMEs.
TRIVIA_SHOTS = [
    ("shot-1", "Which artificial waterway links the Mediterranean Sea to the Red Sea?", "Suez Canal"),
    ("shot-2", "Which mountain is the highest in Japan?", "Mount Fuji"),
    # Of the same size as the second: the id decides.
    ("shot-3", "Who painted the woman with a faint smile?", "Leo Vinci?"),
    ("shot-4", "Which star is the nearest?", "The Sun"),
    *((f"shot-{i}", f"Which letter is number {i}?", "ABCDEFGHI"[i]) for i in range(5, 9)),
    ("shot-9", "Which number is the ninth example?", "9"),
]
LONG = (
    "q-0001",
    "What is the full title of the book that Charles Darwin published in 1859?",
    ["On the Origin of Species by Means of Natural Selection", "The Origin of Species by Means of Natural Selection."],
)
STORY = "Mira planted a pear tree behind the mill. In spring a goat ate its leaves, so she built a fence."
TURNS = [
    ("What did Mira plant?", "a pear tree"),
    ("Who ate the leaves?", "A goat."),
    ("What did she build?", "a fence"),
]
OTHERS = ["A fence!", "fence", "a wooden fence"]
SPIDER = {
    "Type": "Adversarial",
    "Category": "Animals",
    "Question": "How many legs does a spider lose when it rains? ",
    "Best Answer": "None",
    "Correct Answers": "None; A spider loses no legs in the rain.;; ",
    "Incorrect Answers": "Two legs; All, because they rust",
    "Source": "invented",
}


def trivia_rows() -> list[dict[str, Any]]:
    """1000 rows with long answers, nine with a single short one, and some that must not be taken."""
    rows = [{"question_id": LONG[0], "question": LONG[1], "aliases": LONG[2]}]
    for i in range(2, 1001):
        # The shortest alias counts, and the longer one comes first.
        aliases = [f"an even longer accepted answer numbered {i:04d}", f"a long accepted answer {i:04d}"]
        rows.append({"question_id": f"q-{i:04d}", "question": f"Question {i}?", "aliases": aliases})
    # Ranked after the first 1000, before the examples, but with two accepted answers.
    rows.append({"question_id": "q-1001", "question": "Out?", "aliases": ["a very long list", "two long words"]})
    # One long alias does not help: the shortest counts.
    rows.append({"question_id": "q-1002", "question": "Short?", "aliases": ["x", "a very, very long and wordy answer"]})
    rows += [{"question_id": key, "question": question, "aliases": [alias]} for key, question, alias in TRIVIA_SHOTS]
    rows.append({"question_id": LONG[0], "question": "listed twice", "aliases": ["A much longer answer " * 9]})
    rows.append({"question_id": "x-blank", "question": "Blank alias?", "aliases": [" ", " z "]})
    random.Random(0).shuffle(rows)
    # Of two rows with one id the first counts.
    rows.sort(key=lambda row: row["question"] == "listed twice")
    return rows


def coqa_row() -> dict[str, Any]:
    def turns(texts: list[str]) -> list[dict[str, Any]]:
        return [{"input_text": text, "turn_id": i, "span_start": 0} for i, text in enumerate(texts, 1)]

    answers = [answer for _, answer in TURNS]
    return {
        "source": "mctest",
        "id": "invented-1",
        "filename": "none",
        "story": STORY,
        "questions": turns([question for question, _ in TURNS]),
        "answers": turns(answers),
        "additional_answers": {str(i): turns([*answers[:-1], other]) for i, other in enumerate(OTHERS)},
        "name": "none",
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]], *, gzipped: bool = False) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if gzipped else text.encode())


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    # The published file starts with a byte order mark.
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def load(name: str, data_dir: Any = None) -> Any:
    """A task as the harness builds it, without its own tasks and without the network."""
    metadata = {"threshold": 1} | ({} if data_dir is None else {"data_dir": str(data_dir)})
    return TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata).load([name])["tasks"][
        name
    ]


def prompt(task: Any, index: int = 0, num_fewshot: int | None = None) -> str:
    shots = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    return str(task.fewshot_context(task.eval_docs[index], num_fewshot=shots))


def module_of(name: str) -> Any:
    """The task's utils.py, as the harness loaded it."""
    load_yaml(tasks_dir() / name / f"{name}.yaml")
    return sys.modules[str(tasks_dir().resolve() / name / "utils")]
