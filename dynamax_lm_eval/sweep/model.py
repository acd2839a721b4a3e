"""The model of a sweep: it answers a request under all points at once, and replays the answers point by point."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness.documents import Document
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.harness.responder import Answers
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.sweep.grid import Point
from dynamax_lm_eval.sweep.store import Response, ResponseStore


@dataclass(frozen=True)
class SweepPoint:
    """A point that this process answers."""

    point: Point
    policy: ExitPolicy
    store: ResponseStore
    #: Names of the tasks that are answered under it, none of them a group.
    tasks: frozenset[str]
    #: Rows in flight, where it is answered apart from all other points; else None.
    rows: int | None = None


class SweepLM(DynamaxLM):
    """Answers what the harness asks under every point that lacks an answer, then replays the present point's."""

    #: Of HFLM: what it gives as ``batch_size``.
    batch_size_per_gpu: Any

    announces = False  # it follows one point after the other

    def __init__(self, backbone: Any = None, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        # Processes take points, not documents.
        self._rank, self._world_size = 0, 1
        self._points: list[SweepPoint] = []
        self._present: SweepPoint | None = None
        self._is_timed = False

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

    @property
    def has_recurrence(self) -> bool:
        """Whether some blocks keep a recurrent state."""
        return self._source.has_recurrence

    @property
    def exits_named(self) -> str | None:
        """The exits at hand as an argument would name them, found by the backbone or named; None without any."""
        return None if self.exits is None else self._loaded.exits or str(self.exits.path)

    def start(self, points: Sequence[SweepPoint], timed: bool = False) -> None:
        """Answers requests that come from now on under these points.

        ``timed``: what is measured will be said of them alone, so a first batch runs before anything is.
        """
        self._points, self._is_timed = list(points), timed
        if timed and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def replay(self, point: SweepPoint) -> None:
        """Gives the harness the answers of this point from now on."""
        self.use_policy(point.point.args)
        self._present = point

    def _respond(
        self,
        kind: str,
        documents: Sequence[Document],
        keys: Sequence[tuple[Any, ...]],
        answer_some: Callable[..., Answers],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answers requests under every point that lacks an answer; returns those of the present point."""
        assert self._present is not None, "a point is replayed"
        names = [str(key) for key in request_keys((kind, key) for key in keys)]
        missing = [
            (point, i)
            for i, name in enumerate(names)
            for point in self._points
            if name not in point.store and documents[i][0] in point.tasks
        ]
        for rows in dict.fromkeys(point.rows for point in self._points):
            together = [(point, i) for point, i in missing if point.rows == rows]
            chosen = [i for _, i in together]
            policies, asked = [point.policy for point, _ in together], [documents[i] for i in chosen]
            with self._in_flight(rows):
                if self._is_timed:
                    self._warm_up(policies, chosen, asked, answer_some)
                self._store(together, names, answer_some(policies, chosen, asked, disable_tqdm))
        responses = [self._present.store[name] for name in names]
        self.response_ledger.keep(kind, zip(keys, (response.record for response in responses), strict=True))
        # JSON knows no tuples.
        return [tuple(r.answer) if isinstance(r.answer, list) else r.answer for r in responses]

    def _warm_up(
        self,
        policies: Sequence[ExitPolicy],
        chosen: Sequence[int],
        asked: Sequence[Document],
        answer_some: Callable[..., Answers],
    ) -> None:
        """Answers a first batch that counts for nothing: libraries load, kernels are chosen, memory is taken."""
        few = slice(0, self.batch_size_per_gpu)
        with self.response_ledger.uncounted(), self.responder.energy.uncounted():
            for _ in answer_some(policies[few], chosen[few], asked[few], True):
                pass

    @contextmanager
    def _in_flight(self, rows: int | None) -> Iterator[None]:
        """Answers with so many rows in flight; None: as many as the sweep has."""
        usual = self.batch_size_per_gpu
        self.batch_size_per_gpu = usual if rows is None else rows
        try:
            yield
        finally:
            self.batch_size_per_gpu = usual

    def _store(self, missing: Sequence[tuple[SweepPoint, int]], names: Sequence[str], answers: Answers) -> None:
        """Keeps each answer with its point, on disk as soon as it is known."""
        with closing(answers):
            for index, answer in answers:
                point, request = missing[index]
                self.response_ledger.count(answer.record)
                value = list(answer.value) if isinstance(answer.value, tuple) else answer.value
                pieces = None if answer.tokens is None else self._pieces(answer.tokens)
                point.store.add(names[request], Response(value, answer.record, pieces))

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """Returns the texts of tokens, one by one."""
        return [self.tok_decode([token], skip_special_tokens=False) for token in tokens]
