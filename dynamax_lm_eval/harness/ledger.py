"""The compute records of responses, found again by the request that they answer.

Knows requests by the harness's hash of their kind and arguments, and which of several equal ones each is. Knows
nothing of texts, models and results.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from lm_eval.api.model import hash_args

from dynamax_lm_eval.compute.accounting import ComputeRecord, ExecutedCompute
from dynamax_lm_eval.harness.cache import RecordCache
from dynamax_lm_eval.harness.latency import Latency
from dynamax_lm_eval.harness.speed import SpeedLog


class RequestKey(NamedTuple):
    """Names one request of a call or of a whole evaluation.

    Attributes:
        kind: of the request, as the harness names it.
        digest: the harness's hash of the kind and the arguments.
        occurrence: how many equal requests come before it.
    """

    kind: str
    digest: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.digest}:{self.occurrence}"

    @staticmethod
    def digest_in(text: str) -> str:
        """Returns the digest of a key that was written as text."""
        return text.partition(":")[0]


def request_keys(requests: Iterable[tuple[str, Iterable[Any]]]) -> list[RequestKey]:
    """Returns the keys of requests (kind, arguments), in their order."""
    digests = [(kind, hash_args(kind, args)) for kind, args in requests]
    return [RequestKey(*pair, count) for pair, count in zip(digests, occurrences(digests), strict=True)]


def occurrences(items: Iterable[Hashable]) -> Iterator[int]:
    """Yields for each item how many equal ones came before it."""
    counts: Counter[Hashable] = Counter()
    for item in items:
        yield counts[item]
        counts[item] += 1


class ResponseLedger:
    """Compute records of responses, found again by the request that they answer.

    The same request may come several times (repeats, equal documents); its records are kept in order. With
    ``--use_cache`` they are also stored beside the responses, so that a run answered from the cache reports the same
    numbers.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[ComputeRecord]] = defaultdict(list)
        self._cache: RecordCache | None = None
        #: Wall-clock seconds spent answering, by kind of request, and the tokens that ran in them.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.fed_tokens = 0
        self.executed = ExecutedCompute()
        #: How long each generation took, by task.
        self.latencies: defaultdict[str, list[Latency]] = defaultdict(list)
        #: The clock against the full model's, where that is measured.
        self.speed = SpeedLog()
        #: An evaluation is under way that will read the records.
        self.is_followed = False

    def start_run(self) -> None:
        """Forgets the records of an earlier evaluation."""
        self._records.clear()
        self.seconds.clear()
        self.fed_tokens = 0
        self.executed = ExecutedCompute()
        self.latencies.clear()
        self.speed = SpeedLog()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Counts neither time nor what runs meanwhile."""
        kept = self.seconds, self.executed, self.latencies, self.speed
        self.seconds, self.latencies = defaultdict(float), defaultdict(list)
        self.executed, self.speed = ExecutedCompute(), SpeedLog()
        try:
            yield
        finally:
            self.seconds, self.executed, self.latencies, self.speed = kept

    def use_database(self, database: MutableMapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Stores records in the harness's cache from now on.

        Raises:
            UserError: the cache cannot be used, see :class:`RecordCache`.
        """
        self._cache = RecordCache(database, identity)

    def leave_database(self) -> None:
        """Stores nothing in the harness's cache from now on."""
        self._cache = None

    def store(self, kind: str, args: Iterable[Any], record: ComputeRecord, answer: Any) -> None:
        """Counts one response, and puts its record beside the cached ``answer``; call it before that is cached."""
        self.count(record)
        if self._cache is not None:
            self._cache.store(hash_args(kind, args), record, answer)

    def count(self, record: ComputeRecord) -> None:
        """Counts one response among what ran in the seconds of this run."""
        self.fed_tokens += record.fed_tokens

    def keep(self, kind: str, responses: Iterable[tuple[Iterable[Any], ComputeRecord]]) -> None:
        """Keeps (arguments, record) of all responses of a call, in the order of its requests.

        The order in which they were finished would not do: samples of the same request differ in compute.
        """
        for args, record in responses:
            self._records[hash_args(kind, args)].append(record)

    def find(self, key: RequestKey) -> ComputeRecord:
        """Returns the record of the response to a request."""
        records = self._records.get(key.digest, [])
        if key.occurrence < len(records):
            return records[key.occurrence]
        if self._cache is not None and (record := self._cache.find(key.digest)) is not None:
            return record
        raise RuntimeError(f"no compute record for a {key.kind} request; was it answered by another model?")
