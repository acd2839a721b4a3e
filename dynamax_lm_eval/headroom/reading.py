"""What every layer would have answered: its read-out against the full model's best token, at full-depth states.

N tokens of a batch, T tokens that may leave, E layers, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE, Backbone, BoolArray, IntArray, on_device
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.frozen.observe import in_parts
from dynamax_lm_eval.frozen.passes import FrozenBatch, FrozenPass
from dynamax_lm_eval.headroom.text import Row
from dynamax_lm_eval.progress import over

#: Tokens that run through the backbone at once.
_AT_ONCE = 2048

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ReadOut:
    """A way to read tokens out after some layers.

    Attributes:
        name: ``none``, ``fitted``, or ``exits``.
        layers: rising.
        exits: hold the adapters, if there are some.
        adapter: their kind, as policies name it.
        final_block: block L runs before norm and LM head.
    """

    name: str
    layers: tuple[int, ...]
    exits: ExitClassifiers | None = None
    adapter: str = "none"
    final_block: bool = False

    def adapter_at(self, layer: int) -> Adapter | None:
        """Returns the adapter of a layer, if there is one."""
        return None if self.exits is None or self.adapter == "none" else self.exits.adapter(layer)


@dataclass
class Reading:
    """What was read of T tokens that may leave.

    Attributes:
        best: (T,) the full model's best tokens.
        agrees: of each read-out by its name, (E, T): whether its best token is the full model's.
        loss: the full model's mean loss, in nats, on the next tokens of the rows; NaN where no row goes on.
        entropy: the mean entropy of its next-token distributions, in nats.
    """

    best: IntArray
    agrees: dict[str, BoolArray] = field(default_factory=dict)
    loss: float = math.nan
    entropy: float = math.nan


def batches(
    backbone: Backbone, rows: Sequence[Row], layers: tuple[int, ...], final_block: bool, shown: str
) -> Iterator[tuple[FrozenBatch, IntArray]]:
    """Runs rows at full depth; yields each batch with the indices (t,) of its tokens that may leave."""
    frozen = FrozenPass(backbone, layers, final_block, 1)
    for part in over(in_parts(rows, _AT_ONCE), shown):
        ends = np.cumsum([len(row.ids) for row in part])
        eligible = [np.arange(end - row.num_eligible, end) for row, end in zip(part, ends, strict=True)]
        yield frozen.run([row.ids for row in part]), np.concatenate(eligible)


@torch.no_grad()
def read(backbone: Backbone, rows: Sequence[Row], read_outs: Sequence[ReadOut]) -> Reading:
    """Reads out all tokens that may leave, in each way and after each of its layers."""
    reading = Reading(np.zeros(0, dtype=np.int64))
    uncertain: list[FloatArray] = []
    targets = following(rows)
    for final_block in sorted({read_out.final_block for read_out in read_outs}):
        some = [read_out for read_out in read_outs if read_out.final_block == final_block]
        layers = tuple(sorted({layer for read_out in some for layer in read_out.layers}))
        best: list[IntArray] = []
        agrees: dict[str, list[BoolArray]] = {read_out.name: [] for read_out in some}
        shown = "read-outs after the final block" if final_block else "read-outs"
        for batch, tokens in batches(backbone, rows, layers, final_block, shown):
            last = _part(batch.last, tokens)
            best.append(best_tokens(backbone, last, None))
            if not reading.agrees:  # at full depth all passes are the same
                start = sum(map(len, uncertain))
                uncertain.append(uncertainty(backbone, last, targets[start : start + len(tokens)]))
            for read_out in some:
                found = [
                    best_tokens(backbone, _part(batch.reads[layer], tokens), read_out.adapter_at(layer))
                    for layer in read_out.layers
                ]
                agrees[read_out.name].append(np.stack(found) == best[-1])
        reading.best = np.concatenate(best)
        reading.agrees |= {name: np.concatenate(found, axis=1) for name, found in agrees.items()}
    loss, entropy = np.concatenate(uncertain).T
    reading.entropy = float(entropy.mean())
    if not np.isnan(loss).all():
        reading.loss = float(np.nanmean(loss))
    return reading


def following(rows: Sequence[Row]) -> IntArray:
    """Returns the tokens (T,) that follow those that may leave, row by row; -1 at the end of a row."""
    return np.asarray([token for row in rows for token in [*row.ids[1:], -1][row.prompt_length :]], dtype=np.int64)


def uncertainty(backbone: Backbone, hidden: Tensor, targets: IntArray) -> FloatArray:
    """Returns of full-depth states (t, D) the loss on the next tokens (t,) and the entropy, in nats, as (t, 2).

    The loss is NaN where there is no next token (-1).
    """
    at_once = max(1, LOGITS_AT_ONCE // backbone.vocab_size)
    next_tokens = on_device(targets, hidden.device)
    found = []
    for part, wanted in zip(hidden.split(at_once), next_tokens.split(at_once), strict=True):
        log_shares = backbone.readout(part).float().log_softmax(-1)
        loss = -log_shares.gather(-1, wanted.clamp(min=0)[:, None])[:, 0]
        entropy = torch.special.entr(log_shares.exp()).sum(-1)
        found.append(torch.stack([loss.masked_fill(wanted < 0, math.nan), entropy], dim=-1).cpu().numpy())
    uncertain: FloatArray = np.concatenate(found).astype(np.float64)
    return uncertain


def best_tokens(backbone: Backbone, hidden: Tensor, adapter: Adapter | None) -> IntArray:
    """Returns the best token (t,) of hidden states (t, D), as the engine chooses among equals: the first."""
    at_once = max(1, LOGITS_AT_ONCE // backbone.vocab_size)
    found = []
    for part in hidden.split(at_once):
        logits = backbone.readout(part if adapter is None else adapter(part))
        found.append(logits.argmax(-1).cpu().numpy())
    return np.concatenate(found)


def settled(agrees: BoolArray) -> BoolArray:
    """Returns (E, T): whether a token's read-out agrees after a layer and after all later ones."""
    from_there: BoolArray = np.logical_and.accumulate(agrees[::-1], axis=0)[::-1]
    return from_there


def _part(hidden: Tensor, tokens: IntArray) -> Tensor:
    """Returns the states (t, D) of some tokens of (N, D)."""
    return hidden[on_device(tokens, hidden.device)]
