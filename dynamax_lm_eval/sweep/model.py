"""The model of a sweep: it answers a request under all points at once, and replays the answers point by point."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.harness.documents import Document, documents_of
from dynamax_lm_eval.harness.encoding import EncodedPair
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.harness.requests import RequestSettings
from dynamax_lm_eval.harness.responder import Answers
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.sweep.options import Point
from dynamax_lm_eval.sweep.store import Response, ResponseStore


@dataclass(frozen=True)
class SweepPoint:
    """A point that this process answers."""

    point: Point
    settings: RequestSettings
    store: ResponseStore


class SweepLM(DynamaxLM):
    """Answers what the harness asks under every point that lacks an answer, then replays the present point's."""

    def __init__(self, pretrained: Any = None, **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        # Processes take points, not documents.
        self._rank, self._world_size = 0, 1
        self._points: list[SweepPoint] = []
        self._present: SweepPoint | None = None

    # Both stay as they are while a sweep runs, and every point asks for them.

    @functools.cached_property
    def weights(self) -> str:
        return super().weights

    @functools.cached_property
    def tokenizer_content(self) -> str:
        return super().tokenizer_content

    @property
    def loaded(self) -> DynamaxArgs:
        """The arguments that the model was loaded with, whichever it follows now."""
        return self._loaded

    def start(self, points: Sequence[SweepPoint]) -> None:
        """Answers requests that come from now on under these points."""
        self._points = list(points)

    def replay(self, point: SweepPoint) -> None:
        """Gives the harness the answers of this point from now on."""
        self.use_policy(point.point.args)
        self._present = point

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        kind, arguments = "generate_until", [request.args for request in requests]
        keys = _keys(kind, arguments)
        missing = self._missing(keys)
        jobs = [(point.settings, requests[i]) for point, i in missing]
        documents = documents_of(requests)
        own = [documents[i] for _, i in missing]
        self._store(missing, keys, self.responder.generations(jobs, own, disable_tqdm))
        return [response.answer for response in self._replayed(kind, arguments, keys)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[EncodedPair],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        documents: Sequence[Document] | None = None,
    ) -> list[tuple[float, bool]]:
        assert documents is not None, "sweeps answer requests of the harness"
        kind, texts = "loglikelihood", [request[0] for request in requests]
        keys = _keys(kind, texts)
        missing = self._missing(keys)
        policies = [point.settings.policy for point, _ in missing]
        pairs = [requests[i][1:] for _, i in missing]
        own = [documents[i] for _, i in missing]
        self._store(missing, keys, self.responder.scores(policies, pairs, own, disable_tqdm))
        responses = self._replayed(kind, texts, keys)
        return [(float(response.answer[0]), bool(response.answer[1])) for response in responses]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        kind, arguments = "loglikelihood_rolling", [(request.args[0],) for request in requests]
        keys = _keys(kind, arguments)
        missing = self._missing(keys)
        policies = [point.settings.policy for point, _ in missing]
        documents = documents_of(requests)
        texts, own = [requests[i].args[0] for _, i in missing], [documents[i] for _, i in missing]
        self._store(missing, keys, self.responder.rolling_scores(policies, texts, own, disable_tqdm))
        return [float(response.answer) for response in self._replayed(kind, arguments, keys)]

    def _store(self, missing: Sequence[tuple[SweepPoint, int]], keys: Sequence[str], answers: Answers) -> None:
        """Keeps each answer with its point, on disk as soon as it is known."""
        with closing(answers):
            for index, answer in answers:
                point, request = missing[index]
                value = list(answer.value) if isinstance(answer.value, tuple) else answer.value
                pieces = None if answer.tokens is None else self._pieces(answer.tokens)
                point.store.add(keys[request], Response(value, answer.record, pieces))

    def _missing(self, keys: Sequence[str]) -> list[tuple[SweepPoint, int]]:
        """Returns the points and the indices of requests that they have no answer to."""
        return [(point, i) for i, key in enumerate(keys) for point in self._points if key not in point.store]

    def _replayed(self, kind: str, arguments: Sequence[Iterable[Any]], keys: Sequence[str]) -> list[Response]:
        """Returns the present point's responses, and tells the ledger of their compute."""
        assert self._present is not None, "a point is replayed"
        responses = [self._present.store[key] for key in keys]
        records = (response.record for response in responses)
        self.response_ledger.keep(kind, zip(arguments, records, strict=True))
        return responses

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """Returns the texts of tokens, one by one."""
        return [self.tok_decode([token], skip_special_tokens=False) for token in tokens]


def _keys(kind: str, arguments: Sequence[Iterable[Any]]) -> list[str]:
    """Returns the keys by which the store of a point knows requests."""
    return [str(key) for key in request_keys((kind, args) for args in arguments)]
