"""The part of the vocabulary that a confidence looks at, for each row (``vocab_subset``). Knows token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynamax_lm_eval.backbones.base import IntArray


class RowVocabulary(NamedTuple):
    """The tokens of one row: 0..``first`` - 1, and ``others`` (o,), rising and none of them below ``first``."""

    first: int
    others: IntArray

    @property
    def ids(self) -> IntArray:
        """All of the tokens, rising."""
        return np.concatenate([np.arange(self.first, dtype=np.int64), self.others])


def row_vocabulary(prompt: Sequence[int], size: int) -> RowVocabulary:
    """Returns ``size`` tokens for a row: those of its prompt, and the lowest ids of all others.

    Where the prompt has more distinct tokens than that, those that occurred last. Frequent tokens have low ids where a
    tokenizer numbers its merges in the order in which they were made.
    """
    backwards = np.asarray(prompt, dtype=np.int64)[::-1]
    _, places = np.unique(backwards, return_index=True)
    own = np.sort(backwards[np.sort(places)[:size]])
    added = np.setdiff1d(np.arange(size, dtype=np.int64), own)[: size - len(own)]
    first = int(added[-1]) + 1 if len(added) else 0
    return RowVocabulary(first, own[own >= first])
