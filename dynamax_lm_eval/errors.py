"""Errors that a user reads, and those of the engine whose catcher has to say which document they are about."""

from __future__ import annotations

import difflib
import re
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


class FaultError(UserError):
    """A UserError that no other argument mends: a file is damaged or cannot be written, or the network is away."""


#: A fingerprint or checksum.
_HASH = re.compile(r"[0-9a-f]{32,}")
_SHOWN_DIGITS = 12


def _shown(value: Any) -> str:
    """Returns a value for a message, with the first digits of hashes."""
    return _HASH.sub(lambda found: found[0][:_SHOWN_DIGITS], repr(value))


def changed_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns every setting that differs, with both values, for an error message; empty where none does.

    Of settings that hold others, such as a policy, it returns those that differ. Hashes are shortened, and come last.
    """
    changed: list[str] = []
    hashes: list[str] = []
    for name in sorted(name for name in {*stored, *now} if stored.get(name) != now.get(name)):
        before, after = stored.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed.append(f"{name}: {changed_settings(before, after)}")
        else:
            is_hash = any(isinstance(value, str) and _HASH.fullmatch(value) for value in (before, after))
            (hashes if is_hash else changed).append(f"{name} ({_shown(before)}, now {_shown(after)})")
    return ", ".join([*changed, *hashes])


def unknown_name(what: str, name: str, known: Collection[str], shown_as: str, shown: Collection[str]) -> str:
    """Returns the error message for an unknown name.

    It gives the nearest of the ``known`` names, or else those of ``shown``, introduced by ``shown_as``.
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"{shown_as}: {', '.join(shown)}"
    return f"unknown {what} {name!r}; {hint}"
