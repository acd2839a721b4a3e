"""The command ``dynamax-lm-eval``: ``run`` is the harness with our model and tasks; the rest is our own.

A command is a row of a table: where its options are declared, what runs it, what its help says. Nothing is imported
before it is needed, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sqlite3
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

import dynamax_lm_eval
from dynamax_lm_eval import _autoload
from dynamax_lm_eval.command_line import Parser
from dynamax_lm_eval.errors import FaultError, UserError, unknown_name
from dynamax_lm_eval.run import quiet

_DESCRIPTION = "Evaluate early-exit language models with lm-evaluation-harness."
_EPILOG = """\
examples:
  dynamax-lm-eval run --model_args backbone=smollm2-gguf,threshold=0.7 --tasks explain_demo --batch_size 16
  dynamax-lm-eval run --model_args backbone=mistral,threshold=0.8 --tasks triviaqa --output_path out
  dynamax-lm-eval headroom --backbone smollm2-gguf --dataset texts.jsonl.gz --fit_adapters True
  dynamax-lm-eval train --backbone smollm2-gguf --classifier mamba,calm --dataset texts.jsonl.gz
  dynamax-lm-eval sweep --backbone smollm2-gguf --tasks trivia_demo --prune 1,2,4 --output out/sweep
  dynamax-lm-eval report out/sweep
  dynamax-lm-eval export out/sweep --format csv
  dynamax-lm-eval calibrate --backbone smollm2-gguf --tasks trivia_demo --tolerance 0.2 --output out/calibrated
  dynamax-lm-eval tasks

`run` takes every option of `lm_eval run`; --model defaults to dynamax, and the package's own tasks are found without
--include_path. `arguments` shows what --model_args may hold. The stock command works too:
  lm_eval --model dynamax --include_path "$(dynamax-lm-eval tasks --path)" ...

dynamax-lm-eval COMMAND --help shows the options of a command. Errors end in one line; --debug shows where they come
from.
"""

#: What a full disk, a missing permission or a damaged file ends in; not the sign of a bug.
_DAMAGE = (OSError, sqlite3.Error, zlib.error, EOFError, yaml.YAMLError, SafetensorError)
#: The same, unless it comes from an evaluation that was running, where texts are parsed.
_DAMAGED_TEXT = (json.JSONDecodeError, UnicodeError)
_DEBUG = "--debug"
#: As shells count a command that Ctrl-C ended.
_INTERRUPTED = 130
#: What a command that was stopped keeps; of all others nothing is kept that a second start would find.
_CONTINUES = {
    "sweep": "run the same command again to continue",
    "calibrate": "run the same command again to continue",
    "train": "add --resume to go on from the last saved state, where there is one",
}


@dataclass(frozen=True)
class Command:
    """A subcommand whose options are dataclasses.

    Attributes:
        options: ``module:Class`` of its options.
        run: ``module:function``; is given the options, and may return the text that the terminal shows at the end.
        summary: one line for the list of commands.
        description: for its own help.
        prepare: rewrites its arguments before they are parsed.
        positional: the option that is given without its name.
        extra: options that ``prepare`` reads: name, value, meaning.
    """

    options: tuple[str, ...]
    run: str
    summary: str
    description: str
    prepare: Callable[[list[str]], list[str]] = list
    positional: str | None = None
    extra: tuple[tuple[str, str, str], ...] = ()


def _with_config(arguments: list[str]) -> list[str]:
    """The arguments of a sweep, after those that the file of ``--config`` holds, so that they win."""
    from dynamax_lm_eval.sweep.options import read_yaml

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    file, given = files.parse_known_args(arguments)
    if file.config is None:
        return given
    try:
        stored = read_yaml(file.config.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file.config} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise UserError(f"--config {file.config} is no YAML file: {error}") from error
    pairs = [[f"--{name}", str(value)] for name, value in stored.items() if value is not None]
    return [*(part for pair in pairs for part in pair), *given]


COMMANDS = {
    "headroom": Command(
        ("headroom.options:HeadroomOptions",),
        "headroom.command:command",
        "see what early exit could save on a model, before training",
        """\
One look at a model, before any training. Per layer: the share of tokens whose read-out (final norm and LM head) already
gives the full model's best token, without adapters, with those of trained exits, and with affine ones that are fitted
on the fly (--fit_adapters True). An oracle that knows this lets each token exit as early as possible; its
compute_reduction counts blocks, recomputed states and adapters, and bounds what any classifier can reach. Its choices
then run through the engine, which shows how many answers change because of the states that exited tokens leave behind.
Writes headroom.json and headroom.png, and ends with one line: whether early exit is worth training. For example,
--backbone smollm2-gguf --dataset texts.jsonl.gz --fit_adapters True or --backbone MODEL --tasks triviaqa.""",
    ),
    "train": Command(
        ("training.options:TrainingOptions", "training.options:RunOptions"),
        "harness.prompts:train",
        "train exits for a backbone",
        """\
Train exit classifiers for a frozen backbone. A token's label at an exit is whether the exit's own best token is
(among the k best) that of the full model. Evaluations of the same backbone then find the exits by themselves.
On several GPUs or processes: accelerate launch -m dynamax_lm_eval train ..., or torchrun.""",
    ),
    "sweep": Command(
        ("sweep.options:SweepOptions",),
        "sweep.command:command",
        "evaluate many policies in one run",
        """\
Answer tasks under many policies at once: thresholds x confidences x state modes, pruned models, static exits, and
always the full model. The backbone is loaded once, prompts run once, and points decode together. Each point gets the
harness's own result files in OUTPUT/points. Every answer is stored at once: if interrupted, rerun the sweep and it
continues where it stopped. Options may come from a YAML file, --config sweep.yaml; those on the command line win.
Several processes share the points: torchrun --nproc_per_node 2 -m dynamax_lm_eval sweep ...
Plots: dynamax-lm-eval report.""",
        prepare=_with_config,
        extra=(("--config", "FILE", "YAML file of these options by name; those on the command line win"),),
    ),
    "report": Command(
        ("reports.options:ReportOptions",),
        "reports.command:command",
        "tables, plots and one HTML page of sweeps",
        """\
Show what sweeps found: points.csv and points.parquet (one row per point, task and metric), report.md with intervals,
plots as PNG and SVG, and report.html, one page that needs no network: hover shows settings, a click shows
texts, and two points can stand side by side.""",
        positional="folders",
    ),
    "exits": Command(
        ("exits.options:ExitsOptions",),
        "exits.listing:command",
        "list, show or remove trained exits",
        """\
List the trained exits that runs look at, in the cache and in the package, with the backbone that each is for: a run
takes the newest ones in the cache that fit its weights, then those of the package. --show NAME prints a configuration,
--remove NAME removes exits from the cache.""",
    ),
    "export": Command(
        ("export.options:ExportOptions",),
        "export.command:command",
        "results for leaderboards, model cards and tables",
        """\
Write the results below a folder, of runs and of sweeps, in another format: one table (csv, parquet), files for the
Hub's .eval_results and for a model card's metadata, or records of Every Eval Ever, converted and validated by its own
package. Every operating point is an entry of its own, and its policy and compute go with it.""",
        positional="folder",
    ),
    "arguments": Command(
        ("run.arguments:ArgumentsOptions",),
        "run.arguments:command",
        "show the model arguments",
        """\
Show what may stand in --model_args, as keywords of DynamaxLM in Python too: all arguments, or one of them.""",
        positional="name",
    ),
    "prune-profile": Command(
        ("measure.options:ProfileOptions",),
        "measure.prune_profile:command",
        "measure which blocks to prune",
        """\
Measure how much consecutive blocks rotate the hidden state (angular distance, Gromov et al. 2024), on text. The file
that this writes chooses the blocks of prune_strategy=angular,prune_profile=FILE,prune_layers=N and of sweeps. With
--fit_adapters 1,2,4 models pruned by 1, 2 and 4 blocks get a fitted read-out, for prune_adapter=FILE and sweeps.""",
    ),
    "exit-thresholds": Command(
        ("measure.options:SearchOptions",),
        "measure.exit_thresholds:command",
        "search thresholds per exit on text",
        """\
Choose thresholds for each exit together. One pass over text records the confidence at every exit and whether the exit
agrees with the full model; thresholds are searched in that record. The file that this writes holds a path of
thresholds by rising savings, for calibrate --per_exit FILE, and how much they gain over one threshold for all.""",
    ),
    "calibrate": Command(
        ("calibration.options:CalibrateOptions",),
        "calibration.command:command",
        "choose a threshold with a guarantee",
        """\
Choose a threshold with a statistical guarantee: the expected loss per document is at most TOLERANCE, with probability
1 - LEVEL over the documents it was chosen on (learn then test), or on average over them (--method crc).
Candidates are tested from the most careful one down until one fails; of those that passed, the one that saves the
most is chosen. Half of the task's documents, drawn at random, are used to choose it, the others to test it. The
certificate is written to OUTPUT and beside the exits; runs use it with threshold=calibrated or threshold=FILE, and
refuse what it does not cover.""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status; errors of the user end in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _DEBUG in arguments
    arguments = [argument for argument in arguments if argument != _DEBUG]
    name = arguments[0] if arguments else ""
    if name == "run":
        from dynamax_lm_eval.run.command import run  # the harness's parser: not needed for other commands

        return _status(lambda: run(arguments[1:], debug), debug, evaluates=True)
    if name in COMMANDS:
        return _status(lambda: _execute(name, arguments[1:], debug), debug, remedy=_CONTINUES.get(name))
    names = ["run", *COMMANDS, "tasks"]
    if name and not name.startswith("-") and name not in names:
        return _told(UserError(unknown_name("command", name, names, "there are", names)), 2)
    options = _overview().parse_args(arguments)
    return _tasks(options.path)


def _overview() -> argparse.ArgumentParser:
    """The parser of what comes before a command, and of ``tasks``."""
    parser = argparse.ArgumentParser(
        prog="dynamax-lm-eval",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {dynamax_lm_eval.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("run", help="evaluate a model on tasks: lm_eval with our model and tasks")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    tasks = commands.add_parser("tasks", help="list the tasks that come with the package and their folder")
    tasks.add_argument("--path", action="store_true", help="print the folder only, for --include_path")
    return parser


def _tasks(path_only: bool) -> int:
    folder = dynamax_lm_eval.tasks_dir()
    lines = [str(folder)]
    if not path_only:
        lines += [f"  {file.stem}" for file in sorted(folder.rglob("*.yaml")) if not file.stem.startswith("_")]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _execute(name: str, arguments: list[str], debug: bool) -> None:
    """Parses the options of a command, runs it, and shows what it returns."""
    command = COMMANDS[name]
    kinds = [_named(options) for options in command.options]
    parser = Parser(f"dynamax-lm-eval {name}", command.description, kinds, command.positional, command.extra)
    options = parser.read(command.prepare(arguments))
    _autoload.register()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    quiet.install(logging.getLogger(), is_wanted=lambda: debug)
    # httpx tells of every request; rouge_score of its tokenizer, for every score.
    for noisy in ("httpx", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not debug and os.environ.get("LMEVAL_LOG_LEVEL", "").upper() != "DEBUG":
        logging.getLogger("lm_eval").setLevel(logging.WARNING)  # of sweeps it would tell the same for every point
    shown = _named(command.run)(*options)
    if isinstance(shown, str):
        sys.stdout.write(shown)


def _named(place: str) -> Any:
    """What ``module:name`` of this package names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{dynamax_lm_eval.__name__}.{module}"), name)


def _status(command: Callable[[], None], debug: bool, evaluates: bool = False, remedy: str | None = None) -> int:
    """Runs a subcommand; what is no bug ends in one line on stderr: status 2 for what the user got wrong, else 1.

    Args:
        command: the subcommand.
        debug: errors are raised.
        evaluates: it is the harness's, whose errors are the user's input unless an evaluation was running.
        remedy: how it goes on after it was stopped; None: it begins anew.
    """
    try:
        command()
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write(f"\ndynamax-lm-eval: stopped{f'; {remedy}' if remedy else ''}\n")
        return _INTERRUPTED
    except UserError as error:
        if debug:
            raise
        return _told(error, 1 if isinstance(error, FaultError) else 2)
    except (*_DAMAGE, *_DAMAGED_TEXT) as error:
        if debug or (isinstance(error, _DAMAGED_TEXT) and getattr(error, "raised_while_evaluating", False)):
            raise
        # Of the harness's command, a file that is not there was named by the user.
        return _told(error, 2 if evaluates and isinstance(error, FileNotFoundError) else 1)
    except (ValueError, TypeError) as error:
        # Of a running evaluation, which is not the user's input, the traceback is needed.
        if debug or not evaluates or getattr(error, "raised_while_evaluating", False):
            raise
        return _told(error, 2)
    return 0


def _told(error: Exception, status: int) -> int:
    """Writes an error in one line; returns the status."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, (*_DAMAGE, *_DAMAGED_TEXT)) and not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text} (is a file damaged? {_DEBUG} shows which one was read)"
    sys.stderr.write(f"dynamax-lm-eval: error: {text}\n")
    return status
