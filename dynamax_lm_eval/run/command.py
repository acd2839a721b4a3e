"""``dynamax-lm-eval run``: the harness's own command, with our model, our tasks, and nothing that takes needless time.

What the user wrote is checked before the harness reads its tasks. Knows the harness's command; knows no engine.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging, simple_parse_args_string

import dynamax_lm_eval
from dynamax_lm_eval import _autoload
from dynamax_lm_eval.errors import UserError, unknown_name
from dynamax_lm_eval.files import check_output_path
from dynamax_lm_eval.run import early, help_text, quiet

#: Options of the harness that become model arguments.
_MODEL_OPTIONS = ("batch_size", "max_batch_size", "device")


def run(arguments: list[str], debug: bool) -> None:
    """Evaluates as ``lm_eval run`` does with these arguments.

    Raises:
        UserError: an option or a model argument is wrong; before anything is loaded where that can be seen.
    """
    before, sys.argv = sys.argv, ["dynamax-lm-eval", "run", *arguments]
    try:
        harness = HarnessCLI()
        help_text.adapt(harness._parser, harness._subparsers.choices["run"])
        options = harness.parse_args()
        # The bridge does this where torch's autoload is on; here it must work without.
        _autoload.register()
        setup_logging(logging.DEBUG if debug else logging.INFO)
        quiet.install(logging.getLogger("lm_eval"), is_wanted=lambda: debug)
        _merge_file(options)
        if not getattr(options, "model", None):
            options.model = _autoload.MODEL_NAME
        if options.model == _autoload.MODEL_NAME:
            early.check_arguments(_model_arguments(options))
        if getattr(options, "output_path", None):
            check_output_path(options.output_path)
        _check_samples(getattr(options, "samples", None))
        _add_our_tasks(options)
        with early.indexing(_task_names(options)):
            harness.execute(options)
    finally:
        sys.argv = before


def _merge_file(options: Namespace) -> None:
    """Takes the options of ``--config`` over where the command line has none, as the harness does, which prints them.

    Model arguments are taken over one by one.

    Raises:
        UserError: it holds something that is no option.
        ValueError, TypeError, OSError: of the harness, where there is no such file, or it does not hold options.
    """
    if not getattr(options, "config", None):
        return
    known = [item.name for item in fields(EvaluatorConfig)]
    for name, value in EvaluatorConfig.load_yaml_config(options.config).items():
        if name not in known:
            raise UserError(
                f"--config {options.config}: {unknown_name('option', str(name), known, 'there are', known)}"
            )
        given = getattr(options, name, None)
        if name == "model_args" and given and value:
            options.model_args = {**_pairs(value), **_pairs(given)}
        elif not (given or given == 0):
            setattr(options, name, value)
    options.config = None


def _model_arguments(options: Namespace) -> dict[str, Any]:
    """Returns the arguments with which the harness will make the model."""
    given = _pairs(getattr(options, "model_args", None) or {})
    values = {name: getattr(options, name, None) for name in _MODEL_OPTIONS}
    return {**{name: value for name, value in values.items() if value is not None}, **given}


def _pairs(given: Any) -> Mapping[str, Any]:
    """Returns model arguments by name."""
    given = simple_parse_args_string(given) if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise UserError(f"--model_args must be name=value pairs separated by commas, got {given!r}")
    return given


def _check_samples(given: Any) -> None:
    """Raises UserError where ``--samples`` is neither JSON nor a file; the harness would load the model first."""
    if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
        raise UserError(f'--samples must be a file, or JSON like {{"task": [0, 7]}}, got {given!r}')


def _add_our_tasks(options: Namespace) -> None:
    """Lets the harness find the package's tasks, before those in folders of the user."""
    theirs = getattr(options, "include_path", None) or []
    theirs = [theirs] if isinstance(theirs, str) else [str(path) for path in theirs]
    own = dynamax_lm_eval.tasks_dir()
    options.include_path = [str(own), *(path for path in theirs if Path(path).resolve() != own)]


def _task_names(options: Namespace) -> list[str]:
    """Returns the tasks that are asked for, as the harness splits them."""
    given = getattr(options, "tasks", None) or []
    parts = [given] if isinstance(given, str) else given
    return [name for part in parts for name in str(part).split(",")]
