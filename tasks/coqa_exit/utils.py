"""Data, prompt and metric of the ``coqa_exit`` task.

The metric is CoQA's official one, written from its definition: the harness's own ``coqa`` task takes it
from a module that transformers 5 no longer has.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

_SPEC = importlib.util.spec_from_file_location("_local_data", Path(__file__).resolve().parent.parent / "_local_data.py")
assert _SPEC and _SPEC.loader
local_data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local_data)

TASK = "coqa_exit"
PATTERN = "coqa*.jsonl*"
HUB = "EleutherAI/coqa"

_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "story": datasets.Value("string"),
        "questions": [datasets.Value("string")],
        "answers": [datasets.Value("string")],
        "references": [datasets.Value("string")],
    }
)

#: Columns of a local file.
_GIVEN = {"id": str, "source": str, "story": str, "questions": list, "answers": list, "additional_answers": dict}

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def load(data_dir: Any = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the split ``validation``, one row for each conversation.

    Args:
        data_dir: folder of a local file; without it the data come from the Hub.
        kwargs: the run's other model arguments and metadata, which this task does not need.
    """
    return dict(read(local_data.find(TASK, PATTERN, data_dir)))


@functools.cache
def read(file: Any) -> dict[str, datasets.Dataset]:
    """Read once per process: the harness asks several times."""
    if file is None:
        rows = [_row(conversation) for conversation in datasets.load_dataset(HUB, split="validation")]
    else:
        rows = local_data.read_jsonl(file.path, _GIVEN, _row)
    return {"validation": datasets.Dataset.from_list(rows, features=_COLUMNS)}


def _row(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """A row of this task: the turns' texts, and every annotator's answer to the last question."""
    questions, answers = _texts(conversation["questions"]), _texts(conversation["answers"])
    others = [texts for turns in conversation["additional_answers"].values() if (texts := _texts(turns))]
    if not questions or any(len(texts) != len(questions) for texts in (answers, *others)):
        raise ValueError(f"cannot be used: conversation {conversation['id']} has not one answer to each question")
    return {
        **{column: conversation[column] for column in ("id", "source", "story")},
        "questions": questions,
        "answers": answers,
        "references": [texts[-1] for texts in (answers, *others)],
    }


def _texts(turns: Any) -> list[str]:
    """The texts of turns, given as a list of objects (CoQA's files) or an object of lists (the Hub)."""
    if isinstance(turns, Mapping):
        return list(turns["input_text"])
    return [turn["input_text"] for turn in turns or ()]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The story, all turns but the last with their answers, and the last question: the harness's ``coqa`` prompt."""
    *earlier, last = doc["questions"]
    turns = "".join(
        f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(earlier, doc["answers"][:-1], strict=True)
    )
    return f"{doc['story']}\n\n{turns}Q: {last}\n\nA:"


def normalize(text: str) -> str:
    """Lower-case, without ASCII punctuation, without articles, with single spaces: in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(reference: str, prediction: str) -> float:
    """1 if both normalise to the same text, else 0."""
    return float(normalize(reference) == normalize(prediction))


def f1(reference: str, prediction: str) -> float:
    """Harmonic mean of the shares of words in common; with no word on either side, whether both are empty."""
    expected, found = normalize(reference).split(), normalize(prediction).split()
    if not expected or not found:
        return float(expected == found)
    common = (Counter(expected) & Counter(found)).total()
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def scores(references: Sequence[str], prediction: str) -> dict[str, float]:
    """EM and F1, leave-one-out: leave out each reference in turn, take the best of the others, and average.

    This puts a model on the scale of people, each of whom is scored against the others. A single reference
    is not left out. Equal references count separately, as in the official script.
    """
    sums = {"em": 0.0, "f1": 0.0}
    for left_out in range(len(references)):
        others = [*references[:left_out], *references[left_out + 1 :]] or references
        sums["em"] += max(exact(reference, prediction) for reference in others)
        sums["f1"] += max(f1(reference, prediction) for reference in others)
    return {name: value / len(references) for name, value in sums.items()}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the first line of the answer."""
    return scores(doc["references"], results[0].strip().split("\n")[0])
