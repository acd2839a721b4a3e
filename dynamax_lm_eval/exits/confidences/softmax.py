"""``softmax``: how far the most probable token is ahead (CALM, section 3.4). T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_lm_eval.exits.confidences.base import ExitInputs, LogitsConfidence


class SoftmaxConfidence(LogitsConfidence):
    """Probability of the most probable token minus that of the second."""

    name = "softmax"

    def score(self, inputs: ExitInputs) -> Tensor:
        assert inputs.logits is not None
        return softmax_margin(inputs.logits)


def softmax_margin(logits: Tensor) -> Tensor:
    """Probability of the most probable token minus that of the second.

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
