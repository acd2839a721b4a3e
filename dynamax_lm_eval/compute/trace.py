"""What one row ran: which tokens, how deep, and with what confidence."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dynamax_lm_eval.compute.verified import VerifiedTrace


@dataclass(frozen=True)
class Trace:
    """The tokens that one row ran, and how deep.

    Attributes:
        prompt_tokens: tokens of the prompt (or of the scored context).
        fed_tokens: tokens that went through the model, the prompt included; positions 0..fed_tokens-1.
        num_output_tokens: tokens that logits gave: generated, or scored. Logits of position prompt_tokens-1 gave
            the first.
        exit_layers: for each eligible token in order of position, the number of blocks that ran; where exits are
            drafts, before it was drafted from.
        generated: whether the tokens were generated (False: scored).
        hit_limit: generation ended because of the token limit.
        verified: what else was fed and how, where exits are drafts.
    """

    prompt_tokens: int
    fed_tokens: int
    num_output_tokens: int
    exit_layers: tuple[int, ...]
    generated: bool
    hit_limit: bool = False
    #: For each eligible token the exits at which a read refused to confirm, as bits in their order; empty: at none.
    refused: tuple[int, ...] = ()
    #: For each eligible token that gives a generated one, the last of them all: as :func:`by_exit` returns it. Rounding
    #: differs between batches, so it says nothing of whether two runs are alike.
    confidences: tuple[tuple[float | None, ...], ...] = field(default=(), compare=False)
    verified: VerifiedTrace | None = None


def if_any(refused: tuple[int, ...]) -> tuple[int, ...]:
    """Returns what traces say of tokens that were refused; nothing where none was."""
    return refused if any(refused) else ()


def by_exit(confidences: Sequence[Mapping[int, float]], exits: Sequence[int]) -> tuple[tuple[float | None, ...], ...]:
    """Returns confidences of tokens at exits, in thousandths, as far as each token came; nothing where there are none.

    Args:
        confidences: of each token, by exit layer.
        exits: exit layers in order. None stands where a token passed one that was not asked.
    """
    if not any(confidences):
        return ()
    return tuple(_of_token(found, exits) for found in confidences)


def _of_token(found: Mapping[int, float], exits: Sequence[int]) -> tuple[float | None, ...]:
    deepest = max(found, default=0)
    reached = [layer for layer in exits if layer <= deepest]
    return tuple(_thousandths(round(1000 * found[layer])) if layer in found else None for layer in reached)


@functools.cache
def _thousandths(number: int) -> float:
    """Returns a number of thousandths, the same object each time: there may be millions of confidences."""
    return number / 1000
