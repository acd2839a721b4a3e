"""Parsers of values as users write them: on a command line, in YAML, or from Python.

Every parser takes the argument's name and its value and gives the parsed value, or raises UserError with the name, the
rule and the value. Knows no argument by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, get_args

from dynamax_lm_eval.errors import UserError

#: Takes an argument's name and value.
Parser = Callable[[str, Any], Any]


def number(low: float, high: float = math.inf, *, above: bool = False, hint: str = "") -> Parser:
    """The parser of finite numbers from ``low`` (``above``: without it) to ``high``; ``hint`` ends its errors."""
    bound = "above" if above else "of at least"
    rule = f"in [{low:g}, {high:g}]" if high < math.inf else f"a finite number {bound} {low:g}"

    def parse(name: str, value: Any) -> float:
        result = _number(name, value)
        if not (low < result if above else low <= result) or not result <= high or math.isinf(result):
            raise UserError(f"{name} must be {rule}, got {result:g}{f'; {hint}' if hint else ''}")
        return result

    return parse


def numbers(low: float, high: float, hint: str) -> Parser:
    """The parser of one or several numbers: a number, a list, or ``0.7+0.8``."""
    one = number(low, high, hint=hint)

    def parse(name: str, value: Any) -> tuple[float, ...]:
        return tuple(one(name, item) for item in items(name, value))

    return parse


def whole(low: int) -> Parser:
    """The parser of whole numbers from ``low``."""

    def parse(name: str, value: Any) -> int:
        result = _integer(name, value)
        if result < low:
            raise UserError(f"{name} must be a whole number of at least {low}, got {result}")
        return result

    return parse


#: A whole number of at least 0.
count = whole(0)


def paths_as_text(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments with texts for the paths among them, which Python's users give."""
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in args.items()}


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UserError(f"{name} must be true or false, got {value!r}")


def flag_or_auto(name: str, value: Any) -> bool | None:
    """True, false or ``auto``, which is None."""
    if value == "auto":
        return None
    try:
        return flag(name, value)
    except UserError:
        raise UserError(f"{name} must be auto, true or false, got {value!r}") from None


def text(what: str) -> Parser:
    """The parser of a text that is not blank; ``what`` says what it names."""

    def parse(name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name} must be {what}, got {value!r}")
        return value

    return parse


def choice(kind: Any) -> Parser:
    """The parser of one of the words of a ``Literal``."""
    choices: tuple[str, ...] = get_args(kind)

    def parse(name: str, value: Any) -> str:
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return str(value)

    return parse


def layers(name: str, value: Any) -> tuple[int, ...]:
    """Exit layers in rising order: a number, a list, or ``15+20``."""
    if isinstance(value, str) and "," in value and not value.startswith("["):
        raise UserError(f"{name} is one number, or several joined by +, got {value!r}; write {value.replace(',', '+')}")
    blocks = [_integer(name, item) for item in items(name, value)]
    if blocks != list(_block_list(name, value)):
        raise UserError(f"{name} must be in rising order (thresholds are matched to them), got {items(name, value)}")
    return tuple(blocks)


def blocks_or_count(name: str, value: Any) -> int | tuple[int, ...]:
    """A number of blocks, or a list of blocks (from 1)."""
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and "+" in value):
        return _block_list(name, value)
    result = _integer(name, value)
    if result < 0:
        raise UserError(f"{name} must be a number of blocks (0 or more) or a list of blocks, got {result}")
    return result


def items(name: str, value: Any) -> list[Any]:
    """The items of a list, of the text form ``15+20+25``, or of a single value."""
    parts = value.split("+") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    if not parts:
        raise UserError(f"{name} must not be an empty list; leave it out for the default")
    return parts


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{name} must be a number, got {value!r}")
    try:
        result = float(value)
    except ValueError:
        raise UserError(f"{name} must be a number, got {value!r}") from None
    if math.isnan(result):
        raise UserError(f"{name} must be a number, got nan")
    return result


def _integer(name: str, value: Any) -> int:
    result = _number(name, value)
    if not result.is_integer():
        raise UserError(f"{name} must be made of whole numbers, got {value!r}")
    return int(result)


def _block_list(name: str, value: Any) -> tuple[int, ...]:
    blocks = [_integer(name, item) for item in items(name, value)]
    if len(set(blocks)) != len(blocks):
        raise UserError(f"{name} names a layer twice: {blocks}")
    return tuple(sorted(blocks))


def argument(default: Any, parse: Parser | None, meaning: str, *, shown: str | None = None, vary: bool = False) -> Any:
    """A row of the table of arguments, as a dataclass field.

    Args:
        default: where the user says nothing.
        parse: of what the user wrote; None for what is no argument of its own.
        meaning: what it means, in Markdown.
        shown: what tables show as the default; None: ``default`` itself.
        vary: a sweep decides it, so that its ``--model_args`` may not.
    """
    shown = f"`{default}`" if shown is None else shown
    return field(default=default, metadata={"parse": parse, "help": meaning, "default": shown, "vary": vary})
