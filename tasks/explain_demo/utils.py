"""Data and score of the ``explain_demo`` task.

The questions are a JSON Lines file next to this module, so the task works offline, from any working directory and from
an installed package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

_FOLDER = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("_local_data", _FOLDER.parent / "_local_data.py")
assert _SPEC and _SPEC.loader
local_data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local_data)

_COLUMNS = {"question_id": str, "question": str, "answer": str, "key_terms": list, "topic": str}


def load(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the split ``test``; model arguments and metadata, which the harness passes, are not needed."""
    return {"test": datasets.Dataset.from_list(local_data.read_jsonl(_FOLDER / "questions.jsonl", _COLUMNS))}


def key_terms(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the share of a question's key terms that the answer mentions, each by any one of its spellings."""
    answer = results[0].lower()
    return {"key_terms": sum(any(word in answer for word in term) for term in doc["key_terms"]) / len(doc["key_terms"])}
