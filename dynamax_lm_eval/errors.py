"""Errors that a user reads, and those of the engine whose catcher has to say which document they are about."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        index: that of the request given to ``generate`` or ``score``; from ``Engine.forward``, that of the row.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class NotFiniteError(RequestError, ArithmeticError):
    """The model computed logits or confidences that are not numbers; nothing may be made of them.

    ``what``: names what is not finite.
    """

    def __init__(self, index: int, what: str = "logits") -> None:
        super().__init__(index, f"{what} of request {index} are not finite")
        self.what = what


class ChoiceError(RequestError):
    """The request's logits processors failed, or left no token to choose."""


@contextmanager
def naming_request(requests: Sequence[int]) -> Iterator[None]:
    """Turns an error of a row of a batch into one of the request that the row belongs to."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(requests[error.index], error.what) from error


class UserError(ValueError):
    """An error for bad input of the user: the message is one line that names the rule, the value and the remedy."""


def changed_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns every setting that differs, with both values, for an error message; empty where none does.

    Of settings that hold others, such as a policy, it returns those that differ.
    """
    changed = []
    for name in sorted(name for name in {*stored, *now} if stored.get(name) != now.get(name)):
        before, after = stored.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed.append(f"{name}: {changed_settings(before, after)}")
        else:
            changed.append(f"{name} ({before!r}, now {after!r})")
    return ", ".join(changed)


def unknown_name(what: str, name: str, known: Collection[str], shown_as: str, shown: Collection[str]) -> str:
    """Returns the error message for an unknown name.

    It gives the nearest of the ``known`` names, or else those of ``shown``, introduced by ``shown_as``.
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"{shown_as}: {', '.join(shown)}"
    return f"unknown {what} {name!r}; {hint}"
