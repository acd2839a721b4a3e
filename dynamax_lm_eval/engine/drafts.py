"""Tokens that left as drafts, in a pass: those that go on with their row, and those that stop with it.

What a row has drafted goes on together: where the row's new token gets to the block behind an exit, so do the drafts
that left there. So every block has the states of all earlier tokens of the row, as in the full model, and a row whose
new token leaves nowhere has all its drafts verified in the same pass.

N tokens of a flat batch, n in flight, t drafts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.tokens import HeldTokens, WaitingTokens, select
from dynamax_lm_eval.models.placement import moved


class Drafts:
    """The drafts of a batch, in one pass."""

    def __init__(self, batch: FlatBatch, hidden: Sequence[Tensor]) -> None:
        """``hidden``: (1, 1, D) of each token that has run some blocks, in their order."""
        self._batch = batch
        self._row_of = batch.layout.row_of
        self._resumed = np.flatnonzero(batch.resumed)
        self._hidden = dict(zip(self._resumed.tolist(), hidden, strict=True))
        self._waits = batch.resumed > 0
        #: Rows (R,) that have tokens in flight, or that feed nothing new, so that their drafts go on by themselves.
        self._moves = np.ones(len(batch.policies), dtype=np.bool_)
        #: What stopped in this pass.
        self.stopped: list[HeldTokens] = []

    @property
    def new(self) -> IntArray:
        """The tokens of the batch that have run nothing yet."""
        return np.flatnonzero(self._batch.resumed == 0)

    @property
    def first(self) -> int:
        """How many blocks all tokens of the batch have run."""
        return int(self._batch.resumed.min())

    @property
    def waiting(self) -> IntArray:
        """The drafts that have not gone on."""
        return np.flatnonzero(self._waits)

    @property
    def will_join(self) -> bool:
        """Whether some go on at a later block."""
        return bool((self._waits & self._moves[self._row_of]).any())

    def joined(self, block: int, tokens: IntArray, hidden: Tensor) -> tuple[IntArray, Tensor]:
        """Returns the tokens in flight (n,), hidden states (1, n, D), with drafts that go on after ``block`` blocks."""
        if len(self._resumed) == 0:
            return tokens, hidden
        joining = self._resumed[self._waits[self._resumed] & (self._batch.resumed[self._resumed] == block)]
        joining = joining[self._moves[self._row_of[joining]]]
        if len(joining) == 0:
            return tokens, hidden
        self._waits[joining] = False
        both = WaitingTokens()
        both.add(joining, torch.cat([moved(self._hidden[token], hidden.device) for token in joining.tolist()], dim=1))
        both.add(tokens, hidden)
        return both.in_order()

    def with_followers(self, tokens: IntArray, leaves: BoolArray) -> BoolArray:
        """Returns which of the tokens in flight (n,) stop, where ``leaves`` (n,) do: drafts stop with their row's."""
        stopping = np.zeros(len(self._moves), dtype=np.bool_)
        stopping[self._row_of[tokens[leaves]]] = True
        stopping &= self._batch.drafts
        self._moves &= ~stopping
        stops: BoolArray = leaves | stopping[self._row_of[tokens]]
        return stops

    def stop(self, block: int, tokens: IntArray, hidden: Tensor) -> tuple[IntArray, Tensor]:
        """Keeps those of tokens (t,), hidden states (1, t, D), whose rows draft; returns the others."""
        are_drafts = self._batch.drafts[self._row_of[tokens]]
        if not are_drafts.any():
            return tokens, hidden
        drafts, others = np.flatnonzero(are_drafts), np.flatnonzero(~are_drafts)
        self.stopped.append(HeldTokens(block, tokens[drafts], select(hidden, drafts)))
        return tokens[others], select(hidden, others)
