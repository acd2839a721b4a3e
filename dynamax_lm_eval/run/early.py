"""What takes the harness seconds before it begins is done first, or not at all: no torch, no index of its own tasks."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval

import dynamax_lm_eval
from dynamax_lm_eval import config
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models import aliases

#: What the harness's error begins with.
_NOT_FOUND = "Tasks not found: "


def check_arguments(given: Mapping[str, Any]) -> None:
    """Checks model arguments as far as that goes without torch; loading checks them again, and the rest.

    Raises:
        UserError: a name or a value is wrong, or the backbone is a folder that cannot be.
    """
    names = harness_arguments()
    if names is None:
        return
    args, passed_on = config.parse_model_args(given, names)
    if args.backbone != aliases.SMOLLM2_GGUF:  # which would be unpacked now
        aliases.resolve_backbone(args.backbone, passed_on.get("subfolder") or "")


def harness_arguments() -> frozenset[str] | None:
    """Returns the names that ``HFLM`` takes, from its source, because importing it takes seconds; None: not to be had.

    The same as ``harness.hflm.harness_arguments``.
    """
    source = Path(lm_eval.__file__).parent / "models" / "huggingface.py"
    try:
        module = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeError):
        return None
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "HFLM":
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    every = (*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs)
                    return frozenset(argument.arg for argument in every) - {"self"}
    return None


def _own(folders: str | Sequence[str]) -> list[str]:
    """Returns the folders of tasks that are the user's."""
    given = [folders] if isinstance(folders, str) else folders
    return [folder for folder in given if Path(folder) != dynamax_lm_eval.tasks_dir()]


@contextmanager
def indexing(names: Sequence[str]) -> Iterator[None]:
    """Makes managers of tasks that lack the harness's own ones, where none of the tasks ``names`` needs these.

    Raises:
        UserError: in place of the harness's error where there is no such task.
    """
    # It imports the harness's parts, which are not needed where the arguments are wrong.
    import lm_eval.tasks

    from dynamax_lm_eval.harness import tasks

    original = lm_eval.tasks.TaskManager
    made: list[tuple[Any, Any]] = []

    def make(**options: Any) -> Any:
        manager = tasks.smallest_manager(original, names, **options)
        made.append((manager, options.get("include_path") or []))
        return manager

    lm_eval.tasks.TaskManager = make
    try:
        yield
    except ValueError as error:
        beginning, _, unknown = str(error).partition(_NOT_FOUND)
        if beginning or not unknown or not made:
            raise
        manager, folders = made[-1]
        raise UserError(f"--tasks: {tasks.not_found(unknown.split(', '), manager.all_tasks, _own(folders))}") from error
    finally:
        lm_eval.tasks.TaskManager = original
