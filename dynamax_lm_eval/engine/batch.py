"""A flat ragged batch: the tokens of several rows, one row after the other, with what applies to each.

Everything here lives on the host as numpy arrays, so that building a batch needs nothing from the device.

N tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, RowLayout
from dynamax_lm_eval.exits.confidences import Confidence
from dynamax_lm_eval.exits.policy import NEVER, ExitPolicy
from dynamax_lm_eval.exits.vocabulary import RowVocabulary


@dataclass(frozen=True)
class RowInput:
    """The tokens of one row that are fed now.

    Attributes:
        ids: their token ids.
        first_position: position of the first of them; the row's earlier tokens are in the states.
        slot: identifies the row in the states.
        prompt_length: tokens of the row's prompt; logits are needed from position prompt_length - 1 on.
        max_steps: most tokens that the row may produce (N of the decaying threshold).
        policy: the row's exit policy.
        vocabulary: the tokens that its confidence looks at; None: all.
        resumed: for so many tokens at the beginning, which left in earlier passes and may go on, how many blocks each
            has run.
        may_exit: whether tokens that are new may leave.
    """

    ids: Sequence[int]
    first_position: int
    slot: int
    prompt_length: int
    max_steps: int
    policy: ExitPolicy
    vocabulary: RowVocabulary | None = None
    resumed: Sequence[int] = ()
    may_exit: bool = True


class ConfidenceInUse(NamedTuple):
    """A confidence, and whether an adapter corrects what is read out at an exit."""

    confidence: Confidence
    adapted: bool

    @classmethod
    def of(cls, policy: ExitPolicy) -> ConfidenceInUse | None:
        """Returns what rows of a policy use; None where nothing is evaluated."""
        if policy.resolved_confidence is None or not policy.active_exits:
            return None
        return cls(policy.resolved_confidence, policy.adapter != "none")


@dataclass(frozen=True)
class FlatBatch:
    """A batch of N tokens with their rows, their thresholds, and what is needed of them."""

    ids: IntArray  # (N,)
    layout: RowLayout
    policies: tuple[ExitPolicy, ...]  # R
    vocabularies: tuple[RowVocabulary | None, ...]  # R
    thresholds: dict[int, npt.NDArray[np.float32]]  # exit layer -> (N,), NEVER where the token may not exit
    needs_logits: BoolArray  # (N,)
    eligible: BoolArray  # (N,) tokens that policies let exit, wherever that is
    #: The confidences of rows that may exit.
    confidences: tuple[ConfidenceInUse, ...]
    confidence_of_row: IntArray  # (R,) index into confidences; -1 where nothing is evaluated
    #: Exit layer -> (N,) tokens that leave there whatever a confidence says.
    forced: dict[int, BoolArray]
    # exit layer -> (N,) tokens that may not exit and that a recurrent classifier there has to see all the same
    warmup_tokens: dict[int, BoolArray]
    #: (N,) how many blocks each token ran in earlier passes.
    resumed: IntArray
    #: (R,) rows whose tokens leave only to go on later.
    drafts: BoolArray

    @classmethod
    def build(cls, rows: Sequence[RowInput]) -> FlatBatch:
        """Builds the batch of some rows, in their order; all are rows of one backbone."""
        lengths = [len(row.ids) for row in rows]
        row_of = np.repeat(np.arange(len(rows), dtype=np.int64), lengths)
        positions = np.concatenate(
            [np.arange(row.first_position, row.first_position + len(row.ids), dtype=np.int64) for row in rows]
        )
        prompt_lengths = np.asarray([row.prompt_length for row in rows])
        first_eligible = np.asarray([row.policy.first_eligible_position(row.prompt_length) for row in rows])
        steps = positions - first_eligible[row_of]
        drafts = np.asarray([row.policy.drafts for row in rows])
        resumed, drafted, may_exit = _drafts(rows, lengths, drafts)
        num_layers = rows[0].policy.num_layers
        runs_block = np.ones((len(rows), num_layers + 1), dtype=np.bool_)
        for i, row in enumerate(rows):
            runs_block[i, list(row.policy.pruned_blocks)] = False
        layout = RowLayout(
            slots=tuple(row.slot for row in rows),
            row_of=row_of,
            positions=positions,
            state_modes=tuple(row.policy.state_mode for row in rows),
            runs_block=runs_block,
            exit_layers=tuple(sorted({layer for row in rows for layer in row.policy.used_exits})),
            final_block=np.asarray([row.policy.final_block for row in rows]),
            prunes_from=np.asarray([row.policy.first_pruned_position(row.prompt_length) for row in rows]),
            drafted=drafted,
        )
        in_use = [ConfidenceInUse.of(row.policy) for row in rows]
        confidences = tuple(dict.fromkeys(use for use in in_use if use is not None))
        return cls(
            ids=np.fromiter((token for row in rows for token in row.ids), dtype=np.int64, count=len(row_of)),
            layout=layout,
            policies=tuple(row.policy for row in rows),
            vocabularies=tuple(row.vocabulary for row in rows),
            thresholds=_thresholds(rows, layout, steps, may_exit),
            needs_logits=positions >= prompt_lengths[row_of] - 1,
            eligible=steps >= 0,
            confidences=confidences,
            confidence_of_row=np.asarray(
                [-1 if use is None else confidences.index(use) for use in in_use], dtype=np.int64
            ),
            forced=_forced(rows, layout),
            warmup_tokens=_warmup_tokens(rows, layout, steps, may_exit, resumed),
            resumed=resumed,
            drafts=drafts,
        )

    def by_row(self, layers: IntArray) -> list[list[int]]:
        """Returns the layers, given for all tokens (N,), of the eligible ones, row by row."""
        counts = np.bincount(self.layout.row_of[self.eligible], minlength=len(self.policies))
        eligible = layers[self.eligible].tolist()
        ends = np.cumsum(counts).tolist()
        return [eligible[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]

    def answering_by_row(self) -> list[list[int]]:
        """Returns the eligible tokens whose logits are needed, row by row; none of rows in which nothing may exit."""
        tokens: list[list[int]] = [[] for _ in self.policies]
        row_of = self.layout.row_of
        answering = np.flatnonzero(self.eligible & self.needs_logits & (self.confidence_of_row >= 0)[row_of])
        for token, row in zip(answering.tolist(), row_of[answering].tolist(), strict=True):
            tokens[row].append(token)
        return tokens

    @property
    def number_in_row(self) -> IntArray:
        """The number (N,) of each token among those of its row, from 0."""
        row_of = self.layout.row_of
        firsts = np.flatnonzero(np.diff(row_of, prepend=-1))
        number: IntArray = np.arange(len(row_of)) - np.repeat(firsts, np.diff(firsts, append=len(row_of)))
        return number

    @property
    def drafted_slots(self) -> dict[int, int]:
        """The rows, by slot, that feed a token which may be taken back, with the number of that token."""
        numbers = self.layout.drafted
        if numbers is None:
            return {}
        new = np.flatnonzero((numbers > 0) & (self.resumed == 0))
        slots = np.asarray(self.layout.slots, dtype=np.int64)[self.layout.row_of[new]]
        return dict(zip(slots.tolist(), numbers[new].tolist(), strict=True))

    def has_final_block(self, tokens: IntArray) -> BoolArray:
        """Returns which of ``tokens`` (t,) block L runs on after an exit."""
        return self.layout.final_block[self.layout.row_of[tokens]]

    def __len__(self) -> int:
        return len(self.ids)


def _drafts(
    rows: Sequence[RowInput], lengths: Sequence[int], drafts: BoolArray
) -> tuple[IntArray, IntArray | None, BoolArray]:
    """Returns how many blocks each token (N,) ran before, its number among its row's drafts, and whether it may exit.

    ``drafts``: (R,) rows that verify.
    """
    resumed, may_exit = np.zeros(sum(lengths), dtype=np.int64), np.ones(sum(lengths), dtype=np.bool_)
    if not drafts.any():
        return resumed, None, may_exit
    drafted, starts = np.zeros(len(resumed), dtype=np.int64), np.cumsum([0, *lengths])
    for i in np.flatnonzero(drafts).tolist():
        row, start, end = rows[i], int(starts[i]), int(starts[i + 1])
        resumed[start : start + len(row.resumed)] = row.resumed
        may_exit[start:end] = row.may_exit
        if row.first_position >= row.prompt_length:  # all that is drafted is fed, and nothing else
            drafted[start:end] = np.arange(end - start)
    return resumed, drafted if drafted.any() else None, may_exit & (resumed == 0)


def _thresholds(
    rows: Sequence[RowInput], layout: RowLayout, steps: IntArray, may_exit: BoolArray
) -> dict[int, npt.NDArray[np.float32]]:
    table = {layer: np.full(len(steps), NEVER, dtype=np.float32) for layer in layout.exit_layers}
    # Rows whose tokens are compared with the same numbers are one group: all of a policy, unless it decays.
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        if row.policy.active_exits:
            horizon = 0 if row.policy.threshold_decay is None else row.max_steps
            groups.setdefault((id(row.policy), horizon), []).append(i)
    group_of_row = np.full(len(rows), -1, dtype=np.int64)
    for number, members in enumerate(groups.values()):
        group_of_row[members] = number
    group_of = np.where((steps >= 0) & may_exit, group_of_row[layout.row_of], -1)
    for number, members in enumerate(groups.values()):
        policy, max_steps = rows[members[0]].policy, rows[members[0]].max_steps
        tokens = np.flatnonzero(group_of == number)
        if len(tokens) == 0:
            continue
        values = policy.effective_thresholds(steps[tokens], max_steps)
        for column, layer in enumerate(policy.exit_layers):
            if layer in table:
                table[layer][tokens] = values[:, column]
    return table


def _forced(rows: Sequence[RowInput], layout: RowLayout) -> dict[int, BoolArray]:
    table = {}
    layers = {row.policy.prompt_exit_layer for row in rows}
    for layer in sorted(layer for layer in layers if layer is not None):
        leaving = [
            row.policy.num_leaving_prompt(row.prompt_length) if row.policy.prompt_exit_layer == layer else 0
            for row in rows
        ]
        leaves = layout.positions < np.asarray(leaving)[layout.row_of]
        if leaves.any():
            table[layer] = leaves
    return table


def _warmup_tokens(
    rows: Sequence[RowInput], layout: RowLayout, steps: IntArray, may_exit: BoolArray, resumed: IntArray
) -> dict[int, BoolArray]:
    if not any(row.policy.is_recurrent for row in rows):
        return {}
    first = np.asarray([row.policy.first_warmed_position(row.prompt_length) for row in rows])
    # A classifier that sees every token sees those as well that are new and may not leave.
    is_warmup = ((steps < 0) & (layout.positions >= first[layout.row_of])) | ((steps >= 0) & ~may_exit)
    is_warmup &= resumed == 0
    table = {}
    for layer in layout.exit_layers:
        uses = np.asarray([row.policy.is_recurrent and layer in row.policy.active_exits for row in rows])
        table[layer] = is_warmup & uses[layout.row_of]
    return table
