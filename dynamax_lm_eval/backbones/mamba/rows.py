"""Where the rows of a flat batch begin and end, in the forms in which convolutions, scans and kernels want it.

Everything is found on the host and put on the device once for all blocks. Knows numbers of tokens; knows no values.

T tokens of all rows, R rows, K conv kernel, Q chunk length, c chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import on_device, together_on_device

#: Tokens of a chunk. Scores within it cost Q * H values per token, so longer chunks need more memory.
CHUNK = 64


class RaggedRows:
    """The bounds of the rows of a flat batch, and how their tokens fall into chunks."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", chunk: int = CHUNK) -> None:
        """``lengths``: tokens of each row, at least one each; ``chunk``: Q."""
        self.lengths = np.asarray(lengths, dtype=np.int64)
        assert len(self.lengths) and self.lengths.min() > 0
        self.num_tokens = int(self.lengths.sum())
        self.device = torch.device(device)
        self.chunk = min(chunk, int(self.lengths.max()))
        self._edges: dict[int, Edges] = {}

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def single_tokens(self) -> bool:
        """Whether every row has one token, so that the recurrence is one step."""
        return self.num_tokens == self.num_rows

    def edges(self, width: int) -> Edges:
        """Returns where the rows begin and end, for a convolution that sees ``width`` earlier tokens."""
        if width not in self._edges:
            self._edges[width] = self._find_edges(width)
        return self._edges[width]

    def _find_edges(self, width: int) -> Edges:
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        row = np.repeat(np.arange(self.num_rows), np.minimum(self.lengths, width))
        rank = np.concatenate([np.arange(n) for n in np.minimum(self.lengths, width)])

        # Index into (windows of all rows, then all tokens) of the token of a rank in its row; below 0: in the window.
        def index_of(row: np.ndarray, rank: np.ndarray) -> np.ndarray:
            in_window = row * width + width + rank
            indices: np.ndarray = np.where(rank < 0, in_window, self.num_rows * width + starts[row] + rank)
            return indices

        back = np.arange(width, -1, -1)
        seen = index_of(row[:, None], rank[:, None] - back)
        all_rows = np.arange(self.num_rows)[:, None]
        last = index_of(all_rows, self.lengths[:, None] - width + np.arange(width))
        return Edges(*(on_device(indices, self.device) for indices in (starts[row] + rank, seen, last)))

    @cached_property
    def bounds(self) -> Bounds:
        """The rows as kernels of ragged batches want them."""
        row_of = np.repeat(np.arange(self.num_rows, dtype=np.int32), self.lengths)
        ends = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return Bounds(*together_on_device([row_of, ends], self.device))

    @cached_property
    def chunks(self) -> Chunks:
        counts = -(-self.lengths // self.chunk)
        row_of = np.repeat(np.arange(self.num_rows), counts)
        rank = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)  # chunk within its row
        starts = (np.cumsum(self.lengths) - self.lengths)[row_of] + rank * self.chunk
        ends = np.cumsum(self.lengths)[row_of]
        tokens = starts[:, None] + np.arange(self.chunk)
        inside = tokens < ends[:, None]
        whole = bool(inside.all())
        rounds = []
        for i in range(int(counts.max())):
            numbers = np.flatnonzero(rank == i)
            rounds.append((on_device(row_of[numbers], self.device), on_device(numbers, self.device)))
        order = np.argsort(np.concatenate([np.flatnonzero(rank == i) for i in range(int(counts.max()))]))
        return Chunks(
            # Absent tokens point behind the last one, where zeros are.
            tokens=None if whole else on_device(np.where(inside, tokens, self.num_tokens).reshape(-1), self.device),
            present=None if whole else on_device(np.flatnonzero(inside.reshape(-1)), self.device),
            rounds=tuple(rounds),
            order=on_device(order, self.device),
            row_of=on_device(row_of, self.device),
        )


class Bounds(NamedTuple):
    """Which row each token belongs to, and where rows end; int32."""

    row_of: Tensor  # (T,)
    ends: Tensor  # (R + 1,), from 0


class Edges(NamedTuple):
    """The tokens near the beginnings and ends of rows, as indices into (windows of all rows, then all tokens)."""

    first: Tensor  # (f,) tokens that see their row's window, as indices of tokens
    seen_by_first: Tensor  # (f, K) what each of them sees, itself last
    last: Tensor  # (R, K - 1) what the rows' next tokens will see


@dataclass(frozen=True)
class Chunks:
    """The tokens of ragged rows in chunks of equal length; the last chunk of a row may be part empty.

    ``tokens`` and ``present`` are None where every chunk is full.
    """

    tokens: Tensor | None  # (c * Q,) index of each token, T where there is none
    present: Tensor | None  # (T,) indices of the tokens in (c * Q,)
    rounds: tuple[tuple[Tensor, Tensor], ...]  # i-th chunks: their rows, and their numbers
    order: Tensor  # (c,) from the order of rounds to that of chunks
    row_of: Tensor  # (c,)

    def split(self, values: Tensor, chunk: int) -> Tensor:
        """Returns values (T, X) as (c, Q, X), zeros where there is no token."""
        if self.tokens is not None:
            values = F.pad(values, (0, 0, 0, 1)).index_select(0, self.tokens)
        chunks: Tensor = values.unflatten(0, (-1, chunk))
        return chunks

    def join(self, values: Tensor) -> Tensor:
        """Returns values (c, Q, X) as (T, X)."""
        values = values.flatten(0, 1)
        return values if self.present is None else values.index_select(0, self.present)
