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
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.exits.classifiers import ExitClassifiers

#: Tokens of the vocabulary whose maximum is looked for first.
_BLOCK = 128
#: Logits held at once on a CPU, in elements: few enough for its caches, which halves the time.
_AT_ONCE_ON_CPU = 2**23


@dataclass(frozen=True)
class FrozenBatch:
    """The hidden states of a batch."""

    rows: RaggedRows
    first: Tensor  # (N, D) what block 1 is given
    exits: dict[int, Tensor]  # exit layer -> (N, D), what its classifier sees
    reads: dict[int, Tensor]  # exit layer -> (N, D), what its read-out sees: after the final block, if any
    last: Tensor  # (N, D) after block L


@dataclass(frozen=True)
class Labels:
    """Whether the best token of each of E exits is right at n positions."""

    within_k: Tensor  # (E, n) bool, among the k most probable tokens of the full model
    agrees: Tensor  # (E, n) bool, the full model's best token
    divergence: Tensor | None = None  # (E,) mean KL of the full model's distribution to the exit's, if adapters learn


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
        """Returns hidden states of rows of token ids; raises UserError where the backbone does not know an id.

        With ``final_block`` the read-outs are those of a text all of whose tokens leave at the same exit.
        """
        backbone = self.backbone
        for row in rows:
            backbone.check_ids(row)
        lengths = [len(row) for row in rows]
        total = sum(lengths)
        states = backbone.new_states(total)
        slots = [states.allocate_row(length) for length in lengths]
        run = backbone.start_pass(states, full_depth_layout(slots, lengths, backbone.num_layers))
        tokens = np.arange(total)
        ids = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
        with backbone.running():
            first = hidden = run.embed(ids.to(backbone.device))
            exits = {}
            for block in range(1, backbone.num_layers + 1):
                hidden = run.run_block(block, tokens, hidden)
                if block in self.exit_layers:
                    exits[block] = hidden[0]
            reads = dict(exits)
            if self.final_block:
                for layer, state in exits.items():
                    reads[layer] = run.run_block(backbone.num_layers, tokens, state.unsqueeze(0))[0]
        return FrozenBatch(RaggedRows(lengths, backbone.device), first[0], exits, reads, hidden[0])

    @torch.no_grad()
    def label(
        self,
        batch: FrozenBatch,
        positions: Tensor,
        exits: ExitClassifiers | None = None,
        learn: Sequence[float] | None = None,
    ) -> Labels:
        """Returns labels at ``positions`` (n,).

        Args:
            batch: what the backbone computed.
            positions: (n,)
            exits: their adapters, if any, correct the read-outs.
            learn: weights (E,) of the exits' KL divergences; their gradients are added to the adapters'. None: the
                adapters stay as they are.
        """
        on_cpu = positions.device.type == "cpu"
        at_once = max(1, (_AT_ONCE_ON_CPU if on_cpu else LOGITS_AT_ONCE) // self.backbone.vocab_size)
        within, agrees = [], []
        divergence = torch.zeros(len(self.exit_layers), device=positions.device)
        for part in positions.split(at_once):
            full = self.backbone.readout(batch.last[part])  # (t, V)
            best = best_tokens(full, self.top_k)  # (t, k)
            target = _Target.of(full) if learn is not None else None
            exit_tokens = []
            for i, layer in enumerate(self.exit_layers):
                hidden = batch.reads[layer][part]
                adapter = None if exits is None else exits.adapter(layer)
                if adapter is None or target is None or learn is None:
                    logits = self.backbone.readout(hidden if adapter is None else adapter(hidden))
                else:
                    with torch.enable_grad():
                        logits = self.backbone.readout(adapter(hidden))
                    divergence[i] += _descend(logits, target, learn[i] / len(positions)) / len(positions)
                exit_tokens.append(best_tokens(logits.detach(), 1)[:, 0])
            by_exit = torch.stack(exit_tokens)  # (E, t)
            agrees.append(by_exit == best[:, 0])
            within.append((by_exit.unsqueeze(-1) == best).any(-1))
        return Labels(torch.cat(within, dim=1), torch.cat(agrees, dim=1), divergence if learn is not None else None)


@dataclass(frozen=True)
class _Target:
    """The full model's distribution at t positions."""

    probabilities: Tensor  # (t, V) float32
    negative_entropy: Tensor  # (), summed over positions

    @classmethod
    def of(cls, logits: Tensor) -> _Target:
        logits = logits.float()
        probabilities = logits.softmax(-1)
        return cls(probabilities, _expected_log_probability(probabilities, logits))


def _descend(logits: Tensor, target: _Target, weight: float) -> Tensor:
    """Adds the gradient of ``weight`` * sum of KL(target || softmax(logits)) to what made the logits (t, V).

    That gradient is softmax(logits) - target, so nothing of size V needs to be kept for it. Returns the sum.
    """
    own = logits.detach().float()
    gradient = own.softmax(-1).sub_(target.probabilities).mul_(weight)
    logits.backward(gradient.to(logits.dtype))
    return target.negative_entropy - _expected_log_probability(target.probabilities, own)


def _expected_log_probability(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Returns the sum over positions and vocabulary of p log softmax(logits), without a tensor of log-probabilities."""
    return torch.dot(probabilities.flatten(), logits.flatten()) - logits.logsumexp(-1).sum()


def best_tokens(logits: Tensor, k: int) -> Tensor:
    """Returns the k most probable tokens (t, k), best first, of logits (t, V).

    It takes two steps, block maxima and then the best blocks: on a CPU several times as fast as ``topk`` over V.
    """
    size = logits.shape[-1]
    if k >= size // _BLOCK:
        return logits.topk(min(k, size), dim=-1).indices
    if size % _BLOCK:
        logits = F.pad(logits, (0, -size % _BLOCK), value=-torch.inf)
    blocks: Tensor = logits.unflatten(-1, (-1, _BLOCK))  # (t, b, _BLOCK)
    # The k best tokens lie in the k blocks with the largest maxima.
    best_blocks = blocks.amax(-1).topk(k, dim=-1).indices  # (t, k)
    inside = blocks.gather(1, best_blocks.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)  # (t, k * _BLOCK)
    places = inside.topk(k, dim=-1).indices
    return best_blocks.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK
