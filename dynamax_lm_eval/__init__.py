"""Early-exit language models in lm-evaluation-harness.

torch imports this package while it is itself being imported (see ``_autoload``), so this file
knows the standard library only; the model class is fetched when somebody asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

__all__ = ["DynamaxLM", "__version__", "tasks_dir"]


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


def __getattr__(name: str) -> Any:
    if name == "DynamaxLM":
        from dynamax_lm_eval.lm import DynamaxLM

        return DynamaxLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
