"""Prompt of the ``truthfulqa_gen_thesis`` task: that of the harness's ``truthfulqa_gen``. Data and scores are those of
``truthfulqa_gen_1shot``."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from jinja2 import Template
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.truthfulqa import utils as harness

_ONE_SHOT = Path(__file__).resolve().parent.parent / "truthfulqa_gen_1shot" / "utils.py"
_SPEC = importlib.util.spec_from_file_location("_truthfulqa_gen_1shot", _ONE_SHOT)
assert _SPEC and _SPEC.loader
one_shot = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(one_shot)

TASK = "truthfulqa_gen_thesis"
process_results_gen = one_shot.process_results_gen


def load(data_dir: Any = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the split ``validation``, as ``truthfulqa_gen_1shot`` does."""
    return dict(one_shot.read(one_shot.local_data.find(TASK, one_shot.PATTERN, data_dir)))


@functools.cache
def _template() -> str:
    """The template of the harness's task: six questions with answers, then the question."""
    template: str = load_yaml(Path(harness.__file__).parent / "truthfulqa_gen.yaml")["doc_to_text"]
    return template


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The prompt of a question."""
    return Template(_template(), keep_trailing_newline=True).render(**doc)
