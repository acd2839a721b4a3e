"""Micro-batches of training text, and the place in the data from which a resumed training goes on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dynamax_lm_eval.backbones.base import BoolArray, IntArray
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen.text import Documents

logger = logging.getLogger(__name__)


class Answer(list[int]):
    """Token ids of a prompt and of what a model wrote after it: only the latter may leave early."""

    def __init__(self, ids: Iterable[int], prompt_tokens: int) -> None:
        super().__init__(ids)
        self.prompt_tokens = prompt_tokens


def row_of(document: list[int], first: int, last: int) -> list[int]:
    """Returns part of a document; of an answer without its prompt nothing may leave."""
    if not isinstance(document, Answer):
        return document[first:last]
    return Answer(document[first:last], document.prompt_tokens if first == 0 else last - first)


def labelled(rows: Sequence[Sequence[int]]) -> BoolArray:
    """Returns the tokens (N,) of rows at which exits are trained: of answers, those that may leave; else all."""
    return np.concatenate([np.arange(len(row)) >= getattr(row, "prompt_tokens", 0) for row in rows])


def first_to_leave(rows: Sequence[Sequence[int]]) -> IntArray:
    """Returns the first token of each row that may leave, (R,)."""
    return np.asarray([getattr(row, "prompt_tokens", 1) for row in rows], dtype=np.int64)


@dataclass(frozen=True)
class Position:
    """Where a stream stands: the next token is ``offset`` of document ``document`` in epoch ``epoch``."""

    epoch: int = 0
    document: int = 0
    offset: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class MicroBatches:
    """Endless micro-batches of exactly ``num_tokens`` tokens: rows of at most ``seq_len``, each of one document."""

    def __init__(self, documents: Documents, num_tokens: int, seq_len: int, start: Position | None = None) -> None:
        self._documents = documents
        self._num_tokens = num_tokens
        self._seq_len = seq_len
        #: Where the next micro-batch begins.
        self.position = start or Position()
        self._stream: Iterator[tuple[Position, list[int]]] | None = None
        self._document: list[int] = []

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        rows: list[list[int]] = []
        tokens_left = self._num_tokens
        while tokens_left:
            if self.position.offset >= len(self._document):
                self._open_next()
            position = self.position
            end = min(len(self._document), position.offset + min(tokens_left, self._seq_len))
            row = row_of(self._document, position.offset, end)
            self.position = Position(position.epoch, position.document, position.offset + len(row))
            tokens_left -= len(row)
            rows.append(row)
        return rows

    def _open_next(self) -> None:
        if self._stream is None:
            self._stream = self._from(self.position)
        self.position, self._document = next(self._stream)

    def _from(self, start: Position) -> Iterator[tuple[Position, list[int]]]:
        """Yields documents with text left, and where to begin in them, over epochs without end."""
        for epoch in itertools.count(start.epoch):
            first = start.document if epoch == start.epoch else 0
            any_text = False
            for number, tokens in enumerate(self._documents(epoch, first), first):
                offset = start.offset if (epoch, number) == (start.epoch, start.document) else 0
                if len(tokens) > offset:
                    any_text = True
                    yield Position(epoch, number, offset), tokens
            if not any_text and first == 0 and start.offset == 0:
                raise UserError("there is no text to train on; check --dataset, --text_column and --eval_tokens")
            logger.info("All text was seen %d times; going on with it in another order", epoch + 1)
