"""The cost of blocks, exits and read-outs, in multiply-accumulates (MACs) of logical tokens.

Everything follows from sizes and from what ran. Norms, rotary embeddings and activations are left
out, as in the usual FLOP counts of language models; masked keys are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

#: State recompute in the paper's cost table, in units of a block: K and V (2 D^2) of multi-head attention
#: with an ungated 4D MLP (4 D^2 + 8 D^2).
PAPER_ATTENTION_RECOMPUTE = 1 / 6
#: The same for Mamba-2: the x and B rows of in_proj over those of z, x, B, C and out_proj; at Codestral's shape, in
#: units of D^2: (2 + 1/4) / (2 + 2 + 1/4 + 1/4 + 2). dt, convolution and SSM are left out.
PAPER_MAMBA_RECOMPUTE = 9 / 26


@dataclass(frozen=True)
class BlockCost:
    """The MACs of one block.

    Attributes:
        weights: MACs per token of all projections and MLP weights; equal to the number of those weights.
        per_position: MACs of attention per position in sight; 2 * heads * head_dim of scores and values.
        window: sliding window in tokens; context = min(position + 1, window). None: all positions.
        state_recompute: MACs per token of making the block's state from the exit hidden state: K and V, or what
            updates the conv and SSM states.
        paper_recompute: state recompute in the paper's unit of one block.
        recurrence: MACs per token of a Mamba block beside its projections: the convolution, and the recurrent form
            of the SSM (3 * H * P * N), whatever form runs.
    """

    weights: int
    per_position: int
    window: int | None
    state_recompute: int
    paper_recompute: float = PAPER_ATTENTION_RECOMPUTE
    recurrence: int = 0

    @property
    def per_token(self) -> int:
        """The MACs that do not depend on the position."""
        return self.weights + self.recurrence

    def at(self, position: int) -> int:
        """Returns the MACs of the block for one token at ``position`` (0-based)."""
        context = position + 1 if self.window is None else min(position + 1, self.window)
        return self.per_token + self.per_position * context


@dataclass(frozen=True)
class BackboneCost:
    """The MACs of all blocks, in order, and of one read of the LM head (D * V)."""

    blocks: tuple[BlockCost, ...]
    lm_head: int
    #: Whether blocks are counted by formula, or as torch's FLOP counter saw them at load.
    source: Literal["formula", "measured"] = "formula"

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def mean_block_weights(self) -> float:
        """The mean number of weights of a block: the paper's unit for everything that is not a block."""
        return sum(block.weights for block in self.blocks) / len(self.blocks)

    def block_macs(
        self,
        positions: npt.NDArray[np.int64],
        layers: npt.NDArray[np.int64],
        pruned: frozenset[int],
    ) -> npt.NDArray[np.int64]:
        """Returns the MACs of blocks 1..layer without the pruned ones, for tokens at ``positions``.

        Args:
            positions: (T,) 0-based.
            layers: (T,) the number of blocks that each token ran through.

        Returns:
            (T,)
        """
        kept = [0 if block in pruned else 1 for block in range(1, self.num_layers + 1)]
        weights = _running_sum(keep * cost.per_token for keep, cost in zip(kept, self.blocks, strict=True))
        macs: npt.NDArray[np.int64] = weights[layers]
        for window in {cost.window for cost in self.blocks}:
            widths = _running_sum(
                keep * cost.per_position * (cost.window == window) for keep, cost in zip(kept, self.blocks, strict=True)
            )
            context = positions + 1 if window is None else np.minimum(positions + 1, window)
            macs = macs + widths[layers] * context
        return macs

    def last_block_macs(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the MACs (T,) of block L alone for tokens at ``positions``."""
        return np.asarray([self.blocks[-1].at(int(position)) for position in positions], dtype=np.int64)

    def skipped_sum(
        self, per_block: Sequence[float], layers: npt.NDArray[np.int64], pruned: frozenset[int]
    ) -> npt.NDArray[Any]:
        """Returns the sums (T,) of ``per_block`` over the blocks after each token's layer, without the pruned ones."""
        running = _running_sum(0 if block in pruned else value for block, value in enumerate(per_block, start=1))
        result: npt.NDArray[Any] = running[-1] - running[layers]
        return result


@dataclass(frozen=True)
class ExitCost:
    """What matters of an exit policy for the cost.

    Attributes:
        evaluated_layers: exit layers at which something is evaluated, in rising order.
        classifier_macs: MACs of one evaluation, for each of these layers.
        reads_lm_head: an evaluation reads all of the LM head.
        recomputes_state: skipped blocks get their state from the exit hidden state, recomputed or learned.
        pruned_blocks: blocks (1-based) that run for no token, or for no eligible one.
        first_eligible: position of the first token of the row that may exit.
    """

    evaluated_layers: tuple[int, ...]
    classifier_macs: tuple[int, ...]
    reads_lm_head: bool
    recomputes_state: bool
    pruned_blocks: frozenset[int]
    first_eligible: int
    #: What the paper's cost table counts for one evaluation, in weights.
    classifier_paper_weights: tuple[int, ...] = ()
    #: How many of the first tokens leave whatever a confidence says, and after which layer.
    prompt_exit: tuple[int, int] = (0, 0)
    #: MACs of an evaluation that reads some rows of the LM head, for each of these layers; empty: none does.
    partial_read_macs: tuple[int, ...] = ()
    #: MACs that states of tokens that left cost beyond recomputing them, by block; empty: nothing.
    state_map_macs: tuple[int, ...] = ()
    #: MACs of the adapter of a read-out, for each of these layers.
    adapter_macs: tuple[int, ...] = ()
    #: MACs of the read that confirms what a classifier proposes; 0: nothing is confirmed.
    confirm_read_macs: int = 0
    #: The read that confirms gives no token, because it is of a part of the vocabulary.
    reads_to_confirm_alone: bool = False
    #: MACs of the read that gives a draft, beyond what its evaluation read.
    draft_read_macs: int = 0
    #: Warm-up tokens: tokens that may not exit and that a recurrent classifier sees at every one of these layers.
    warmed_tokens: int = 0
    #: Block L runs for tokens that left, too.
    final_block: bool = False
    #: MACs of the adapter that tokens which do without the pruned blocks are read out through.
    prune_adapter_macs: int = 0
    #: Pruned blocks run for the tokens that may not exit.
    prunes_eligible_only: bool = False

    @property
    def evaluates_logits(self) -> bool:
        """Whether confidences are made of logits, all or some."""
        return self.reads_lm_head or any(self.partial_read_macs)

    def evaluations(self, layers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns how many exits were evaluated for eligible tokens that left at ``layers`` (T,)."""
        return np.searchsorted(np.asarray(self.evaluated_layers, dtype=np.int64), layers, side="right")

    def refused_macs(self, refused: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Returns the MACs of reads that refused to confirm, and of their adapters.

        ``refused``: (T,) bits, one for each of ``evaluated_layers``.
        """
        counts = [int(((refused >> i) & 1).sum()) for i in range(len(self.evaluated_layers))]
        adapters = sum(count * macs for count, macs in zip(counts, self.adapter_macs or [0] * len(counts), strict=True))
        return sum(counts) * self.confirm_read_macs, adapters

    def classifier_total(self, per_layer: tuple[int, ...], evaluations: npt.NDArray[np.int64]) -> int:
        """Returns the sum of ``per_layer`` over all evaluations, those on warm-up tokens included."""
        decided = np.cumsum([0, *per_layer])[evaluations].sum() if per_layer else 0
        return int(decided) + self.warmed_tokens * sum(per_layer)


@dataclass(frozen=True)
class EvaluationCost:
    """The cost of one evaluation of a confidence, reads of all of the LM head left aside."""

    macs: int = 0
    #: In the paper's table: the weights of a classifier, 0 for a linear layer.
    paper_weights: int = 0
    #: MACs of the rows of the LM head that it reads, where these are some.
    lm_head_macs: int = 0


def _running_sum(values: Iterable[float]) -> npt.NDArray[Any]:
    """Returns [0, v1, v1+v2, ...]: entry l is the sum over blocks 1..l."""
    return np.cumsum(np.asarray([0, *values]))
