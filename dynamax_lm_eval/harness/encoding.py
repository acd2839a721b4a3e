"""Contexts and continuations as token ids: how a text is split, what stands for an empty context, what fits."""

from __future__ import annotations

import logging
from typing import Any

from dynamax_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

#: Token ids of a context and its continuation.
TokenPair = tuple[list[int], list[int]]
#: The texts of a context and its continuation, and their token ids.
EncodedPair = tuple[tuple[str, str], list[int], list[int]]


def encode_pair(lm: Any, context: str, continuation: str) -> TokenPair:
    """Returns the token ids of a context and of its continuation, as the harness splits them.

    The harness's own ``hf`` ends in an assertion in two cases that have an answer: a context that is made of
    spaces, which belong to the continuation, counts as empty; and where one token holds the end of the context and
    all of the continuation, the continuation is encoded alone.

    Raises:
        UserError: there is nothing to score, or nothing to score it after.
    """
    if context:
        pair: TokenPair = lm._encode_pair(context, continuation)
        if all(pair):
            return pair
        continuation_with_spaces = context[len(context.rstrip()) :] + continuation
    else:
        pair, continuation_with_spaces = ([], []), continuation
    alone: list[int] = lm.tok_encode(continuation_with_spaces, add_special_tokens=False) if continuation else []
    if not alone:
        what = "an empty continuation" if not continuation else f"the continuation {continuation!r}, without tokens"
        raise UserError(f"cannot score {what}; check the task's doc_to_choice or doc_to_target")
    if pair[0]:
        return pair[0], alone
    prefix = needed_prefix(lm)
    if alone[0] != prefix:
        return [prefix], alone
    if len(alone) == 1:
        raise UserError(
            f"cannot score the continuation {continuation!r} after an empty context: it is the token that stands "
            "for the context; give another, prefix_token_id="
        )
    return alone[:1], alone[1:]


def needed_prefix(lm: Any) -> int:
    """Returns the token that stands before what has no context; UserError where the tokenizer has none for it."""
    prefix: int | None = lm.prefix_token_id
    if prefix is None:
        raise UserError(
            "the context is empty and the tokenizer has neither a BOS nor an EOS token to stand for it; name a "
            "token by its id: prefix_token_id="
        )
    return prefix


def fit(lm: Any, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
    """Returns tokens to feed and how many of them are context, cut from the left to the model's length.

    Raises:
        UserError: one of both is empty, the continuation alone is too long, or an id has no embedding.
    """
    most = lm.max_length
    if not continuation:
        raise UserError("cannot score an empty continuation; check the task's doc_to_choice or doc_to_target")
    if not context:
        raise UserError("cannot score a continuation without a token before it; give one, prefix_token_id=")
    if len(continuation) > most:
        raise UserError(
            f"a continuation of {len(continuation)} tokens is longer than max_length={most}; shorten it, or give "
            "max_length="
        )
    lm.engine.backbone.check_ids([*context, *continuation])
    whole = (context + continuation)[-(most + 1) :]
    if len(whole) < len(context) + len(continuation):
        logger.warning(
            "Context (%d tokens) and continuation (%d) exceed max_length=%d; cutting the context from the left",
            len(context),
            len(continuation),
            most,
        )
    return whole[:-1], len(whole) - len(continuation)
