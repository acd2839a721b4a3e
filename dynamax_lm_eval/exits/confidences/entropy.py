"""``entropy``: how far the distribution is from uniform. T tokens, V vocabulary."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.exits.confidences.base import ExitInputs, LogitsConfidence


class EntropyConfidence(LogitsConfidence):
    """1 - the normalised entropy of the exit's distribution."""

    name = "entropy"

    def score(self, inputs: ExitInputs) -> Tensor:
        assert inputs.logits is not None
        return entropy_confidence(inputs.logits)


def entropy_confidence(logits: Tensor) -> Tensor:
    """1 - H(p) / ln V, with p the softmax of the logits: 0 for the uniform distribution, 1 for certainty.

    Args:
        logits: (T, V).

    Returns:
        (T,) in [0, 1], float32.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)  # (T, V)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (1 - entropy / math.log(logits.shape[-1])).clamp(0, 1)
