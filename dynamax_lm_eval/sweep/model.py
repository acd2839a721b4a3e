"""The model of a sweep: answers a request under all points at once, and replays the answers point by point."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import hash_args

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.lm import DynamaxLM, RequestSettings
from dynamax_lm_eval.sweep.options import Point
from dynamax_lm_eval.sweep.store import Response, ResponseStore


@dataclass(frozen=True)
class SweepPoint:
    """A point that this process answers."""

    point: Point
    setting: RequestSettings
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

        def finished(index: int, text: str, tokens: list[int], record: ComputeRecord) -> None:
            point, request = asked[index]
            point.store.add(keys[request], Response(text, record, self._pieces(tokens)))

        self.answer_generations([(point.setting, requests[i]) for point, i in asked], finished, disable_tqdm)
        return [r.answer for r in self._replayed("generate_until", [request.args for request in requests], keys)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        texts = [request[0] for request in requests]
        keys = _keys("loglikelihood", texts)
        asked = self._missing(keys)

        def finished(index: int, answer: tuple[float, bool], record: ComputeRecord) -> None:
            point, request = asked[index]
            point.store.add(keys[request], Response(list(answer), record))

        pairs = [(context, continuation) for _, context, continuation in requests]
        policies = [point.setting.policy for point, _ in asked]
        documents = self._documents_of(requests)
        named = [documents[i] for _, i in asked]
        self.answer_scorings(policies, [pairs[i] for _, i in asked], named, finished, disable_tqdm)
        return [(float(r.answer[0]), bool(r.answer[1])) for r in self._replayed("loglikelihood", texts, keys)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # Texts have no common beginnings that points could share: each point answers for itself.
        assert self._present is not None
        kind, store = "loglikelihood_rolling", self._present.store
        arguments = [(request.args[0],) for request in requests]
        keys = _keys(kind, arguments)
        missing = [i for i, key in enumerate(keys) if key not in store]
        values = super().loglikelihood_rolling([requests[i] for i in missing], disable_tqdm) if missing else []
        # The ledger has the records of these by now, in the order of their requests.
        seen: Counter[str] = Counter()
        for i, value in zip(missing, values, strict=True):
            request = keys[i].partition(":")[0]
            store.add(keys[i], Response(value, self.response_ledger.find(kind, arguments[i], seen[request])))
            seen[request] += 1
        others = sorted(set(range(len(keys))) - set(missing))
        self._replayed(kind, [arguments[i] for i in others], [keys[i] for i in others])
        return [float(store[key].answer) for key in keys]

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
