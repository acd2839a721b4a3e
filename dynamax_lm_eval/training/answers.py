"""A pool of texts that the backbone writes itself, as answers to prompts: written once, then trained on in every epoch.

The pool is a file of JSON lines beside the states of a training, so that a training which is killed goes on with it. A
line that was cut off is written again. Its first line says what it was made of.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler, request_seed
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.text import Documents
from dynamax_lm_eval.progress import Bar
from dynamax_lm_eval.training.batches import Answer
from dynamax_lm_eval.training.generated import first_token
from dynamax_lm_eval.training.options import TrainingOptions
from dynamax_lm_eval.training.state import POOL_NAME

#: Answers that are generated together, and of which all are in the file or none; and rows in flight.
_AT_ONCE = 256
_ROWS = 32
#: The last tokens of an answer that are looked at for the texts that end it.
_TAIL = 24


@dataclass(frozen=True)
class Prompt:
    """What the backbone is asked to go on from."""

    text: str
    until: tuple[str, ...] = ()
    max_new_tokens: int = 128
    #: Identifies the document of a task that it was made of.
    document: str = ""


def answers(
    folder: Path, engine: Engine, tokenizer: Any, options: TrainingOptions, prompts: Sequence[Prompt], identity: str
) -> list[Answer]:
    """Returns the pool of a training, after writing what is missing of it.

    With prompts, the greedy answers to them in a seeded order; without, texts sampled at temperature 1 from nothing.
    There are about ``options.self_tokens`` generated tokens, or one answer to each prompt where these give fewer.

    Args:
        folder: where the file of the pool is, or will be.
        engine: runs the backbone.
        tokenizer: of the backbone.
        options: of the training.
        prompts: what to go on from.
        identity: of the backbone's weights.

    Raises:
        UserError: the file there is of something else, or the tokenizer has no token to begin with.
    """
    asked = hashlib.sha256(json.dumps([[p.text, p.until, p.max_new_tokens] for p in prompts]).encode()).hexdigest()
    header = {"backbone": identity, "prompts": asked, "seed": options.seed, "seq_len": options.seq_len}
    requests = _requests(engine, tokenizer, options, prompts)
    path = folder / POOL_NAME
    pool = _read(path, header, len(prompts))
    total = sum(len(answer) - answer.prompt_tokens for answer in pool)
    todo = itertools.islice(requests, len(pool), None)
    with (
        Bar(options.self_tokens, "answers of the backbone", unit="tok", initial=total) as bar,
        path.open("a", encoding="utf-8") as file,
    ):
        while total < options.self_tokens and (group := list(itertools.islice(todo, _AT_ONCE))):
            made = generate_all(engine, group, _ROWS)
            written = [
                Answer([*request.prompt, *result.tokens], len(request.prompt))
                for request, result in zip(group, made, strict=True)
            ]
            file.write("".join(json.dumps([answer.prompt_tokens, answer]) + "\n" for answer in written))
            file.flush()
            pool += written
            new = sum(len(answer) - answer.prompt_tokens for answer in written)
            total += new
            bar.update(new)
    return pool


def _requests(
    engine: Engine, tokenizer: Any, options: TrainingOptions, prompts: Sequence[Prompt]
) -> Iterator[GenerationRequest]:
    policy = ExitPolicy(engine.backbone.num_layers)
    ends = tokenizer.eos_token_id
    if not prompts:
        first = first_token(tokenizer)
        for number in itertools.count():
            sampler = Sampler(do_sample=True, seed=request_seed(options.seed, "pool", number))
            yield GenerationRequest([first], options.seq_len - 1, policy, sampler, lambda tokens: tokens[-1] == ends)
        return
    for index in _order(prompts, options.seed):
        prompt = prompts[index]
        longest = min(prompt.max_new_tokens, options.seq_len // 2)
        ids = list(tokenizer(prompt.text).input_ids)[-(options.seq_len - longest) :]

        def is_finished(tokens: list[int], until: tuple[str, ...] = prompt.until) -> bool:
            if tokens[-1] == ends:
                return True
            tail = tokenizer.decode(tokens[-_TAIL:]) if until else ""
            return any(text in tail for text in until)

        yield GenerationRequest(ids, longest, policy, Sampler(), is_finished)


def _order(prompts: Sequence[Prompt], seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    return order


def documents_used(pool: Sequence[Answer], prompts: Sequence[Prompt], seed: int) -> list[str]:
    """Returns what identifies the documents whose prompts are in a pool."""
    return sorted({prompts[index].document for index in _order(prompts, seed)[: len(pool)]})


def _read(path: Path, header: dict[str, Any], complete: int) -> list[Answer]:
    """Returns what is there of the pool, in whole groups or ``complete``; a file is begun where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        if not lines or json.loads(lines[0]) != header:
            raise ValueError
        read = [json.loads(line) for line in lines[1:]]
        pool = [Answer(map(int, ids), int(prompt_tokens)) for prompt_tokens, ids in read]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, or of another training; remove it, or give the options that it was made with"
        ) from error
    if len(pool) != complete:
        pool = pool[: len(pool) // _AT_ONCE * _AT_ONCE]
    path.write_text("\n".join(lines[: len(pool) + 1]) + "\n", encoding="utf-8")
    return pool


def pool_documents(pool: Sequence[Answer], seed: int) -> Documents:
    """Returns the answers of a pool as documents, in another order in every epoch."""

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        order = np.random.default_rng([seed, epoch]).permutation(len(pool))
        return (pool[i] for i in order[first:].tolist())

    return read


def mixed(own: Documents, corpus: Documents, share: float, longest: int) -> Documents:
    """Returns documents of two kinds, of which ``own`` make up this share of the tokens that are trained on.

    Those of the corpus come in pieces of ``longest`` tokens, so that what is read together is mixed. An epoch ends with
    the corpus; ``own`` begin again as often as that takes.
    """

    def read(epoch: int, first: int) -> Iterator[list[int]]:
        return itertools.islice(_interleaved(own, corpus, share, longest, epoch), first, None)

    return read


def _interleaved(own: Documents, corpus: Documents, share: float, longest: int, epoch: int) -> Iterator[list[int]]:
    tokens = [0, 0]
    # Epochs of the pool are numbered so that no two of the mixture's have the same.
    rounds = (answer for number in itertools.count(epoch << 16) for answer in own(number, 0))
    pieces = (
        document[start : start + longest] for document in corpus(epoch, 0) for start in range(0, len(document), longest)
    )
    for piece in pieces:
        yield piece
        tokens[1] += len(piece)
        while tokens[0] * (1 - share) < tokens[1] * share:
            answer = next(rounds)
            tokens[0] += len(answer) - getattr(answer, "prompt_tokens", 0)
            yield answer
