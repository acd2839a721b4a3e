"""Early-exit language models in lm-evaluation-harness.

torch imports this package while it is itself being imported (see ``_autoload``), so this file
knows the standard library only; the model class is fetched when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from dynamax_lm_eval.lm import DynamaxLM

__all__ = ["DynamaxLM", "__version__", "task_manager", "tasks_dir"]


def tasks_dir() -> Path:
    """Folder of the task YAMLs: inside the installed package, or beside it in a source checkout.

    Raises:
        FileNotFoundError: the installation carries no tasks.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no tasks folder in {package} nor beside it; reinstall dynamax-lm-eval")


def task_manager(tasks: Sequence[str] = (), include_path: str | None = None) -> TaskManager:
    """Returns the harness's manager of tasks with those of this package, for ``simple_evaluate(task_manager=...)``.

    Args:
        tasks: those that will be asked for; where all are this package's or in ``include_path``, the harness's own are
            not read, which takes seconds. Empty: any.
        include_path: a folder with tasks of your own.
    """
    from dynamax_lm_eval.harness.tasks import task_manager

    return task_manager(include_path, "{}", tuple(tasks))


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})


def __getattr__(name: str) -> Any:
    if name == "DynamaxLM":
        from dynamax_lm_eval.lm import DynamaxLM

        return DynamaxLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
