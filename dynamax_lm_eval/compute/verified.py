"""The compute of rows whose early exits are drafts: every token that was fed runs all blocks, those taken back too.

T tokens fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynamax_lm_eval.compute.cost import BackboneCost, ExitCost


class FedToken(NamedTuple):
    """A token that a row fed after its prompt."""

    position: int
    #: The exit at which it left as a draft; None: it went through all blocks at once.
    left: int | None
    #: Whether it might have left.
    evaluated: bool
    #: Whether it is part of the text.
    stands: bool
    #: Whether what it drafted is.
    was_right: bool
    #: Exits at which a read refused to confirm, as bits.
    refused: int = 0


@dataclass(frozen=True)
class VerifiedTrace:
    """What a row fed after its prompt, and how.

    Attributes:
        fed: in the order in which tokens were verified.
        passes: of the row, were it alone: before the first and up to the last block that ran.
        verifications: how often the full model chose behind tokens that had drafted.
    """

    fed: tuple[FedToken, ...]
    passes: tuple[tuple[int, int], ...]
    verifications: int

    @property
    def drafts(self) -> tuple[int, ...]:
        """The exits that drafted."""
        return tuple(token.left for token in self.fed if token.left is not None)

    @property
    def right_drafts(self) -> tuple[int, ...]:
        """Those of them whose drafts are part of the text."""
        return tuple(token.left for token in self.fed if token.left is not None and token.was_right)


@dataclass(frozen=True)
class VerifiedCost:
    """MACs of what a row fed after its prompt."""

    block_macs: int
    classifier_macs: int
    adapter_macs: int
    #: Reads beyond the one that gives each token of the text.
    lm_head_macs: int
    paper_weights: int
    #: Weights that the row would read alone, blocks and read-outs of all its passes.
    weights_read: int


def cost_of(verified: VerifiedTrace, exit_cost: ExitCost, cost: BackboneCost) -> VerifiedCost:
    """Returns what a row's tokens after the prompt cost, those that were taken back included."""
    depth, fed = cost.num_layers, verified.fed
    positions = np.asarray([token.position for token in fed], dtype=np.int64)
    block_macs = int(cost.block_macs(positions, np.full_like(positions, depth), frozenset()).sum())
    layers = np.asarray([depth if token.left is None else token.left for token in fed], dtype=np.int64)
    evaluated = np.asarray([token.evaluated for token in fed], dtype=np.bool_)
    evaluations = np.where(evaluated, exit_cost.evaluations(layers), 0)
    # A recurrent classifier sees the tokens as well that may not leave.
    every = len(exit_cost.evaluated_layers) if exit_cost.warmed_tokens else 0
    seen = np.where(evaluated, evaluations, every)
    partial = exit_cost.classifier_total(exit_cost.partial_read_macs, evaluations)
    reads = int(evaluations.sum()) * cost.lm_head if exit_cost.reads_lm_head else partial
    drafts = verified.drafts
    refused_reads, refused_adapters = exit_cost.refused_macs(np.asarray([t.refused for t in fed], dtype=np.int64))
    reads += len(drafts) * exit_cost.draft_read_macs + refused_reads
    taken_back = sum(not token.stands for token in fed) * cost.lm_head
    classifiers = exit_cost.classifier_total(exit_cost.classifier_macs, seen)
    adapters = _adapter_macs(exit_cost, evaluations, drafts) + refused_adapters
    # Verified together, the tokens of a pass are read out with one read of the LM head's weights.
    full_reads = sum(last == depth for _, last in verified.passes) * cost.lm_head
    running = np.cumsum([0, *(block.weights for block in cost.blocks)])
    blocks = sum(int(running[last] - running[first]) for first, last in verified.passes)
    return VerifiedCost(
        block_macs=block_macs,
        classifier_macs=classifiers,
        adapter_macs=adapters,
        lm_head_macs=reads + taken_back,
        paper_weights=exit_cost.classifier_total(exit_cost.classifier_paper_weights, seen),
        weights_read=blocks + full_reads + reads + classifiers + adapters,
    )


def _adapter_macs(exit_cost: ExitCost, evaluations: np.ndarray, drafts: Sequence[int]) -> int:
    """Returns the MACs of the adapters through which confidences or drafts were read."""
    if not exit_cost.adapter_macs:
        return 0
    if exit_cost.evaluates_logits:
        return int(np.cumsum([0, *exit_cost.adapter_macs])[evaluations].sum())
    by_layer = dict(zip(exit_cost.evaluated_layers, exit_cost.adapter_macs, strict=True))
    return sum(by_layer[layer] for layer in drafts)
