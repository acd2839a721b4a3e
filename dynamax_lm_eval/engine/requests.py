"""The engine's requests and their results: token ids in; token ids, log-probabilities and traces out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.exits.policy import ExitPolicy


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and what to do with it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        policy: when its tokens exit.
        sampler: chooses its tokens.
        is_finished: called with the generated ids after each token; True ends the generation.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    policy: ExitPolicy
    sampler: Sampler
    is_finished: Callable[[list[int]], bool]


@dataclass(frozen=True)
class Generation:
    """The generated ids (the token that ended it included) and the trace of the request, as if it were alone.

    ``shared_tokens``: so many tokens at the beginning have their states from a prefix that ran before.
    """

    tokens: list[int]
    trace: Trace
    shared_tokens: int = 0
    #: When its prompt began to run, and when its first and its last token were known, in seconds of a clock.
    times: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), compare=False)


@dataclass(frozen=True)
class ScoringRequest:
    """A text to score.

    Attributes:
        ids: the tokens that are fed: context and continuation without its last token.
        context_length: how many of them are context, at least one.
        targets: for each position from context_length - 1 on, the tokens whose probability is asked for: one,
            and at the last position one per continuation that differs only there.
        policy: when its tokens exit.
    """

    ids: Sequence[int]
    context_length: int
    targets: Sequence[Sequence[int]]
    policy: ExitPolicy


@dataclass(frozen=True)
class Scoring:
    """The log-probabilities and arg-maxes at the positions asked for; the rest is as in :class:`Generation`."""

    log_probs: list[list[float]]  # of the targets, in their shape
    greedy_tokens: list[int]
    trace: Trace
    shared_tokens: int = 0
