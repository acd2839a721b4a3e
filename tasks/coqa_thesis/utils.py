"""Data and metric of the ``coqa_thesis`` task: those of ``coqa_exit``, with equal references merged."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

_EXIT = Path(__file__).resolve().parent.parent / "coqa_exit" / "utils.py"
_SPEC = importlib.util.spec_from_file_location("_coqa_exit", _EXIT)
assert _SPEC and _SPEC.loader
coqa_exit = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(coqa_exit)

TASK = "coqa_thesis"
doc_to_text = coqa_exit.doc_to_text


def load(data_dir: Any = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the split ``validation``, one row for each conversation, as ``coqa_exit`` does."""
    return dict(_load(coqa_exit.local_data.find(TASK, coqa_exit.PATTERN, data_dir)))


@functools.cache
def _load(file: Any) -> dict[str, datasets.Dataset]:
    """Read once per process: the harness asks several times."""
    return {name: split.map(_merged) for name, split in coqa_exit.read(file).items()}


def _merged(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """References that differ in more than case, the first of each kept, as the harness's ``coqa`` does."""
    found: dict[str, str] = {}
    for reference in row["references"]:
        found.setdefault(reference.lower(), reference)
    return {"references": list(found.values())}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the first line of the answer."""
    found: dict[str, float] = coqa_exit.process_results(doc, results)
    return found
