"""Data of the ``triviaqa_long`` task: the 1000 TriviaQA questions with the longest main answers.

Run as a program, it writes the fingerprint of the selection, which every later load is compared with::

    python tasks/triviaqa_long/utils.py --write-ids                    # of the Hub's data
    python tasks/triviaqa_long/utils.py --write-ids --data_dir FOLDER  # of a local file
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

# A child of the harness's logger, so its messages appear where the harness's own do.
logger = logging.getLogger("lm_eval.tasks.triviaqa_long")

_FOLDER = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("_local_data", _FOLDER.parent / "_local_data.py")
assert _SPEC and _SPEC.loader
local_data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local_data)

TASK = "triviaqa_long"
PATTERN = "triviaqa*.jsonl*"
HUB = ("mandarjoshi/trivia_qa", "rc.nocontext")
HUB_SPLITS = ("validation", "train")

#: Evaluated questions, and the examples kept for prompts (the first two by default).
QUESTIONS = 1000
SHOTS = 8

COLUMNS = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "aliases": [datasets.Value("string")],
    }
)


class Selection(NamedTuple):
    """Rows with the columns of both splits: ``question_id``, ``question``, ``answer`` (main), ``aliases`` (all)."""

    evaluated: list[dict[str, Any]]
    shots: list[dict[str, Any]]


def load(data_dir: Any = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the splits ``validation`` and ``train`` (the examples).

    Args:
        data_dir: folder of a local file; without it the data come from the Hub.
        kwargs: the run's other model arguments and metadata, which this task does not need.
    """
    return dict(_load(local_data.find(TASK, PATTERN, data_dir)))


@functools.cache
def _load(file: Any) -> dict[str, datasets.Dataset]:
    """Select once per process: the harness asks several times."""
    selection = _select(file)
    _compare(selection, _ids_file(file))
    return {
        "validation": datasets.Dataset.from_list(selection.evaluated, features=COLUMNS),
        "train": datasets.Dataset.from_list(selection.shots, features=COLUMNS),
    }


def _select(file: Any) -> Selection:
    return _select_hub() if file is None else _select_local(file.path)


def _select_hub() -> Selection:
    """The longest main answers of the validation split; the examples are the first questions of the training split."""
    hub = datasets.load_dataset(*HUB)
    # Only these columns: a row also has empty places for documents.
    validation, train = (hub[split].select_columns(["question_id", "question", "answer"]) for split in HUB_SPLITS)
    evaluated, _ = _longest(_hub_row(row) for row in validation)
    shots: dict[str, dict[str, Any]] = {}
    taken = {row["question_id"] for row in evaluated}
    for row in train:
        if row["question_id"] not in taken:
            shots.setdefault(row["question_id"], _hub_row(row))
        if len(shots) == SHOTS:
            break
    return Selection(evaluated, list(shots.values()))


def _hub_row(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["answer"]
    return _row(row["question_id"], row["question"], answer["value"], answer["aliases"])


def _select_local(path: Path) -> Selection:
    """A local file marks no main answer, so the shortest alias stands for it.

    The examples are the next questions of the ranking with a single accepted answer: that one is the main
    answer beyond doubt, and it is as long as an answer can be without being evaluated.
    """
    rows = local_rows(path)
    evaluated, rest = _longest(rows)
    shots = [row for row in rest if len(row["aliases"]) == 1][:SHOTS]
    if len(shots) < SHOTS:
        raise ValueError(
            f"{path}: {len(rows)} questions are too few; {TASK} needs {QUESTIONS} to evaluate and "
            f"{SHOTS} others with a single accepted answer as examples"
        )
    return Selection(evaluated, shots)


def local_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a local file, as rows of this task."""
    columns = {"question_id": object, "question": str, "aliases": object}
    rows: list[dict[str, Any]] = local_data.read_jsonl(path, columns, _local_row)
    return rows


def _local_row(row: dict[str, Any]) -> dict[str, Any]:
    aliases = row["aliases"] if isinstance(row["aliases"], list) else []
    accepted = [alias.strip() for alias in aliases if isinstance(alias, str) and alias.strip()]
    if not accepted:
        raise ValueError(f"cannot be used: question {row['question_id']} has no list of accepted answers (aliases)")
    shortest = min(accepted, key=lambda alias: (*_size(alias), alias))
    return _row(str(row["question_id"]), row["question"], shortest, accepted)


def _row(question_id: str, question: str, answer: str, aliases: Iterable[str]) -> dict[str, Any]:
    """A row of this task, the main answer first among the aliases."""
    accepted = [text for text in dict.fromkeys(alias.strip() for alias in (answer, *aliases)) if text]
    return {"question_id": question_id, "question": question.strip(), "answer": answer.strip(), "aliases": accepted}


def _size(answer: str) -> tuple[int, int]:
    return len(answer.split()), len(answer)


def _longest(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into the ``QUESTIONS`` with the longest main answers, in the order of ids, and the rest, ranked.

    Most words first, then most characters, then the smallest id. The Hub lists a question twice if it has both
    web and Wikipedia documents; here it counts once.
    """
    unique: dict[str, dict[str, Any]] = {}
    for row in rows:
        unique.setdefault(row["question_id"], row)

    def rank(row: dict[str, Any]) -> tuple[int, int, str]:
        words, characters = _size(row["answer"])
        return -words, -characters, row["question_id"]

    ranked = sorted(unique.values(), key=rank)
    evaluated, rest = ranked[:QUESTIONS], ranked[QUESTIONS:]
    # In the order of ids, so that --limit does not take the longest answers only.
    return sorted(evaluated, key=lambda row: row["question_id"]), rest


def _ids_file(file: Any) -> Path:
    return _FOLDER / ("ids_hub.json" if file is None else "ids_local_dpr_dev.json")


def fingerprint(selection: Selection) -> dict[str, Any]:
    """Number and hash of the evaluated ids (one a line, in order), the examples' ids, a hash of all rows' content."""
    ids = [row["question_id"] for row in selection.evaluated]
    return {
        "questions": len(ids),
        "ids_sha256": _sha256("\n".join(ids)),
        "examples": [row["question_id"] for row in selection.shots],
        "rows_sha256": _sha256(json.dumps(selection, sort_keys=True)),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _compare(selection: Selection, recorded: Path) -> None:
    """Warn if the selection is not the one on record: its scores cannot be compared with others'."""
    if not recorded.is_file():
        logger.info(
            "%s: no %s to compare the selected questions with; see the task's README to write it", TASK, recorded.name
        )
        return
    try:
        expected: dict[str, Any] = dict(json.loads(recorded.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{recorded}: {error}") from error
    found = fingerprint(selection)
    changed = [key for key, value in found.items() if expected.get(key) != value]
    if changed:
        logger.warning(
            "%s: the selected questions are not those on record in %s (different: %s); the data are another "
            "revision or another file, and scores cannot be compared with those of the recorded selection",
            TASK,
            recorded.name,
            ", ".join(changed),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the fingerprint of the current selection."""
    parser = argparse.ArgumentParser(description="Write down which questions triviaqa_long selects.")
    parser.add_argument("--write-ids", action="store_true", required=True)
    parser.add_argument("--data_dir", help="folder of a local file; default: the Hub's data")
    options = parser.parse_args(arguments)
    file = local_data.find(TASK, PATTERN, options.data_dir)
    recorded = _ids_file(file)
    recorded.write_text(json.dumps(fingerprint(_select(file)), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{recorded}\n")


if __name__ == "__main__":
    main()
