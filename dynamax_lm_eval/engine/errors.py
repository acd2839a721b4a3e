"""Errors of a run that belong to one request."""

from __future__ import annotations


class RequestError(Exception):
    """One request cannot be answered.

    Attributes:
        index: which of the requests given to ``generate`` or ``score``.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class NotFiniteError(RequestError, ArithmeticError):
    """The model computed logits that are not numbers; nothing may be made of them."""

    def __init__(self, index: int) -> None:
        super().__init__(index, f"logits of request {index} are not finite")


class ChoiceError(RequestError):
    """The request's logits processors failed, or left no token to choose."""
