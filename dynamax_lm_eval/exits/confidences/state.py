"""``state``: how little the block changed the hidden state (CALM, section 3.4). T tokens, D hidden size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.exits.confidences.base import Confidence, ExitInputs


class StateConfidence(Confidence):
    """Cosine of the hidden state before and after the block at the exit."""

    name = "state"
    reads_before = True

    def score(self, inputs: ExitInputs) -> Tensor:
        return state_similarity(inputs.before, inputs.after)


def state_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the hidden state before and after the block at the exit.

    A negative cosine counts as 0, so that threshold 0 lets every token exit.

    Args:
        before: (T, D), input of the block.
        after: (T, D), its output.

    Returns:
        (T,) in [0, 1], float32.
    """
    return F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(0, 1)
