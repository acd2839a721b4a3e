"""The tasks of the harness with those of the package."""

from __future__ import annotations

import functools
import json

from lm_eval.tasks import TaskManager

import dynamax_lm_eval


@functools.cache
def task_manager(include_path: str | None, metadata: str) -> TaskManager:
    """Makes the manager of tasks, once: it reads the files of all the harness's tasks."""
    paths = [str(dynamax_lm_eval.tasks_dir()), *([include_path] if include_path else [])]
    return TaskManager(include_path=paths, metadata=json.loads(metadata))
