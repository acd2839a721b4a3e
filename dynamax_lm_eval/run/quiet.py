"""What the harness logs in every run and nobody needs is left out: what :mod:`describe` says in one line, or the bar.

Everything is there with ``--debug``, and where the harness logs at the level DEBUG (``LMEVAL_LOG_LEVEL=DEBUG``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_HARNESS = "lm_eval"
#: Where transformers logs which kernels it finds.
_KERNELS = "transformers.integrations.hub_kernels"
#: What useless messages begin with.
_BEGINNINGS = (
    "Building contexts for",
    "Cuda Available?",
    "Device not specified",
    "Evaluating examples for tasks",
    "Group: ",
    "Including path:",
    "Initializing ",
    "Model parallel was set to False",
    "Output path not provided",
    "Running ",
    "Selected Tasks:",
    "Selected tasks:",
    "Setting random seed",
    "Subgroup: ",
    "Task: ",
    "Using device ",
    "Using pre-initialized model",
)
#: What --write_out asks for.
_WRITTEN_OUT = "; context prompt ("
#: What they hold: tasks take --metadata whether or not they use it; result files have the other two.
_PARTS = ("Custom kwargs can be passed to", ": Evaluating on ", ": Using gen_kwargs: ")


class Quiet(logging.Filter):
    """Passes what is worth a line."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        """``is_wanted``: says whether everything is."""
        super().__init__()
        self._is_wanted = is_wanted

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] != _HARNESS or self._is_wanted():
            return True
        if logging.getLogger(_HARNESS).getEffectiveLevel() <= logging.DEBUG:
            return True
        message = record.getMessage().strip()
        if _WRITTEN_OUT in message:
            return True
        return not message.startswith(_BEGINNINGS) and not any(part in message for part in _PARTS)


def _is_no_fallback(record: logging.LogRecord) -> bool:
    """Says whether a message of transformers is worth a line: our own scans run where kernels are not installed."""
    return "is falling back to its reference" not in record.getMessage()


def _wrap_emit(handler: logging.StreamHandler[Any]) -> None:
    original = handler.emit

    def emit(record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=handler.stream):
            original(record)

    handler._dynamax_emit = original  # type: ignore[attr-defined]
    handler.emit = emit  # type: ignore[method-assign]


def install(logger: logging.Logger, is_wanted: Callable[[], bool]) -> None:
    """Puts the filter where a logger writes its messages, in place of an earlier one; bars stay apart from them.

    Args:
        logger: the harness's, or the root where that has no handlers of its own.
        is_wanted: says whether everything is.
    """
    if not is_wanted():
        logging.getLogger(_KERNELS).addFilter(_is_no_fallback)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not hasattr(handler, "_dynamax_emit"):
            _wrap_emit(handler)
        for earlier in [found for found in handler.filters if isinstance(found, Quiet)]:
            handler.removeFilter(earlier)
        handler.addFilter(Quiet(is_wanted))
