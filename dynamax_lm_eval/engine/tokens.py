"""Selections of a batch's tokens with their hidden states, and tokens that wait to be processed again.

n tokens in flight, t of them selected, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, on_device
from dynamax_lm_eval.models.placement import moved


class HeldTokens(NamedTuple):
    """Tokens of a batch that have run through ``layer`` blocks and are to go on later."""

    layer: int
    tokens: IntArray  # (t,) indices into the batch
    hidden: Tensor  # (1, t, D)


class WaitingTokens:
    """Tokens that left and wait for block L, or to be read out."""

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
        """Returns all of them in the order of the batch, with their hidden states (1, n, D)."""
        if len(self._tokens) == 1:
            return self._tokens[0], self._hidden[0]
        tokens = np.concatenate(self._tokens)
        order = np.argsort(tokens)
        device = self._hidden[-1].device  # exits may be on several
        hidden = torch.cat([moved(part, device) for part in self._hidden], dim=1)
        return tokens[order], hidden.index_select(1, on_device(order, hidden.device))


def select(hidden: Tensor, indices: IntArray) -> Tensor:
    """Returns the hidden states (1, t, D) at ``indices`` (t,) of (1, n, D); no copy where those are all."""
    if len(indices) == hidden.shape[1]:
        return hidden
    return hidden.index_select(1, on_device(indices, hidden.device))
