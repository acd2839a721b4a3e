"""Reads the logits of a part of the vocabulary, which is another one for each row.

The tokens with low ids, which nearly all rows look at, are one product with the first rows of the LM head; what rows
look at beside them is a second, small one. Each row then picks its own.

R rows, N tokens of the vocabulary for each, t evaluated tokens of the text, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, IntArray, on_device
from dynamax_lm_eval.exits.vocabulary import RowVocabulary


class SubsetReader:
    """The logits of rows that look at equally many tokens."""

    def __init__(self, backbone: Backbone, vocabularies: Sequence[RowVocabulary | None]) -> None:
        """``vocabularies``: of each row; None: it is not read."""
        self._backbone = backbone
        known = [vocabulary for vocabulary in vocabularies if vocabulary is not None]
        self._first = max(vocabulary.first for vocabulary in known)
        others = np.unique(np.concatenate([vocabulary.others for vocabulary in known]))
        others = others[others >= self._first]
        device = backbone.output_device
        self._others = on_device(others, device)
        size = len(known[0].ids)
        #: Logits that are read for a token.
        self.width = self._first + len(others)
        self._vocabularies = vocabularies
        self._columns: Tensor | None = None
        if self.width > size:
            columns = np.zeros((len(vocabularies), size), dtype=np.int64)
            for row, vocabulary in enumerate(vocabularies):
                if vocabulary is not None:
                    ids = vocabulary.ids
                    columns[row] = np.where(ids < self._first, ids, self._first + np.searchsorted(others, ids))
            self._columns = on_device(columns, device)

    def logits(self, hidden: Tensor, row_of: IntArray) -> Tensor:
        """Returns the logits (t, N) of the rows' own tokens, for hidden states (t, D) of rows (t,)."""
        logits = self._backbone.readout_of(hidden, self._first, self._others)
        if self._columns is None:  # all rows look at the same
            return logits
        return logits.gather(1, self._columns[on_device(row_of, logits.device)])

    def of_all(self, logits: Tensor, row_of: IntArray) -> Tensor:
        """Returns logits (t, N) of the own tokens of rows (t,) as those of all (t, V), -inf where nothing was read."""
        ids = np.stack([vocabulary.ids for row in row_of if (vocabulary := self._vocabularies[row]) is not None])
        spread = logits.new_full((len(logits), self._backbone.vocab_size), -math.inf)
        return spread.scatter_(1, on_device(ids, logits.device), logits)


def rows_of_one_size(vocabularies: Sequence[RowVocabulary | None]) -> list[list[int]]:
    """Returns the rows that look at anything, those together that look at equally many tokens."""
    by_size: dict[int, list[int]] = {}
    for row, vocabulary in enumerate(vocabularies):
        if vocabulary is not None:
            by_size.setdefault(vocabulary.first + len(vocabulary.others), []).append(row)
    return list(by_size.values())
