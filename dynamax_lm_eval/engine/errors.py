"""Errors of the engine that their catcher has to put a document to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class RequestError(Exception):
    """One request cannot be answered.

    Attributes:
        index: which of the requests given to ``generate`` or ``score``; from ``Engine.forward``, which of its rows.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class NotFiniteError(RequestError, ArithmeticError):
    """The model computed logits or confidences that are not numbers; nothing may be made of them.

    ``what``: is not finite.
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
