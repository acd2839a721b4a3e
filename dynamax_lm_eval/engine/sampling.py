"""The choice of the next token from logits, with transformers' logits processors and one random stream per request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList


@dataclass
class Sampler:
    """The choice of one request's tokens.

    Attributes:
        processors: transformers' processors and warpers for the request, in their order.
        do_sample: draw from the distribution; otherwise take its arg-max.
        seed: seed of the request's own random stream, so that what else is in the batch cannot matter.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False
    seed: int = 0
    _generator: torch.Generator | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is simply the arg-max of the raw logits."""
        return not self.do_sample and not self.processors

    def next_token(self, ids: list[int], logits: Tensor) -> int:
        """Returns the next token after ``ids`` (prompt and generated), given logits (V,) in float32.

        Raises:
            ValueError: no token can be drawn. Processors raise errors of their own.
        """
        scores = logits.unsqueeze(0)
        if self.processors:
            context: Any = torch.tensor([ids], device=logits.device)
            scores = self.processors(context, scores)
        if not self.do_sample:
            return int(scores.argmax(dim=-1))
        # Inverse transform on the CPU, with a uniform number drawn there: the same stream on every device.
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        cumulative = torch.softmax(scores[0].cpu().double(), dim=-1).cumsum(-1)
        if not cumulative[-1] > 0:  # NaN, where every token is ruled out
            raise ValueError("they rule out every token")
        token = torch.searchsorted(cumulative, draw * cumulative[-1:], right=True)
        # `right` steps over tokens of probability 0; the last one that has any is the upper end.
        last = int((cumulative < cumulative[-1]).sum())
        return min(int(token), last)


def request_seed(base: int, key: str, repeat: int) -> int:
    """Returns a seed made of the run's seed, the request's content and the number of its repetition.

    It does not depend on batch, order or rank, so a document gets the same sample in every split of work.
    """
    digest = hashlib.sha256(f"{base}|{repeat}|{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
