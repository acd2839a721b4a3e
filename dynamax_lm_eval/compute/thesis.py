"""The compute reduction as earlier public code of the paper's authors computes it, for comparing with its figures.

Xigm/MEEstral and Xigm/EE_clean on GitHub, read in November 2026. It is no measure of what ran: see
:class:`ThesisFormula` for what it miscounts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: What recomputing the states of one skipped block costs there, in blocks.
ATTENTION_PENALTY = 4 / 24
MAMBA_PENALTY = 9 / 26


@dataclass(frozen=True)
class ThesisFormula:
    """Sum of (n - 1) L over documents, over the same less what exits save and plus what they cost.

    n is the number of generated tokens, of which the first costs nothing, and L the number of blocks. A token that left
    after e blocks saves L - e, or L - e + 1 on a Transformer that recomputes states; where states are recomputed it
    costs (L - e + 1) times 4/24 of a block, on Mamba 9/26.

    What it miscounts: with the final block, a token that left after e blocks skips L - e - 1, which is one or two fewer
    than it is credited with. As many blocks have their states recomputed, which is two fewer than it is charged with.
    Every block counts the same at every position, and classifiers, prompts and the LM head cost nothing. Exits after 16
    of 32 blocks by every token give 2.00, where 1.88 times as many blocks would run; recomputing states 1.79, and 1.64
    with 4/24 of a block for each state that is made.

    Attributes:
        num_layers: L.
        is_mamba: the backbone is Mamba.
        recomputes_state: tokens that left have their states recomputed.
        num_pruned: blocks that generated tokens do without.
    """

    num_layers: int
    is_mamba: bool
    recomputes_state: bool
    num_pruned: int = 0

    def saved(self, exit_layer: int) -> float:
        """Returns the blocks that a token is credited with which left after ``exit_layer`` blocks."""
        if exit_layer >= self.num_layers:
            return 0
        counts_exit_block = self.recomputes_state and not self.is_mamba
        return self.num_layers - exit_layer + counts_exit_block

    def penalty(self, exit_layer: int) -> float:
        """Returns the blocks that it is charged with for its states."""
        if exit_layer >= self.num_layers or not self.recomputes_state:
            return 0
        return (self.num_layers - exit_layer + 1) * (MAMBA_PENALTY if self.is_mamba else ATTENTION_PENALTY)

    def reduction(self, exit_layers: Iterable[Iterable[int]], with_penalty: bool = True) -> float | None:
        """Returns the factor for documents whose tokens, the first of each left aside, left after these layers.

        ``with_penalty``: False leaves out what states cost, as some of that code's plots do. None where blocks are
        pruned and tokens leave as well, for which the code has no formula; 1 without any token.
        """
        layers = [layer for document in exit_layers for layer in document]
        if self.num_pruned:
            if any(layer < self.num_layers for layer in layers):
                return None
            return self.num_layers / (self.num_layers - self.num_pruned)
        full = len(layers) * self.num_layers
        spent = full - sum(self.saved(layer) for layer in layers)
        spent += sum(self.penalty(layer) for layer in layers) if with_penalty else 0
        return full / spent if layers else 1.0
