"""Confirmers: how sure an exit is once its read-out is known, too. Three weights and a bias at each exit.

A classifier sees the hidden state, a read-out sees what would be said; together they know more than either
(docs/search.md). A confirmer is a logistic regression of three features of a token at an exit: the log-odds of its
classifier, the log-odds of the read-out's best token, and the margin between the probabilities of its two best tokens.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.float64]

#: Probabilities are kept this far from 0 and 1, so that log-odds are finite.
_EDGE = 1e-6
_LARGEST = 13.8155  # log-odds of that


class Confirmer(nn.Module):
    """The probability that an exit's token is right; it begins as that of the read-out's best token."""

    def __init__(self) -> None:
        super().__init__()
        # They are fitted at once; no step of a training moves them.
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)

    def reset(self) -> None:
        """Makes it the probability of the read-out's best token."""
        self.weight.copy_(torch.tensor([0.0, 1.0, 0.0]))
        self.bias.zero_()

    def forward(self, log_odds: Tensor, two_best: Tensor) -> Tensor:
        """Returns the probability (T,), float32.

        Args:
            log_odds: (T,) of "exit", by the classifier.
            two_best: (T, 2) probabilities of the read-out's two best tokens, best first.
        """
        weight, bias = self.weight.to(two_best.device), self.bias.to(two_best.device)
        # Element by element: autocast would narrow a product of matrices.
        return torch.sigmoid((features(log_odds, two_best) * weight.float()).sum(-1) + bias.float())

    def of_arrays(self, confidence: Floats, two_best: Floats) -> Floats:
        """Returns the same (T,) for a classifier's confidences (T,) and probabilities (2, T) that were recorded."""
        with np.errstate(divide="ignore"):
            log_odds = torch.from_numpy(np.log(confidence) - np.log1p(-confidence))
        sure: Floats = self(log_odds, torch.from_numpy(two_best.T)).double().cpu().numpy()
        return sure


def features(log_odds: Tensor, two_best: Tensor) -> Tensor:
    """Returns what a confirmer is made of, (T, 3), float32; arguments as in :meth:`Confirmer.forward`."""
    best, second = two_best.float().unbind(-1)
    inside = best.clamp(_EDGE, 1 - _EDGE)
    return torch.stack(
        [log_odds.float().clamp(-_LARGEST, _LARGEST), inside.log() - (-inside).log1p(), best - second], 1
    )


def best_two(logits: Tensor) -> Tensor:
    """Returns the probabilities (T, 2) of the two best tokens, best first, of logits (T, V)."""
    logits = logits.float()
    best: Tensor = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return best


def make_confirmers(kinds: Sequence[str], exit_layers: Sequence[int]) -> nn.ModuleDict:
    """Returns a confirmer for each kind of classifier and exit layer."""
    return nn.ModuleDict({kind: nn.ModuleDict({str(layer): Confirmer() for layer in exit_layers}) for kind in kinds})
