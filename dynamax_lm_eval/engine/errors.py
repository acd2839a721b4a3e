"""Errors of a run that belong to one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class NotFiniteError(ArithmeticError):
    """The model computed logits or confidences that are not numbers; nothing may be made of them.

    Attributes:
        index: which of the requests given to ``generate`` or ``score``; from ``Engine.forward``, which of its rows.
        what: is not finite.
    """

    def __init__(self, index: int, what: str = "logits") -> None:
        super().__init__(f"{what} of request {index} are not finite")
        self.index = index
        self.what = what


@contextmanager
def naming_request(requests: Sequence[int]) -> Iterator[None]:
    """Turns an error of a row of a batch into one of the request that the row belongs to."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(requests[error.index], error.what) from error
