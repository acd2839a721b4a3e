"""Fits read-outs of pruned models: the affine map from what a pruned model ends with to what the full model does.

Ridge regression from second moments that are summed batch by batch, as adapters of exits are fitted in ``headroom``.
Every fifth document is measured on, and not fitted on. N tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE, Backbone
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.frozen.observe import in_parts
from dynamax_lm_eval.frozen.passes import begin
from dynamax_lm_eval.frozen.regression import Moments
from dynamax_lm_eval.frozen.text import HeldOut
from dynamax_lm_eval.progress import over

Blocks = frozenset[int]

#: Tokens that run together.
_AT_ONCE = 2048
#: One document in so many is measured on.
_MEASURED = 5


@dataclass(frozen=True)
class Fit:
    """The read-out of a pruned model, and what it does on text that it was not fitted on.

    Attributes:
        adapter: the read-out.
        agreement: share of tokens whose best token is the full model's, without and with it.
        error: mean square of what the last hidden state differs by from the full model's, over the variance of that,
            without and with it.
    """

    adapter: Adapter
    agreement: tuple[float, float]
    error: tuple[float, float]


def split(text: HeldOut) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the rows to fit on, and those of every fifth document, to measure on.

    Raises:
        UserError: there are too few documents.
    """
    kept = [number % _MEASURED == _MEASURED - 1 for number in text.document]
    if not any(kept):
        raise UserError(
            f"--fit_tokens come from {text.documents} documents, and at least {_MEASURED} are needed, of which every "
            "fifth is kept to measure on; raise --fit_documents, or give text in more documents"
        )
    fitting = [row for row, is_kept in zip(text.rows, kept, strict=True) if not is_kept]
    return fitting, [row for row, is_kept in zip(text.rows, kept, strict=True) if is_kept]


@torch.no_grad()
def fit(
    backbone: Backbone,
    fitting: Sequence[list[int]],
    measured: Sequence[list[int]],
    sets: Sequence[Blocks],
    ridge: float,
) -> dict[Blocks, Fit]:
    """Returns the read-out of each model without a set of blocks (1-based).

    Args:
        backbone: the full model.
        fitting: rows of token ids that it is fitted on.
        measured: and others, on which it is measured.
        sets: the pruned blocks.
        ridge: the penalty, in mean variances of a coordinate of the hidden state.
    """
    moments: dict[Blocks, Moments] = {}
    for part in over(in_parts(fitting, _AT_ONCE), "read-outs"):
        full = end_states(backbone, part)
        for blocks in sets:
            pruned = end_states(backbone, part, blocks).to(full.device)
            if blocks not in moments:
                size = pruned.shape[1]
                moments[blocks] = Moments.zero(size, size, pruned.device, torch.float64)
            own = pruned.double()
            moments[blocks].add(own, full.double() - own)
    adapters = {blocks: _adapter(sums, ridge) for blocks, sums in moments.items()}
    return _measured(backbone, measured, adapters)


@torch.no_grad()
def end_states(backbone: Backbone, rows: Sequence[Sequence[int]], pruned: Blocks = frozenset()) -> Tensor:
    """Returns what new rows end with, without some blocks: hidden states (N, D) before the final norm."""
    for row in rows:
        backbone.check_ids(row)
    runs_block = np.ones((len(rows), backbone.num_layers + 1), dtype=np.bool_)
    runs_block[:, sorted(pruned)] = False
    run, _, ids = begin(backbone, rows, runs_block=runs_block)
    tokens = np.arange(len(ids))
    with backbone.running():
        hidden = run.embed(ids)
        for block in range(1, backbone.num_layers + 1):
            if block not in pruned:
                hidden = run.run_block(block, tokens, hidden)
    return hidden[0]


def _adapter(sums: Moments, ridge: float) -> Adapter:
    a, b = sums.solve(ridge * float(sums.covariance.diagonal().mean()))
    adapter = Adapter(len(b), None)
    adapter.up.weight.copy_(a)
    adapter.up.bias.copy_(b)
    return adapter.to(b.device).requires_grad_(False).eval()


def _measured(backbone: Backbone, rows: Sequence[list[int]], adapters: dict[Blocks, Adapter]) -> dict[Blocks, Fit]:
    """Returns adapters with their agreement and error on rows that they were not fitted on."""
    right = {blocks: np.zeros(2) for blocks in adapters}
    squares = {blocks: np.zeros(2) for blocks in adapters}
    total, square = 0, 0.0
    sums: list[Tensor] = []
    for part in in_parts(rows, _AT_ONCE):
        full = end_states(backbone, part)
        best = _best(backbone.readout, full, backbone.vocab_size)
        total += len(full)
        sums.append(full.double().sum(0))
        square += float(full.double().square().sum())
        for blocks, adapter in adapters.items():
            pruned = end_states(backbone, part, blocks).to(full.device)
            for i, states in enumerate((pruned, adapter(pruned))):
                agrees = _best(backbone.readout, states, backbone.vocab_size) == best
                right[blocks][i] += int(agrees.sum())
                squares[blocks][i] += float((states.double() - full.double()).square().sum())
    variance = square - float(torch.stack(sums).sum(0).square().sum()) / total
    return {
        blocks: Fit(
            adapter,
            (float(right[blocks][0] / total), float(right[blocks][1] / total)),
            (float(squares[blocks][0] / variance), float(squares[blocks][1] / variance)),
        )
        for blocks, adapter in adapters.items()
    }


def _best(readout: Callable[[Tensor], Tensor], hidden: Tensor, vocab_size: int) -> Tensor:
    """Returns the best token (N,) of hidden states (N, D), in parts of bounded size."""
    return torch.cat([readout(part).argmax(-1) for part in hidden.split(max(1, LOGITS_AT_ONCE // vocab_size))])
