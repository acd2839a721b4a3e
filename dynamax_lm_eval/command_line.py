"""Options of the command line from dataclasses: a parser whose help shows every option once, with its own default.

A field is an option: its type, its default, and ``help`` in its metadata. Knows argparse; knows no command, and imports
nothing that takes time.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn

from dynamax_lm_eval.errors import UserError

#: What help calls a value; else it is the last word of the option's name.
_METAVARS: dict[Any, str] = {int: "N", float: "X"}
_TRUTHS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
_TRUTHS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


class Parser(argparse.ArgumentParser):
    """A parser of dataclasses; what is wrong ends in a UserError, one line."""

    def __init__(
        self,
        prog: str,
        description: str,
        kinds: Sequence[type[Any]],
        positional: str | None = None,
        extra: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        """
        Args:
            prog: the command, as it is typed.
            description: what it does, for its help.
            kinds: dataclasses; a field of one is an option.
            positional: the field that is given without a name; its name is accepted all the same.
            extra: options that are read elsewhere, for the help alone: name, value, meaning.
        """
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
        )
        self._kinds, self._positional = kinds, positional
        hints = {kind: typing.get_type_hints(kind) for kind in kinds}
        required = self.add_argument_group("required")
        usage: list[str] = []
        for kind in kinds:
            title = (kind.__doc__ or "").partition(";")[0].rstrip(".") if len(kinds) > 1 else "options"
            group = self.add_argument_group(title[:1].lower() + title[1:])
            for item in dataclasses.fields(kind):
                is_required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
                shown = self._add(required if is_required else group, item, hints[kind][item.name], is_required)
                usage += [shown] if is_required or item.name == positional else []
        others = self.add_argument_group("other")
        for name, metavar, meaning in extra:
            others.add_argument(name, metavar=metavar, help=meaning)
        others.add_argument("-h", "--help", action="help", help="show this help")
        others.add_argument("--debug", action="store_true", help="show where an error comes from")
        self.usage = " ".join([prog, *usage, "[options]"])

    def _add(self, group: argparse._ArgumentGroup, item: dataclasses.Field[Any], hint: Any, is_required: bool) -> str:
        """Adds the option of a field; returns what usage shows of it."""
        kind, is_list = _kind(hint)
        meaning = str(item.metadata.get("help", "")).replace("%", "%%") + _default(item)
        metavar = _METAVARS.get(kind, _last_word(item.name).upper())
        if item.name == self._positional:
            metavar = metavar.removesuffix("S") if is_list else metavar
            nargs = "+" if is_list else None if is_required else "?"
            default = None if is_required else item.default
            group.add_argument(item.name, nargs=nargs, metavar=metavar, type=kind, default=default, help=meaning)
            return f"{metavar}..." if is_list else metavar if is_required else f"[{metavar}]"
        options: dict[str, Any] = {"help": meaning, "metavar": metavar}
        if kind is bool:
            options |= {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
            no = f"--no_{item.name}"
            self.add_argument(no, dest=item.name, action="store_false", default=item.default, help=argparse.SUPPRESS)
        else:
            options |= {"type": kind, "nargs": "+" if is_list else None}
        if is_required:
            options["required"] = True
        else:
            options["default"] = item.default
        group.add_argument(f"--{item.name}", **options)
        return f"--{item.name} {metavar}"

    def read(self, arguments: Sequence[str]) -> list[Any]:
        """Returns instances of the dataclasses.

        Raises:
            UserError: an option is unknown, missing or no value of its type, or a dataclass refuses its value.
        """
        known = {name for action in self._actions for name in action.option_strings}
        spelled = [self._spelled(argument, known) for argument in arguments]
        values, unknown = self.parse_known_args([argument for argument in spelled if argument is not None])
        if unknown:
            raise UserError(self._unknown(unknown[0], known))
        return [
            kind(**{item.name: getattr(values, item.name) for item in dataclasses.fields(kind)}) for kind in self._kinds
        ]

    def _spelled(self, argument: str, known: set[str]) -> str | None:
        """Returns an argument with the underscores of its option, for which dashes may stand; None for one too many."""
        name, equals, value = argument.partition("=")
        if name == f"--{self._positional}":
            return value or None
        underscored = f"--{name[2:].replace('-', '_')}"
        return f"{underscored}{equals}{value}" if name.startswith("--") and underscored in known else argument

    def _unknown(self, option: str, known: set[str]) -> str:
        if not option.startswith("-"):
            return f"{option!r} belongs to no option; see {self.prog} --help"
        nearest = difflib.get_close_matches(option.partition("=")[0], sorted(known), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"see {self.prog} --help"
        return f"unknown option {option!r}; {hint}"

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of argparse's lines of usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def _last_word(name: str) -> str:
    """Returns the last word of an option's name where it says something, else the name."""
    word = name.rpartition("_")[2]
    return word if len(word) > len("hub") else name


def _kind(hint: Any) -> tuple[Callable[[str], Any], bool]:
    """Returns the type of one value, and whether there may be several."""
    if isinstance(hint, UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not NoneType]
    is_list = typing.get_origin(hint) is list
    return (typing.get_args(hint)[0] if is_list else hint), is_list


def _default(item: dataclasses.Field[Any]) -> str:
    """Returns what help adds of a default that its own words do not name."""
    default = item.default
    if default in (None, "", False, dataclasses.MISSING) or "default:" in item.metadata.get("help", ""):
        # 0 is equal to False, and is worth a word.
        return f" (default: {default})" if default == 0 and not isinstance(default, bool) else ""
    return f" (default: {str(default).lower() if isinstance(default, bool) else default})"


def _truth(text: str) -> bool:
    """Returns the truth value that a text stands for."""
    if text.lower() not in _TRUTHS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return _TRUTHS[text.lower()]
