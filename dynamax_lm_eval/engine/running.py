"""What runs the blocks of a pass from one exit to the next: one after the other, or several in one call.

n tokens in flight, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from dynamax_lm_eval.backbones.base import ForwardPass, IntArray, on_device
from dynamax_lm_eval.backbones.segments import SegmentOutput, SegmentUse
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.tokens import select


class BlockRunner:
    """Runs the blocks of a pass one after the other."""

    def __init__(self, run: ForwardPass, batch: FlatBatch) -> None:
        self._run = run
        self._batch = batch
        self._num_layers = batch.layout.runs_block.shape[1] - 1
        self._ran = 0  # blocks so far

    def stops_after(self, block: int) -> Iterable[int]:
        """Returns, rising, the numbers of blocks above ``block`` after which tokens may leave or come back."""
        self._ran = block
        return range(block + 1, self._num_layers + 1)

    def run_to(self, block: int, tokens: IntArray, hidden: Tensor) -> SegmentOutput:
        """Runs all blocks up to ``block`` that have not run on the tokens in flight (n,), hidden states (1, n, D)."""
        first, self._ran = self._ran + 1, block
        return self._run_blocks(first, block, tokens, hidden)

    def count(self) -> None:
        """Counts how the pass ran, at its end."""

    def _run_blocks(self, first: int, last: int, tokens: IntArray, hidden: Tensor) -> SegmentOutput:
        before = hidden
        for block in range(first, last + 1):
            before, hidden = hidden, self._run_block(block, tokens, hidden)
        return SegmentOutput(before, hidden)

    def _run_block(self, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
        """Runs a block on the tokens whose rows do not prune it; the others pass by unchanged."""
        layout = self._batch.layout
        runs_in = layout.runs_block[:, block]
        if runs_in.all() or (len(tokens) and (runs := layout.runs(tokens, block)).all()):
            return self._run.run_block(block, tokens, hidden)
        indices = np.flatnonzero(runs) if len(tokens) else tokens
        if len(indices) == 0:
            if runs_in.any():
                self._run.run_block(block, tokens[:0], hidden[:, :0])
            return hidden
        output = hidden.clone()
        block_output = self._run.run_block(block, tokens[indices], select(hidden, indices))
        output[:, on_device(indices, hidden.device)] = block_output
        return output


class SegmentRunner(BlockRunner):
    """Runs all blocks between two exits in one call, in passes in which every row has one token, and counts those."""

    def __init__(self, run: ForwardPass, batch: FlatBatch, use: SegmentUse) -> None:
        """``use``: has the counts."""
        super().__init__(run, batch)
        self._use = use
        lengths = np.bincount(batch.layout.row_of)
        self._is_single = bool((lengths == 1).all())
        #: Why it did not run in segments, for passes that count.
        self._reason: str | None = None
        if not self._is_single and (lengths == 1).any():
            self._reason = "prompts in the same pass"
        elif self._is_single and use.against is not None:
            self._reason, self._is_single = use.against, False

    def stops_after(self, block: int) -> Iterable[int]:
        every = super().stops_after(block)
        if not self._is_single:
            return every
        layout, last = self._batch.layout, self._num_layers
        # Before a final block, tokens that left come back.
        stops = {*layout.exit_layers, last, *([last - 1] if layout.final_block.any() else [])}
        return [number for number in every if number in stops]

    def count(self) -> None:
        if self._is_single or self._reason is not None:
            self._use.passes[self._reason or "static"] += 1

    def _run_blocks(self, first: int, last: int, tokens: IntArray, hidden: Tensor) -> SegmentOutput:
        if self._is_single:
            found = self._run.run_segment(first, last, tokens, hidden)
            if isinstance(found, SegmentOutput):
                return found
            self._reason = self._reason or found
        return super()._run_blocks(first, last, tokens, hidden)
