"""From the harness's requests to the engine and back: texts in, answers with their compute out.

Tokenises, shares rows, seeds samplers and shows progress. Every answer is yielded
as soon as it is known; what becomes of it (the harness's cache, a sweep's files) is the caller's business.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lm_eval import utils

from dynamax_lm_eval.compute.accounting import ComputeRecord, merge
from dynamax_lm_eval.compute.repetition import ends_in_repetition
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.generation import generate
from dynamax_lm_eval.engine.prefixes import PrefixRun
from dynamax_lm_eval.engine.requests import Generation, GenerationRequest, Scoring, ScoringRequest
from dynamax_lm_eval.engine.sampling import request_seed
from dynamax_lm_eval.engine.scoring import score
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness import describe, evaluate, rows
from dynamax_lm_eval.harness.documents import Document, document_of, documents_of, naming_document, of_document
from dynamax_lm_eval.harness.encoding import TokenPair, encode_pair, fit, needed_prefix
from dynamax_lm_eval.harness.energy import EnergyMeter
from dynamax_lm_eval.harness.latency import Latency
from dynamax_lm_eval.harness.ledger import ResponseLedger, occurrences
from dynamax_lm_eval.harness.requests import PreparedArguments, PreparedGeneration, RequestSettings
from dynamax_lm_eval.harness.speed import paired
from dynamax_lm_eval.progress import Bar, over

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """An answer for the harness, and its compute.

    Attributes:
        value: a text, (log-likelihood, is_greedy), or a log-likelihood.
        record: the compute.
        tokens: of a generation; else None.
    """

    value: Any
    record: ComputeRecord
    tokens: Sequence[int] | None = None


Answers = Generator[tuple[int, Answer], None, None]


class Responder:
    """Answers requests of the harness with the engine of a model."""

    def __init__(self, lm: Any, ledger: ResponseLedger) -> None:
        """Takes the model and the ledger that is told of what ran.

        Args:
            lm: the model, for its engine, tokenizer, limits and arguments as they are when requests come.
            ledger: is told how long answers took and what really ran for them.
        """
        self._lm = lm
        self._ledger = ledger
        #: Of what computes the answers.
        self.energy = EnergyMeter.on([place.device for place in lm.engine.backbone.places])

    def generations(
        self,
        requests: Sequence[tuple[RequestSettings, Any]],
        documents: Sequence[Document],
        disable_tqdm: bool = False,
    ) -> Answers:
        """Yields the index and the text of ``generate_until`` requests, each under settings of its own."""
        if not requests:
            return
        lm = self._lm
        end = lm.eot_token_id
        eos = None if end is None else lm.tok_decode(end, skip_special_tokens=False)
        arguments = PreparedArguments(lm)  # most requests of a call share theirs
        prepared = []
        for document, (settings, request) in zip(documents, requests, strict=True):
            with of_document(document):
                prepared.append(PreparedGeneration(lm, settings, request, eos, arguments))
        _seed_samplers([settings for settings, _ in requests], prepared)
        longest = max(len(job.request.prompt) + job.request.max_new_tokens for job in prepared)
        jobs = [job.request for job in prepared]
        batch = rows.batch_rows(lm, longest)
        in_flight = rows.rows_in_flight(lm, [job.policy for job in jobs], batch, longest)

        def run(some: Sequence[GenerationRequest]) -> Generator[tuple[int, Generation], None, list[PrefixRun]]:
            full = not any(request.policy.active_exits for request in some)
            return generate(lm.engine, some, batch, lm.args.prefix_caching, batch if full else in_flight)

        running, measured = run(jobs), len(self._ledger.speed.pairs)
        if lm.args.measure_speed:
            running = paired(jobs, batch, run, time.perf_counter, self._ledger.speed)

        def answer(index: int, generation: Generation) -> Answer:
            job, tokens = prepared[index], generation.tokens
            record = self._account(generation.trace, job.request.policy)
            record.degenerate = int(ends_in_repetition(tokens, lm.args.degenerate_ngram, lm.args.degenerate_tokens))
            return Answer(job.text(tokens), record, tokens)

        with (
            self._timed("generate_until"),
            self._progress([job.policy for job in jobs], "generate_until", disable_tqdm) as progress,
            naming_document(documents),
        ):
            for index, generation in self._driven(running):
                result = answer(index, generation)
                self._ledger.latencies[documents[index][0]].append(latency_of(generation))
                progress.advance(result.record)
                yield index, result
        # What the full model took for comparison is no part of the run.
        self._ledger.seconds["generate_until"] -= sum(full for _, full in self._ledger.speed.pairs[measured:])

    def encode(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[TokenPair]:
        """Returns the token ids of the contexts and continuations of ``loglikelihood`` requests.

        Raises:
            UserError: one of them cannot be scored; names its document.
        """
        evaluate.check_followed(self._ledger, describe.needs_tasks(self._lm), by_hand=self._lm.certified is None)
        if self._lm.enable_thinking:
            tasks = sorted({task for task, _ in documents_of(requests)})
            raise UserError(f"enable_thinking=true is for generations only, and {', '.join(tasks)} asks for scores")
        pairs = []
        for request in over(requests, "Tokenizing inputs", disable=disable_tqdm):
            with of_document(document_of(request)):
                pairs.append(encode_pair(self._lm, *request.args))
        return pairs

    def scores(
        self,
        policies: Sequence[ExitPolicy],
        pairs: Sequence[TokenPair],
        documents: Sequence[Document],
        disable_tqdm: bool = False,
    ) -> Answers:
        """Yields the index and (log-likelihood, is_greedy) of token pairs, each under a policy of its own."""
        kind = "loglikelihood"
        with self._timed(kind), self._progress(policies, kind, disable_tqdm) as progress:
            for index, answer in self._score(policies, pairs, documents):
                progress.advance(answer.record)
                yield index, answer

    def rolling_scores(
        self,
        policies: Sequence[ExitPolicy],
        texts: Sequence[str],
        documents: Sequence[Document],
        disable_tqdm: bool = False,
    ) -> Answers:
        """Yields the index and the log-likelihood of whole texts, scored in windows of the model's length."""
        lm, kind = self._lm, "loglikelihood_rolling"
        windows: list[TokenPair] = []
        owner: list[int] = []
        for index, text in enumerate(texts):
            with of_document(documents[index]):
                tokens = lm.tok_encode(text)
                prefix = needed_prefix(lm) if tokens else 0
            rolling = utils.get_rolling_token_windows(
                token_list=tokens, prefix_token=prefix, max_seq_len=lm.max_length, context_len=1
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append(window)
                owner.append(index)

        sums = [0.0] * len(texts)
        parts: list[list[ComputeRecord]] = [[] for _ in texts]
        open_windows = Counter(owner)

        def whole(index: int) -> tuple[int, Answer]:
            answer = Answer(sums[index], merge(parts[index]))
            progress.advance(answer.record)
            return index, answer

        with self._timed(kind), self._progress(policies, kind, disable_tqdm) as progress:
            for index in range(len(texts)):
                if not open_windows[index]:  # an empty text has no windows and log-likelihood 0
                    yield whole(index)
            of_windows = [policies[index] for index in owner], windows, [documents[index] for index in owner]
            for window, answer in self._score(*of_windows):
                index = owner[window]
                sums[index] += answer.value[0]
                parts[index].append(answer.record)
                open_windows[index] -= 1
                if not open_windows[index]:
                    yield whole(index)

    def _score(
        self, policies: Sequence[ExitPolicy], pairs: Sequence[TokenPair], documents: Sequence[Document]
    ) -> Answers:
        """Scores token pairs of documents.

        Pairs with the same context that differ only in the last token share one row (unless
        ``logits_cache=False``): the split between context and continuation decides who may exit, so it is
        part of what must be equal.
        """
        lm = self._lm
        policies = [policy.for_scores for policy in policies]
        groups: dict[Any, list[int]] = {}
        texts: list[tuple[list[int], int, ExitPolicy]] = []
        for index, (policy, (context, continuation)) in enumerate(zip(policies, pairs, strict=True)):
            with of_document(documents[index]):
                ids, context_length = fit(lm, context, continuation)
            key = (tuple(ids), context_length, policy) if lm.logits_cache else index
            if key not in groups:
                groups[key] = []
                texts.append((ids, context_length, policy))
            groups[key].append(index)
        members = list(groups.values())
        requests = [
            ScoringRequest(
                ids=ids,
                context_length=context_length,
                targets=[
                    *([token] for token in ids[context_length:]),
                    [pairs[index][1][-1] for index in group],
                ],
                policy=policy,
            )
            for (ids, context_length, policy), group in zip(texts, members, strict=True)
        ]
        longest = max((len(request.ids) for request in requests), default=1)
        batch = rows.batch_rows(lm, longest)
        running = score(lm.engine, requests, batch, lm.softmax_dtype, lm.args.prefix_caching)
        with naming_document(documents, [group[0] for group in members]):
            for row, scoring in self._driven(running):
                record = self._account(scoring.trace, requests[row].policy)
                for index, value in _shared_row(scoring, requests[row], members[row]):
                    yield index, Answer(value, record)

    def _driven(self, running: Generator[tuple[int, Result], None, list[PrefixRun]]) -> Iterator[tuple[int, Result]]:
        """Yields what the engine yields; what it ran for prefixes is counted in the end."""
        runs = yield from running
        for run in runs:
            record = self._lm.engine.account(run.trace, run.policy)
            self._ledger.executed.add_prefix(record, run.uses)

    def _account(self, trace: Trace, policy: ExitPolicy) -> ComputeRecord:
        record: ComputeRecord = self._lm.engine.account(trace, policy)
        self._ledger.executed.add_row(record)
        return record

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.energy.counting():
                yield
        finally:
            self._ledger.seconds[kind] += time.perf_counter() - start

    @contextmanager
    def _progress(self, policies: Sequence[ExitPolicy], kind: str, disable: bool) -> Iterator[Progress]:
        """Shows how many requests are answered, each under one of ``policies``."""
        is_one = all(policy is policies[0] for policy in policies)
        with Bar(len(policies), f"Running {kind} requests", disable=disable or self._lm.rank != 0) as bar:
            yield Progress(bar, shows_reduction=is_one)


def latency_of(generation: Generation) -> Latency:
    """Returns how long a generation took."""
    began, first, last = generation.times
    later = len(generation.tokens) - 1
    return Latency(first - began, (last - first) / later if later else None)


class Progress:
    """A progress bar that also shows the reduction so far, as soon as a token was allowed to exit."""

    def __init__(self, bar: Bar, shows_reduction: bool) -> None:
        """``shows_reduction``: False where requests follow several policies, of which it would be a mixture."""
        self._bar, self._shows_reduction = bar, shows_reduction
        self._full = 0
        self._spent = 0

    def advance(self, record: ComputeRecord) -> None:
        self._full += record.full_macs
        self._spent += record.spent_macs
        if self._shows_reduction and self._full and self._spent:
            self._bar.show(f"compute_reduction={self._full / self._spent:.3f}")
        self._bar.update()


def _shared_row(
    scoring: Scoring, request: ScoringRequest, members: Sequence[int]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yields each member of a row with its (log-likelihood, is_greedy); their last tokens are the last targets."""
    common = sum(log_probs[0] for log_probs in scoring.log_probs[:-1])
    common_greedy = all(
        token == target[0] for token, target in zip(scoring.greedy_tokens[:-1], request.targets[:-1], strict=True)
    )
    for index, last, target in zip(members, scoring.log_probs[-1], request.targets[-1], strict=True):
        yield index, (common + last, common_greedy and scoring.greedy_tokens[-1] == target)


def _seed_samplers(settings: Sequence[RequestSettings], prepared: Sequence[PreparedGeneration]) -> None:
    """Gives every request that samples a random stream of its own, whatever else is in the batch."""
    keys = [(setting, job.key) for setting, job in zip(settings, prepared, strict=True)]
    for job, occurrence in zip(prepared, occurrences(keys), strict=True):
        if job.request.sampler.do_sample:
            job.request.sampler.seed = request_seed(torch.initial_seed(), job.key, occurrence)
