"""The tasks of the harness with those of the package; without the former, whose index takes seconds, where possible."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
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


class _Reader(yaml.SafeLoader):
    """Reads the YAML file of a task without the functions that it names."""


_Reader.add_multi_constructor("!", lambda *_: None)


def not_found(names: Sequence[str], known: Collection[str], folders: Sequence[str | Path]) -> str:
    """Returns the error message for tasks that there are not.

    The harness passes over files that it cannot read; here they are named, with the reason.

    Args:
        names: of the tasks.
        known: of those that there are.
        folders: of tasks that the user named.
    """
    for path in sorted(found for folder in folders for found in Path(folder).expanduser().glob("**/*.yaml")):
        if (reason := _unreadable(path, names)) is not None:
            return reason
    name = names[0]
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    parts = [f"did you mean {' or '.join(map(repr, nearest))}?"] if nearest else []
    parts.append("`dynamax-lm-eval tasks` and `lm_eval ls tasks` list the tasks; --include_path FOLDER adds your own")
    return f"there is no task {', '.join(names)}; {' '.join(parts)}"


def _unreadable(path: Path, names: Sequence[str]) -> str | None:
    """Returns why the harness does not know the task of a file; None where it is no file of these tasks, or is read."""
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)
    except (OSError, UnicodeError) as error:
        return f"{path} cannot be read: {error}" if path.stem in names else None
    except yaml.YAMLError as error:
        return f"{path} is no YAML file: {error}" if path.stem in names else None
    if not isinstance(config, dict) or not any(
        found in names for found in (config.get("task"), config.get("group"), path.stem)
    ):
        return None
    includes = config.get("include") or ()
    for include in [includes] if isinstance(includes, str) else includes:
        place = path.parent / str(include)
        if not place.is_file():
            return (
                f"{path} says include: {include}, which is looked for beside that file, and there is no {place}; write "
                "its whole path (`dynamax-lm-eval tasks` shows the folder of the package's tasks)"
            )
    return None


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
