"""What a model's read-outs say on held-out text, and how LoRA changed that: numbers as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.frozen.observe import in_parts
from dynamax_lm_eval.frozen.passes import FrozenPass, best_tokens


@dataclass(frozen=True)
class ReadOuts:
    """What T held-out tokens are read out as."""

    best: IntArray  # (E + 1, T) the best next token at each exit, without adapters, and at full depth
    bits: float  # of all tokens but the rows' first, at full depth
    block_weights: int  # MACs per token of all blocks, without attention


@torch.no_grad()
def read_outs(frozen: FrozenPass, rows: Sequence[Sequence[int]], tokens_at_once: int) -> ReadOuts:
    """Reads rows of token ids out at all exits and at full depth."""
    backbone = frozen.backbone
    best, bits = [], 0.0
    for part in in_parts(rows, tokens_at_once):
        batch = frozen.run(part)
        # The last token of a row predicts nothing.
        following = torch.tensor([token for row in part for token in [*row[1:], -100]], device=backbone.device)
        for places in torch.arange(len(following), device=backbone.device).split(frozen.read_at_once):
            full = frozen.read_out(batch.last[places]).float()
            nats = F.cross_entropy(full, following[places], reduction="sum", ignore_index=-100)
            bits += float(nats) / math.log(2)
            early = [frozen.read_out(batch.reads[layer][places]) for layer in frozen.exit_layers]
            best.append(torch.stack([best_tokens(logits, 1)[:, 0] for logits in (*early, full)]).cpu().numpy())
    return ReadOuts(np.concatenate(best, axis=1), bits, sum(block.weights for block in backbone.cost.blocks))


def lora_report(
    original: ReadOuts,
    tuned: ReadOuts,
    exit_layers: Sequence[int],
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
) -> dict[str, Any]:
    """Returns what LoRA did to the read-outs of the same held-out rows, as JSON data.

    ``agreement`` is a share of tokens with the same best token: at an exit ``before`` and ``after`` with the full model
    of the same time, and ``after_with_original`` with the model as it was.
    """
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    full = original.best[-1]
    return {
        "agreement_at_full_depth": float((tuned.best[-1] == full).mean()),
        "bits_per_byte": {"original": original.bits / num_bytes, "tuned": tuned.bits / num_bytes},
        "agreement_of_exit": {
            str(layer): {
                "before": float((original.best[i] == full).mean()),
                "after": float((tuned.best[i] == tuned.best[-1]).mean()),
                "after_with_original": float((tuned.best[i] == full).mean()),
            }
            for i, layer in enumerate(exit_layers)
        },
        "block_weights": {"original": original.block_weights, "tuned": tuned.block_weights},
    }
