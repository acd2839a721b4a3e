"""The rows of a pass as kernels take them: those that move on step by step, new ones side by side, others padded.

Everything is found on the host and put on the device once for all blocks. Knows numbers of tokens and lines of state
tables; knows no values.

T tokens of R rows, T' of them in the order of groups with their padding, K conv kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, on_device, together_on_device
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows


class KernelRows:
    """The rows of a pass and the lines of a table in which their states stand."""

    def __init__(
        self,
        rows: RaggedRows,
        numbers: IntArray,
        lines: slice | Tensor,
        is_new: BoolArray,
        indices: Tensor | None = None,
    ) -> None:
        """
        Args:
            rows: the rows' tokens.
            numbers: (R,) their lines.
            lines: the same, as of :func:`state_cache.lines_of`.
            is_new: (R,) whose lines are those of a row that has seen nothing.
            indices: (R,) the lines in int32, where they are on the device already.
        """
        self.rows = rows
        self.lines = lines
        self.all_new = bool(is_new.all())
        self._numbers = numbers
        self._is_new = is_new
        self._groups: dict[tuple[int, int, bool], Groups] = {}
        self._indices = indices

    @property
    def indices(self) -> Tensor:
        """The rows' lines, (R,) int32."""
        if self._indices is None:
            self._indices = on_device(self._numbers.astype(np.int32), self.rows.device)
        return self._indices

    def in_place(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a table, and the rows' lines of it in int32; None where these are what is returned, in order."""
        return (table[self.lines], None) if isinstance(self.lines, slice) else (table, self.indices)

    def groups(self, width: int, most_steps: int, padded: bool) -> Groups:
        """Returns the groups.

        Args:
            width: earlier tokens that the convolution sees, K - 1.
            most_steps: rows of at most so many tokens move on step by step.
            padded: longer rows that have a past are padded, and where all rows are new none steps; otherwise all longer
                rows stand side by side.
        """
        key = width, most_steps, padded
        if key not in self._groups:
            self._groups[key] = self._find_groups(*key)
        return self._groups[key]

    def _find_groups(self, width: int, most_steps: int, padded: bool) -> Groups:
        lengths, num_tokens = self.rows.lengths, self.rows.num_tokens
        starts = np.cumsum(lengths) - lengths
        steps = (lengths <= most_steps) & (not (padded and self.all_new))
        longer = ~steps & (self._is_new | (not padded))
        stepping, beside, aside = (np.flatnonzero(mask) for mask in (steps, longer, ~steps & ~longer))
        stepping = stepping[np.argsort(-lengths[stepping], kind="stable")]
        most = int(lengths[stepping].max(initial=0))
        counts = [int((lengths[stepping] > i).sum()) for i in range(most)]
        rank = np.arange(int(lengths[aside].max(initial=0)))
        rectangle = np.where(rank < lengths[aside, None], starts[aside, None] + rank, num_tokens)
        tokens = np.concatenate(
            [starts[stepping[:count]] + i for i, count in enumerate(counts)]
            + [np.arange(starts[row], starts[row] + lengths[row]) for row in beside]
            + [rectangle.reshape(-1)]
        )
        present = np.flatnonzero(tokens < num_tokens)
        place = np.empty(num_tokens, dtype=np.int64)
        place[tokens[present]] = present
        lines = [self._numbers[group] for group in (stepping, beside, aside)]
        any_token = np.minimum(tokens, num_tokens - 1)
        put = self._put(tokens, any_token, place, *lines)
        is_same = np.array_equal(tokens, np.arange(num_tokens))
        return Groups(
            order=None if is_same else GroupOrder(*put[:3]),
            steps=tuple(counts),
            step_lines=put[3].int(),
            beside=self._side_by_side(beside),
            beside_lines=put[4],
            aside=(len(aside), len(rank)) if len(aside) else None,
            aside_lines=put[5],
            windows=self._find_windows(width, any_token),
        )

    def _side_by_side(self, rows: IntArray) -> RaggedRows | None:
        if len(rows) == self.rows.num_rows:
            return self.rows
        return RaggedRows(self.rows.lengths[rows].tolist(), self.rows.device) if len(rows) else None

    def _find_windows(self, width: int, in_groups: IntArray) -> Windows:
        lengths, num_rows = self.rows.lengths, self.rows.num_rows
        numbers, tokens = np.arange(num_rows), np.arange(self.rows.num_tokens)
        starts = np.cumsum(lengths) - lengths
        places = tokens + width * (np.repeat(numbers, lengths) + 1)
        earlier = (starts + width * numbers)[:, None] + np.arange(width)  # (R, K - 1)
        source = np.empty(len(tokens) + width * num_rows, dtype=np.int64)
        source[places] = tokens + width * num_rows
        source[earlier.reshape(-1)] = np.arange(width * num_rows)
        rank = lengths[:, None] + np.arange(-width, 0)  # (R, K - 1)
        absent = (rank < 0).reshape(-1, 1)
        put = self._put(
            self._numbers,
            source,
            np.repeat(numbers, lengths + width),
            places[in_groups],
            earlier + lengths[:, None],
            starts[:, None] + np.maximum(rank, 0),
        )
        return Windows(
            lines=put[0],
            source=put[1],
            row_of=put[2].int(),
            tokens=put[3],
            after=put[4],
            last=put[5],
            absent=on_device(absent, self.rows.device) if absent.any() else None,
        )

    def _put(self, *parts: IntArray) -> tuple[Tensor, ...]:
        """Puts indices on the device, flat."""
        return tuple(together_on_device([part.reshape(-1) for part in parts], self.rows.device))


@dataclass(frozen=True)
class Groups:
    """Tokens in the order of groups: the first of all rows that step, their second ones, ..., new rows, padded rows."""

    order: GroupOrder | None  # None: that of the rows
    steps: tuple[int, ...]  # how many rows step for the i-th time
    step_lines: Tensor  # int32; the i-th step is of the first so many
    beside: RaggedRows | None  # rows side by side; None: there are none
    beside_lines: Tensor
    aside: tuple[int, int] | None  # how many rows are padded, to how many tokens; None: there are none
    aside_lines: Tensor
    windows: Windows

    @property
    def is_steps(self) -> bool:
        """Whether all rows move on step by step."""
        return self.beside is None and self.aside is None


@dataclass(frozen=True)
class GroupOrder:
    """From tokens as they stand in their rows to the order of groups, and back."""

    tokens: Tensor  # (T',) T where there is none
    present: Tensor  # (T',) any token where there is none
    place: Tensor  # (T,)


@dataclass(frozen=True)
class Windows:
    """Rows side by side, each behind the K - 1 tokens that its convolution remembers: T + R * (K - 1) tokens."""

    lines: Tensor  # (R,) of the rows in a table
    source: Tensor  # indices of these tokens into (windows of all rows, then all tokens)
    row_of: Tensor  # int32
    tokens: Tensor  # (T',) where the rows' tokens are in these, in the order of groups
    after: Tensor  # (R * (K - 1),) where those are that the next tokens will see
    last: Tensor  # (R * (K - 1),) the same among the rows' tokens alone; any where a row is too short
    absent: Tensor | None  # (R * (K - 1), 1) where it is; None: nowhere
