"""The model of a sweep: answers a request under all points at once, and replays the answers point by point."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import hash_args

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.harness.documents import Document
from dynamax_lm_eval.harness.encoding import EncodedPair
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
    """Answers whatever the harness asks under every point that lacks an answer, then replays the present point's."""

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
        """The arguments that it was loaded with, whichever it follows now."""
        return self._loaded

    def start(self, points: Sequence[SweepPoint]) -> None:
        """Requests that come from now on are answered under these points."""
        self._points = list(points)

    def replay(self, point: SweepPoint) -> None:
        """The harness gets the answers of this point from now on."""
        self.use_policy(point.point.args)
        self._present = point

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        keys = _keys("generate_until", [request.args for request in requests])
        asked = self._missing(keys)
        jobs = [(point.settings, requests[i]) for point, i in asked]
        self._store(asked, keys, self.responder.generations(jobs, disable_tqdm))
        return [r.answer for r in self._replayed("generate_until", [request.args for request in requests], keys)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[EncodedPair],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        documents: Sequence[Document] | None = None,
    ) -> list[tuple[float, bool]]:
        assert documents is not None, "sweeps answer requests of the harness"
        texts = [request[0] for request in requests]
        keys = _keys("loglikelihood", texts)
        asked = self._missing(keys)
        policies = [point.settings.policy for point, _ in asked]
        pairs = [requests[i][1:] for _, i in asked]
        self._store(asked, keys, self.responder.scores(policies, pairs, [documents[i] for _, i in asked], disable_tqdm))
        return [(float(r.answer[0]), bool(r.answer[1])) for r in self._replayed("loglikelihood", texts, keys)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        kind, arguments = "loglikelihood_rolling", [(request.args[0],) for request in requests]
        keys = _keys(kind, arguments)
        asked = self._missing(keys)
        texts = [(point.settings.policy, requests[i]) for point, i in asked]
        self._store(asked, keys, self.responder.rolling_scores(texts, disable_tqdm))
        return [float(r.answer) for r in self._replayed(kind, arguments, keys)]

    def _store(self, asked: Sequence[tuple[SweepPoint, int]], keys: Sequence[str], answers: Answers) -> None:
        """Keeps each answer with its point, on disk as soon as it is known."""
        for index, answer in answers:
            point, request = asked[index]
            value = list(answer.value) if isinstance(answer.value, tuple) else answer.value
            pieces = None if answer.tokens is None else self._pieces(answer.tokens)
            point.store.add(keys[request], Response(value, answer.record, pieces))

    def _missing(self, keys: Sequence[str]) -> list[tuple[SweepPoint, int]]:
        return [(point, i) for i, key in enumerate(keys) for point in self._points if key not in point.store]

    def _replayed(self, kind: str, arguments: Sequence[Iterable[Any]], keys: Sequence[str]) -> list[Response]:
        assert self._present is not None, "a point is replayed"
        responses = [self._present.store[key] for key in keys]
        records = (response.record for response in responses)
        self.response_ledger.keep(kind, zip(arguments, records, strict=True))
        return responses

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self.tok_decode([token], skip_special_tokens=False) for token in tokens]


def _keys(kind: str, arguments: Sequence[Iterable[Any]]) -> list[str]:
    """The harness's hash of each request, with a number that tells repeats of the same one apart."""
    seen: Counter[str] = Counter()
    keys = []
    for args in arguments:
        key = hash_args(kind, args)
        keys.append(f"{key}:{seen[key]}")
        seen[key] += 1
    return keys
