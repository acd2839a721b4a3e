"""Training-free confidences against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from dynamax_lm_eval.exits.confidences.entropy import entropy_confidence
from dynamax_lm_eval.exits.confidences.softmax import softmax_margin
from dynamax_lm_eval.exits.confidences.state import state_similarity


def test_confidences_by_definition() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 11)
    p = logits.softmax(-1)
    top = p.sort(descending=True).values
    torch.testing.assert_close(softmax_margin(logits), top[:, 0] - top[:, 1])
    torch.testing.assert_close(entropy_confidence(logits), 1 + (p * p.log()).sum(-1) / math.log(11))
    assert entropy_confidence(torch.zeros(1, 7)).item() == pytest.approx(0, abs=1e-6)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(state_similarity(a, b), cosine.clamp(min=0))
