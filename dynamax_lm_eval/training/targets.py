"""What a frozen backbone says about a batch: hidden states at the exits, and which exits would have been right.

Runs the backbone block by block as the engine does, without gradients, on every token at full depth.
N tokens of a flat batch, n labelled positions, E exits, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE, Backbone, full_depth_layout
from dynamax_lm_eval.backbones.ssm import RaggedRows

#: Tokens of the vocabulary whose maximum is looked for first.
_BLOCK = 128


@dataclass(frozen=True)
class FrozenBatch:
    """Hidden states of a batch."""

    rows: RaggedRows
    exits: dict[int, Tensor]  # exit layer -> (N, D), what its classifier sees
    reads: dict[int, Tensor]  # exit layer -> (N, D), what its read-out sees: after the final block, if any
    last: Tensor  # (N, D) after block L


@dataclass(frozen=True)
class Labels:
    """For n positions and E exits: is the exit's best token right?"""

    within_k: Tensor  # (E, n) bool, among the k most probable tokens of the full model
    agrees: Tensor  # (E, n) bool, the full model's best token


class FrozenPass:
    """Runs batches through the backbone and labels positions."""

    def __init__(self, backbone: Backbone, exit_layers: tuple[int, ...], final_block: bool, top_k: int) -> None:
        self.backbone = backbone
        self.dtype = backbone.embed(torch.zeros(1, dtype=torch.int64, device=backbone.device)).dtype
        self.exit_layers = exit_layers
        self.final_block = final_block
        self.top_k = top_k

    @torch.no_grad()
    def run(self, rows: Sequence[Sequence[int]]) -> FrozenBatch:
        """Hidden states of rows of token ids.

        With ``final_block`` the read-outs are those of a text all of whose tokens leave at the same exit.
        """
        backbone = self.backbone
        lengths = [len(row) for row in rows]
        total = sum(lengths)
        states = backbone.new_states(total)
        slots = [states.open_row(length) for length in lengths]
        run = backbone.start_pass(states, full_depth_layout(slots, lengths, backbone.num_layers))
        tokens = np.arange(total)
        ids = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
        with backbone.running():
            hidden = backbone.embed(ids.to(backbone.device))
            exits = {}
            for block in range(1, backbone.num_layers + 1):
                hidden = run.run_block(block, tokens, hidden)
                if block in self.exit_layers:
                    exits[block] = hidden[0]
            reads = dict(exits)
            if self.final_block:
                for layer, state in exits.items():
                    reads[layer] = run.run_block(backbone.num_layers, tokens, state.unsqueeze(0))[0]
        return FrozenBatch(RaggedRows(lengths, backbone.device), exits, reads, hidden[0])

    @torch.no_grad()
    def label(self, batch: FrozenBatch, positions: Tensor) -> Labels:
        """Labels at ``positions`` (n,)."""
        at_once = max(1, LOGITS_AT_ONCE // self.backbone.vocab_size)
        within, agrees = [], []
        for part in positions.split(at_once):
            best = best_tokens(self.backbone.readout(batch.last[part]), self.top_k)  # (t, k)
            found = torch.stack(
                [best_tokens(self.backbone.readout(batch.reads[layer][part]), 1)[:, 0] for layer in self.exit_layers]
            )  # (E, t)
            agrees.append(found == best[:, 0])
            within.append((found.unsqueeze(-1) == best).any(-1))
        return Labels(torch.cat(within, dim=1), torch.cat(agrees, dim=1))


def best_tokens(logits: Tensor, k: int) -> Tensor:
    """The k most probable tokens (t, k), best first, of logits (t, V).

    In two steps, block maxima and then the best blocks: on a CPU several times as fast as ``topk`` over V.
    """
    size = logits.shape[-1]
    if k >= size // _BLOCK:
        return logits.topk(min(k, size), dim=-1).indices
    if size % _BLOCK:
        logits = F.pad(logits, (0, -size % _BLOCK), value=-torch.inf)
    blocks: Tensor = logits.unflatten(-1, (-1, _BLOCK))  # (t, b, _BLOCK)
    # The k best tokens lie in the k blocks with the largest maxima.
    chosen = blocks.amax(-1).topk(k, dim=-1).indices  # (t, k)
    inside = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)  # (t, k * _BLOCK)
    places = inside.topk(k, dim=-1).indices
    return chosen.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
