"""Standard errors of shares of tokens, over the documents that the tokens are of: tokens of one are alike.

T tokens that may leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynamax_lm_eval.backbones.base import BoolArray, IntArray
from dynamax_lm_eval.compute.accounting import ratio_stderr
from dynamax_lm_eval.headroom.text import Row


class ErrorsByDocument:
    """Which document each token is of, and what follows for the error of a share."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """``rows``: T tokens of them may leave."""
        documents = list(dict.fromkeys(row.document for row in rows))
        number = {document: i for i, document in enumerate(documents)}
        own = [number[row.document] for row in rows]
        self._of_token: IntArray = np.repeat(np.asarray(own, dtype=np.int64), [row.num_eligible for row in rows])
        tasks = [task for task, _ in documents]
        self._of_task = [[i for i, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)]
        #: How many documents there are.
        self.documents = len(documents)

    def stderr(self, has: BoolArray, among: BoolArray | None = None) -> float | None:
        """Returns the standard error of a share of tokens; None where a task has fewer than two documents.

        Args:
            has: (T,) the tokens that are counted.
            among: (T,) those that the share is of; None: all.
        """
        of = np.ones(len(has), dtype=np.bool_) if among is None else among
        counted, all_ = (np.bincount(self._of_token, part, self.documents).tolist() for part in (has & of, of))
        return ratio_stderr([[(counted[i], all_[i]) for i in documents] for documents in self._of_task])
