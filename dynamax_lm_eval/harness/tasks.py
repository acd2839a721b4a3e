"""The tasks of the harness with those of the package; without the former, whose index takes seconds, where possible."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.tasks import TaskManager

import dynamax_lm_eval


@functools.cache
def task_manager(include_path: str | None, metadata: str, names: tuple[str, ...] = ()) -> TaskManager:
    """Makes the manager of tasks, once.

    Args:
        include_path: a folder with further tasks.
        metadata: for tasks that take some, as JSON.
        names: the tasks that will be asked for; empty: any, so that the files of all the harness's tasks are read.
    """
    paths = [str(dynamax_lm_eval.tasks_dir()), *([include_path] if include_path else [])]
    return smallest_manager(TaskManager, names, include_path=paths, metadata=json.loads(metadata))


def smallest_manager(make: Callable[..., Any], names: Sequence[str], **options: Any) -> Any:
    """Returns a manager of the tasks of ``include_path`` alone where all ``names`` are among them, else of all tasks.

    Args:
        make: the harness's class.
        names: tasks, groups and tags that are asked for.
        options: of that class.
    """
    if names and "include_defaults" not in options:
        manager = make(**options, include_defaults=False)
        index = manager.task_index
        if all(_is_whole(name, index, frozenset()) for name in names):
            return manager
    return make(**options)


def _is_whole(name: Any, index: Any, above: frozenset[str]) -> bool:
    """Says whether a name, and all that it stands for, is in an index; what cannot be told is not."""
    entry = index.get(name) if isinstance(name, str) else None
    if entry is None or name in above:
        return False
    if entry.kind.name != "GROUP":  # the tasks of a tag are known by being in the index
        return True
    children = (entry.cfg or {}).get("task")
    named = [children] if isinstance(children, str) else children
    return isinstance(named, list) and all(_is_whole(child, index, above | {name}) for child in named)
