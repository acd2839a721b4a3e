"""Decides which tokens leave at an exit layer, and at which hidden state each token is read out.

N tokens of the batch, n in flight, t of them evaluated, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE, Backbone, BoolArray, IntArray, on_device
from dynamax_lm_eval.engine.batch import ConfidenceInUse, FlatBatch
from dynamax_lm_eval.engine.subsets import SubsetReader, rows_of_one_size
from dynamax_lm_eval.engine.tokens import WaitingTokens, select
from dynamax_lm_eval.errors import NotFiniteError
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.exits.classifiers import ExitClassifiers, exit_probability
from dynamax_lm_eval.exits.confidences import CascadeConfidence, Confidence, ExitInputs
from dynamax_lm_eval.exits.policy import NEVER
from dynamax_lm_eval.exits.states import ClassifierStates
from dynamax_lm_eval.models.placement import moved


class LogitsCollector(Protocol):
    """A collector of the logits of the tokens that need them, reduced to what its owner needs of them."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        """Returns what is kept of logits (T, V) of these tokens, (T, anything). Called before it is known who exits."""
        ...

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        """Keeps the reduced logits at which these tokens were read out. Called once for each token that needs them."""
        ...


class NoLogits(LogitsCollector):
    """The collector of batches none of whose tokens needs logits."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        raise AssertionError("no logits are needed")

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        raise AssertionError("no logits are needed")


class _Evaluation(NamedTuple):
    """One confidence of some tokens at an exit layer."""

    use: ConfidenceInUse
    indices: IntArray  # (t,) of its tokens among those in flight
    scores: Tensor  # (t,) float32, still on the device
    adapter: Adapter | None
    corrected: Tensor | None  # (t, D) by the adapter, where the confidence has needed that
    reduced: Sequence[Tensor]  # of the tokens that need logits, where the decision read them
    looked_at: Tensor | None = None  # (t, N) logits of a part of the vocabulary, where the decision read them


class Confidences(NamedTuple):
    """The confidences with which some tokens were decided upon at an exit layer: of those that give an answer."""

    block: int
    tokens: IntArray  # (t,)
    scores: npt.NDArray[np.float32]  # (t,)


class ExitDecisions:
    """The decisions at the exit layers of one pass: who leaves, and what logits a collector gets."""

    def __init__(
        self,
        batch: FlatBatch,
        backbone: Backbone,
        exits: ExitClassifiers | None,
        states: ClassifierStates,
        collector: LogitsCollector,
        prune_adapters: Mapping[str, Adapter],
    ) -> None:
        self._batch = batch
        self._prune_adapters = prune_adapters
        self._backbone = backbone
        self._exits = exits
        self._states = states
        self._collector = collector
        self._slots = np.asarray(batch.layout.slots, dtype=np.int64)[batch.layout.row_of]  # (N,)
        # One read for all: the LM head's weights are most of what a read costs.
        self._unread = WaitingTokens()
        #: Drafts that are chosen from a part of the vocabulary.
        self._partly_unread = WaitingTokens()
        self._subsets: dict[ConfidenceInUse, SubsetReader] = {}
        #: For each token (N,) the exits at which a read refused to confirm a proposal, as bits in their policy's order.
        self.refused = np.zeros(len(batch), dtype=np.int64)
        #: Of the exit layers so far, in order.
        self.confidences: list[Confidences] = []

    def leaving(self, block: int, tokens: IntArray, before: Tensor, hidden: Tensor) -> BoolArray | None:
        """Returns which of the tokens in flight exit after ``block``, (n,); None where none may.

        Args:
            block: the number of blocks that have run.
            tokens: (n,) in flight.
            before: (1, n, D) their hidden states before the block.
            hidden: (1, n, D) and after it.

        Raises:
            NotFiniteError: with the row of the first confidence that is no number.
        """
        candidates, forced = self._candidates(block, tokens), self._batch.forced.get(block)
        if len(candidates) == 0:
            return None if forced is None else forced[tokens]
        in_use = self._batch.confidence_of_row[self._batch.layout.row_of[tokens[candidates]]]
        evaluations = [
            self._evaluate(use, block, tokens, indices, before, hidden)
            for i, use in enumerate(self._batch.confidences)
            if len(indices := candidates[in_use == i])
        ]
        # The only wait for the device. The thresholds are on the host, so nothing goes there for a comparison.
        scores = _joined([evaluation.scores for evaluation in evaluations]).cpu().numpy()
        indices = np.concatenate([evaluation.indices for evaluation in evaluations])
        if len(broken := np.flatnonzero(~np.isfinite(scores))):
            name = [found.use.confidence.name for found in evaluations for _ in found.indices][broken[0]]
            row = int(self._batch.layout.row_of[tokens[indices[broken[0]]]])
            raise NotFiniteError(row, f"{name} confidences at exit layer {block}")
        leaves = np.zeros(len(tokens), dtype=np.bool_) if forced is None else forced[tokens]
        leaves[indices] |= scores >= self._batch.thresholds[block][tokens[indices]]
        self._note_confidences(block, tokens[indices], scores)
        for evaluation in evaluations:
            if isinstance(evaluation.use.confidence, CascadeConfidence):
                self._note_refused(block, tokens[evaluation.indices[~leaves[evaluation.indices]]])
            self._keep_logits(evaluation, leaves, tokens, hidden)
        return leaves

    def _note_confidences(self, block: int, tokens: IntArray, scores: npt.NDArray[np.float32]) -> None:
        """Notes the confidences of those of tokens (t,) that could leave and whose logits are needed."""
        noted = np.flatnonzero(self._batch.needs_logits[tokens] & (self._batch.thresholds[block][tokens] < NEVER))
        if len(noted):
            self.confidences.append(Confidences(block, tokens[noted], scores[noted]))

    def _note_refused(self, block: int, tokens: IntArray) -> None:
        """Notes the tokens (t,) that were read out at an exit and stay."""
        for token in tokens.tolist():
            policy = self._batch.policies[self._batch.layout.row_of[token]]
            self.refused[token] |= 1 << policy.active_exits.index(block)

    def read_out(self, tokens: IntArray, hidden: Tensor) -> None:
        """Reads out what the decisions did not: tokens (n,) at the end of the pass, and those that left unread."""
        unread = self.unread(tokens, hidden)
        if unread is not None:
            tokens, hidden = unread
            for part, logits in self._logits(hidden[0]):
                self._collector.store(tokens[part], self._collector.reduce(tokens[part], logits))

    def unread(self, tokens: IntArray, hidden: Tensor) -> tuple[IntArray, Tensor] | None:
        """Returns what :meth:`read_out` would read: tokens (u,) in order and hidden states (1, u, D); None: nothing."""
        self._read_partly()
        needs_logits = np.flatnonzero(self._batch.needs_logits[tokens])
        tokens, hidden = tokens[needs_logits], select(hidden, needs_logits)
        self._unread.add(tokens, self._healed(tokens, hidden))
        if not self._unread:
            return None
        tokens, hidden = self._unread.in_order()
        # Exits may be on several devices, and those that wait to be read are read together.
        return tokens, moved(hidden, self._backbone.places[-1].device)

    def _healed(self, tokens: IntArray, hidden: Tensor) -> Tensor:
        """Returns what is read out of tokens (n,) that ran to the end, (1, n, D): through adapters of pruned models."""
        keys = [policy.prune_adapter for policy in self._batch.policies]
        if len(tokens) == 0 or not any(keys):
            return hidden
        layout = self._batch.layout
        rows = layout.row_of[tokens]
        is_pruned = layout.positions[tokens] >= layout.prunes_from[rows]
        hidden = moved(hidden, self._backbone.places[-1].device)
        for key in dict.fromkeys(key for key in keys if key is not None):
            own = np.flatnonzero(is_pruned & np.asarray([name == key for name in keys])[rows])
            if len(own):
                indices = on_device(own, hidden.device)
                hidden = hidden.index_copy(1, indices, self._prune_adapters[key](hidden[0, indices]).unsqueeze(0))
        return hidden

    def _read_partly(self) -> None:
        """Reads out the drafts that are chosen from a part of the vocabulary, which no decision has read."""
        if not self._partly_unread:
            return
        tokens, hidden = self._partly_unread.in_order()
        hidden = moved(hidden, self._backbone.places[-1].device)
        row_of = self._batch.layout.row_of[tokens]
        looked_at = [vocabulary if row in row_of else None for row, vocabulary in enumerate(self._batch.vocabularies)]
        for rows in rows_of_one_size(looked_at):
            own = np.flatnonzero(np.isin(row_of, rows))
            reader = SubsetReader(self._backbone, [looked if i in rows else None for i, looked in enumerate(looked_at)])
            logits = reader.logits(hidden[0][on_device(own, hidden.device)], row_of[own])
            self._store_partly(tokens[own], reader.of_all(logits, row_of[own]))

    def _store_partly(self, tokens: IntArray, logits: Tensor) -> None:
        self._collector.store(tokens, self._collector.reduce(tokens, logits))

    def _candidates(self, block: int, tokens: IntArray) -> IntArray:
        """Returns indices of the tokens in flight that may exit after ``block``, or that warm up a classifier."""
        if block not in self._batch.thresholds:
            return np.zeros(0, dtype=np.int64)
        evaluated = self._batch.thresholds[block][tokens] < NEVER
        if block in self._batch.warmup_tokens:
            evaluated |= self._batch.warmup_tokens[block][tokens]
        return np.flatnonzero(evaluated)

    def _evaluate(
        self, use: ConfidenceInUse, block: int, tokens: IntArray, indices: IntArray, before: Tensor, hidden: Tensor
    ) -> _Evaluation:
        """Returns one confidence of the tokens in flight at ``indices`` (t,)."""
        own = tokens[indices]
        after = select(hidden, indices)[0]
        before = moved(select(before, indices)[0], after.device) if use.confidence.reads_before else after
        inputs = ExitInputs(block, before, after, self._slots[own], self._states)
        adapter = self._exits.adapter(block) if use.adapted and self._exits is not None else None
        if isinstance(use.confidence, CascadeConfidence):
            proposed, log_odds = self._proposed(use.confidence, inputs, own)
            own, indices, after = own[proposed], indices[proposed], select(after.unsqueeze(0), proposed)[0]
            inputs = ExitInputs(block, after, after, self._slots[own], self._states, log_odds=log_odds)
        corrected: Tensor | None = None
        reduced: Sequence[Tensor] = ()
        looked_at: Tensor | None = None
        if use.confidence.reads_lm_head or _confirms_by_all(use.confidence):
            scores, reduced = self._score_logits(use.confidence, inputs, own, adapter)
        elif use.confidence.vocab_subset is not None:
            corrected = _adapted(after, adapter)
            scores, looked_at = self._score_subset(use, inputs, own, corrected)
        else:
            scores = use.confidence.score(inputs)
        return _Evaluation(use, indices, scores, adapter, corrected, reduced, looked_at)

    def _proposed(
        self, cascade: CascadeConfidence, inputs: ExitInputs, tokens: IntArray
    ) -> tuple[IntArray, Tensor | None]:
        """Returns which of tokens (t,) a classifier proposes to let leave, and which may; it sees all of them.

        With them comes what it says of these, as log-odds, where that confirms as well.

        Raises:
            NotFiniteError: one of its confidences is no number.
        """
        logits = cascade.classifier.logits(inputs)
        sure = exit_probability(logits).cpu().numpy()
        if len(broken := np.flatnonzero(~np.isfinite(sure))):
            row = int(self._batch.layout.row_of[tokens[broken[0]]])
            raise NotFiniteError(row, f"{cascade.classifier.name} confidences at exit layer {inputs.layer}")
        may_leave = self._batch.thresholds[inputs.layer][tokens] < NEVER
        proposed = np.flatnonzero((sure >= np.float32(cascade.propose)) & may_leave)
        if cascade.confirm == "read_out":
            return proposed, None
        of_proposed = logits[on_device(proposed, logits.device)]
        return proposed, of_proposed[:, 1] - of_proposed[:, 0]

    def _score_logits(
        self, confidence: Confidence, inputs: ExitInputs, tokens: IntArray, adapter: Adapter | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns confidences (t,) that come from logits, and what is kept of those: the read serves the exit too."""
        scores, reduced = [], []
        is_read = self._read_at_exit(tokens)
        if len(tokens) == 0:
            return torch.empty(0, device=inputs.after.device), ()
        for part, logits in self._logits(_adapted(inputs.after, adapter)):
            scores.append(confidence.score(inputs.part(part, logits)))
            needed = np.flatnonzero(is_read[part])
            if len(needed):
                kept = logits if len(needed) == len(logits) else logits[on_device(needed, logits.device)]
                reduced.append(self._collector.reduce(tokens[part][needed], kept))
        return _joined(scores), reduced

    def _score_subset(
        self, use: ConfidenceInUse, inputs: ExitInputs, tokens: IntArray, read: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns confidences (t,) that come from some of the logits of hidden states ``read`` (t, D).

        With them come these logits (t, N), where some row drafts from them.
        """
        batch = self._batch
        if len(tokens) == 0:
            return torch.empty(0, device=read.device), None
        if use not in self._subsets:
            own = (batch.confidence_of_row == batch.confidences.index(use)).tolist()
            looked_at = [looked if it_is else None for looked, it_is in zip(batch.vocabularies, own, strict=True)]
            self._subsets[use] = SubsetReader(self._backbone, looked_at)
        reader, row_of = self._subsets[use], batch.layout.row_of[tokens]
        scores, kept = [], []
        keeps = bool(batch.drafts[row_of].any())
        for part in _parts(len(read), reader.width):
            logits = reader.logits(read[part], row_of[part])
            scores.append(use.confidence.score(inputs.part(part, logits)))
            if keeps:
                kept.append(logits)
        return _joined(scores), _joined(kept) if keeps else None

    def _keep_logits(self, evaluation: _Evaluation, leaves: BoolArray, tokens: IntArray, hidden: Tensor) -> None:
        """Stores the logits of tokens that leave where the decision read them, else keeps the tokens to be read."""
        needed = np.flatnonzero(self._read_at_exit(tokens[evaluation.indices]))
        read = evaluation.indices[needed]
        exiting = np.flatnonzero(leaves[read])
        drafted = self._drafted_from_part(tokens[read[exiting]])
        if evaluation.looked_at is not None and drafted.any():
            reader = self._subsets[evaluation.use]
            own = tokens[read[exiting[drafted]]]
            logits = evaluation.looked_at[on_device(needed[exiting[drafted]], evaluation.looked_at.device)]
            self._store_partly(own, reader.of_all(logits, self._batch.layout.row_of[own]))
            exiting, drafted = exiting[~drafted], drafted[~drafted]
        if len(exiting) == 0:
            return
        if evaluation.reduced:
            reduced = _joined(evaluation.reduced)
            self._collector.store(tokens[read[exiting]], reduced[on_device(exiting, reduced.device)])
        else:
            if evaluation.corrected is None:
                corrected = _adapted(select(hidden, read[exiting])[0], evaluation.adapter)
            else:
                corrected = evaluation.corrected[on_device(needed[exiting], evaluation.corrected.device)]
            for part, waiting in ((~drafted, self._unread), (drafted, self._partly_unread)):
                if part.any():
                    waiting.add(tokens[read[exiting[part]]], select(corrected.unsqueeze(0), np.flatnonzero(part)))

    def _drafted_from_part(self, tokens: IntArray) -> BoolArray:
        """Returns which of tokens (t,) are drafted from a part of the vocabulary."""
        rows = self._batch.layout.row_of[tokens]
        has_part = np.asarray([vocabulary is not None for vocabulary in self._batch.vocabularies], dtype=np.bool_)
        drafted: BoolArray = self._batch.drafts[rows] & has_part[rows]
        return drafted

    def _read_at_exit(self, tokens: IntArray) -> BoolArray:
        """Returns which tokens are read out where they leave: not those that block L still runs on."""
        needs_logits: BoolArray = self._batch.needs_logits[tokens] & ~self._batch.has_final_block(tokens)
        return needs_logits

    def _logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields the logits (T, V) of hidden states (t, D), in parts of bounded size."""
        for part in _parts(len(hidden), self._backbone.vocab_size):
            yield part, self._backbone.readout(hidden[part])


def _confirms_by_all(confidence: Confidence) -> bool:
    """Returns whether proposals are read out from all of the vocabulary, which gives the token as well."""
    return isinstance(confidence, CascadeConfidence) and confidence.vocab_subset is None


def _parts(num_tokens: int, width: int) -> list[slice]:
    """Returns parts of tokens for each of which logits of bounded size are read, ``width`` of a token."""
    at_once = max(1, LOGITS_AT_ONCE // width)
    return [slice(start, start + at_once) for start in range(0, num_tokens, at_once)]


def _adapted(hidden: Tensor, adapter: Adapter | None) -> Tensor:
    """Returns what is read out of hidden states (t, D) at an exit; the states left behind are those of ``hidden``."""
    if adapter is None:
        return hidden
    corrected: Tensor = adapter(hidden)
    return corrected


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Returns the parts as one, on the device of the first; no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat([moved(part, parts[0].device) for part in parts])
