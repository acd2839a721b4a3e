"""Errors of a run that belong to one request."""

from __future__ import annotations


class NotFiniteError(ArithmeticError):
    """The model computed logits that are not numbers; nothing may be made of them.

    Attributes:
        index: which of the requests given to ``generate`` or ``score``.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"logits of request {index} are not finite")
        self.index = index
