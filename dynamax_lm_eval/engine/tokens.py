"""Tokens of a batch with their hidden states: picked out, and kept until they come back.

n tokens in flight, t of them picked, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray


class WaitingTokens:
    """Tokens that left and wait: to come back for block L, or to be read out."""

    def __init__(self) -> None:
        self._tokens: list[IntArray] = []
        self._hidden: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, tokens: IntArray, hidden: Tensor) -> None:
        """Keeps tokens (t,) with their hidden states (1, t, D)."""
        if len(tokens):
            self._tokens.append(tokens)
            self._hidden.append(hidden)

    def in_order(self) -> tuple[IntArray, Tensor]:
        """All of them in the order of the batch, with their hidden states (1, n, D)."""
        if len(self._tokens) == 1:
            return self._tokens[0], self._hidden[0]
        tokens = np.concatenate(self._tokens)
        order = np.argsort(tokens)
        hidden = torch.cat(self._hidden, dim=1)
        return tokens[order], hidden.index_select(1, torch.from_numpy(order).to(hidden.device))


def select(hidden: Tensor, places: IntArray) -> Tensor:
    """Returns those of hidden states (1, n, D) that stand at ``places`` (t,); no copy where that is all of them."""
    if len(places) == hidden.shape[1]:
        return hidden
    return hidden.index_select(1, torch.from_numpy(places).to(hidden.device))
