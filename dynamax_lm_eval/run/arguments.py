"""``dynamax-lm-eval arguments``: the table of model arguments for a terminal. Imports nothing that takes time."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import dataclass, field

from dynamax_lm_eval import config, hf_arguments
from dynamax_lm_eval.errors import UserError, unknown_name

#: Columns of a narrow terminal, and those beyond which lines are hard to read.
_NARROWEST, _WIDEST = 60, 110
_INDENT = 4


@dataclass(frozen=True)
class ArgumentsOptions:
    """Which arguments are shown, and how."""

    name: str | None = field(default=None, metadata={"help": "one argument; default: all"})
    markdown: bool = field(default=False, metadata={"help": "print the table of docs/arguments.md"})

    def __post_init__(self) -> None:
        if self.name is not None and self.markdown:
            raise UserError("--markdown prints the whole table; give a name or --markdown")


def command(options: ArgumentsOptions) -> str:
    """Returns the text that the terminal shows.

    Raises:
        UserError: there is no such argument.
    """
    if options.markdown:
        return config.argument_table().replace("](docs/", "](")
    rows = config.argument_rows()
    width = max(_NARROWEST, min(shutil.get_terminal_size().columns, _WIDEST)) - 1
    if options.name is None:
        shown = [_entry(*row, width) for row in rows]
        others = f"Arguments of `--model hf` are passed on: {', '.join(hf_arguments.known())}, and others."
        head = "name=value, separated by commas, in --model_args:\n"
        return "\n".join([head, *shown, _wrapped(_plain(others), width)])
    if options.name in hf_arguments.REFUSED_ARGUMENTS:
        return f"{options.name} cannot be honoured: {hf_arguments.REFUSED_ARGUMENTS[options.name]}\n"
    passed_on = hf_arguments.known()
    for row in rows:
        if options.name in (row[0], "pretrained" if row[0] == "backbone" else row[0]):
            return _entry(*row, width)
    if options.name in passed_on:
        return f"{options.name} is an argument of --model hf, and is passed on to it\n"
    names = [name for name, _, _ in rows]
    raise UserError(unknown_name("model argument", options.name, {*names, *passed_on}, "there are", names))


def _entry(name: str, default: str, meaning: str, width: int) -> str:
    """Returns an argument with its default on a line, and its meaning below."""
    shown = default if default == "required" else f"default: {_plain(default)}"
    return _wrapped(f"{name}  ({shown})", width, 0, _INDENT) + _wrapped(_plain(meaning), width, _INDENT, _INDENT)


def _wrapped(text: str, width: int, first: int = 0, others: int = 0) -> str:
    """Returns a paragraph, with so many blanks before its first line and before the others."""
    lines = textwrap.wrap(
        text, width, initial_indent=" " * first, subsequent_indent=" " * others, break_on_hyphens=False
    )
    return "\n".join(lines) + "\n"


def _plain(markdown: str) -> str:
    """Returns the text of Markdown: links as their text and their page, and no marks of code."""

    def link(found: re.Match[str]) -> str:
        text, page = found[1], found[2].partition("#")[0]
        return page if text == page else f"{text}: {page}"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, markdown).replace("`", "")
