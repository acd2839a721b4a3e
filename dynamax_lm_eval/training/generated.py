"""Training text that the backbone writes itself: for users without a corpus, and in the model's own style."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler, request_seed
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.text import Documents
from dynamax_lm_eval.training.options import TrainingOptions

#: Documents generated together.
_AT_ONCE = 32


def first_token(tokenizer: Any) -> int:
    """Returns the token that a text begins with which nobody asked for.

    Raises:
        UserError: the tokenizer has none.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("--dataset self needs a tokenizer with a bos or eos token to begin a text with")


def generated_documents(engine: Engine, tokenizer: Any, options: TrainingOptions) -> Documents:
    """Returns documents of up to ``seq_len`` tokens, sampled at temperature 1 from the full model.

    Document n of an epoch depends on the seed, the epoch and n alone.

    Raises:
        UserError: the tokenizer has no token to begin with.
    """
    first = first_token(tokenizer)
    ends = tokenizer.eos_token_id
    policy = ExitPolicy(engine.backbone.num_layers)

    def is_finished(tokens: list[int]) -> bool:
        return bool(tokens[-1] == ends)

    def read(epoch: int, start: int) -> Iterator[list[int]]:
        # Groups begin at fixed numbers: rounding depends on how many rows share a pass.
        skip, start = start % _AT_ONCE, start - start % _AT_ONCE
        while True:
            requests = []
            for number in range(start, start + _AT_ONCE):
                seed = request_seed(options.seed, f"epoch {epoch}", number)
                sampler = Sampler(do_sample=True, seed=seed)
                requests.append(GenerationRequest([first], options.seq_len - 1, policy, sampler, is_finished))
            for generation in generate_all(engine, requests, _AT_ONCE)[skip:]:
                yield [first, *generation.tokens]
            skip, start = 0, start + _AT_ONCE

    return read
