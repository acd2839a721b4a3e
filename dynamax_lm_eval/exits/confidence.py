"""Training-free confidences: how sure an exit is, as a number that a threshold is compared with.

Knows logits and hidden states; does not know thresholds or who exits.
D hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Confidences that read the LM head at every evaluation.
READS_LM_HEAD = frozenset({"softmax", "entropy"})


def softmax_margin(logits: Tensor) -> Tensor:
    """Probability of the most probable token minus that of the second (CALM, section 3.4).

    Args:
        logits: (T, V), any float type; the probabilities are computed in float32.

    Returns:
        (T,) in [0, 1], float32.
    """
    # Two values and one log-sum-exp instead of a whole softmax: V is large.
    top2 = logits.topk(2, dim=-1).values.float()  # (T, 2)
    log_total = torch.logsumexp(logits.float(), dim=-1, keepdim=True)  # (T, 1)
    probabilities = (top2 - log_total).exp()
    return probabilities[:, 0] - probabilities[:, 1]


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


def state_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the hidden state before and after the block at the exit (CALM, section 3.4).

    A negative cosine counts as 0, so that threshold 0 lets every token exit.

    Args:
        before: (T, D), input of the block.
        after: (T, D), its output.

    Returns:
        (T,) in [0, 1], float32.
    """
    return F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(0, 1)


def from_logits(kind: str, logits: Tensor) -> Tensor:
    """The confidence named ``kind`` of logits (T, V): ``softmax`` or ``entropy``."""
    return softmax_margin(logits) if kind == "softmax" else entropy_confidence(logits)
