"""The layer loop: one function for prefill, decoding and scoring, over a flat ragged batch.

A block runs on the tokens in flight; at an exit layer the confidence of those that may exit is compared
with their thresholds, and those that leave are compacted out of the batch. A token's way depends on its
own row alone, never on who shares the batch.

N tokens of the batch, n in flight, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE, Backbone, BoolArray, ForwardPass, IntArray, States
from dynamax_lm_eval.compute.accounting import ComputeRecord, Trace, account
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.errors import NotFiniteError
from dynamax_lm_eval.exits import confidence
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.exits.classifiers import ExitClassifiers, confidence_of
from dynamax_lm_eval.exits.policy import NEVER, ExitPolicy
from dynamax_lm_eval.exits.states import ClassifierStates


class LogitsCollector(Protocol):
    """Takes the logits of needs_logits tokens, reduced to what its owner needs of them."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        """What is kept of logits (T, V) of these tokens: (T, anything). Called before it is known who exits."""
        ...

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        """The reduced logits at which these tokens were really read out. Called once for every needs_logits token."""
        ...


class NoLogits(LogitsCollector):
    """For batches without needs_logits tokens."""

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        raise AssertionError("no logits are needs_logits")

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        raise AssertionError("no logits are needs_logits")


class RowStates:
    """What the backbone's blocks and the recurrent classifiers keep of the rows in flight."""

    def __init__(self, backbone: States, classifiers: ClassifierStates) -> None:
        self.backbone = backbone
        self.classifiers = classifiers

    def allocate_row(self, capacity: int) -> int | None:
        """Reserves room for a row of up to ``capacity`` tokens; None where there is none at present."""
        slot = self.backbone.allocate_row(capacity)
        if slot is not None:
            self.classifiers.allocate_row(slot)
        return slot

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        """Gives a new row the states of another, which has seen ``num_tokens`` tokens."""
        self.backbone.copy_row(source, slot, num_tokens)
        self.classifiers.copy_row(source, slot)

    def keep(self, slot: int, num_tokens: int) -> bool:
        """Keeps the states of a row, which has seen ``num_tokens`` tokens, as :meth:`States.keep`."""
        kept = self.backbone.keep(slot, num_tokens)
        if kept:
            self.classifiers.keep(slot, num_tokens)
        return kept

    def give(self, num_tokens: int, slot: int) -> None:
        """Gives a new row the states that are kept of so many tokens."""
        self.backbone.give(num_tokens, slot)
        self.classifiers.give(num_tokens, slot)

    def forget(self, num_tokens: int) -> None:
        """Keeps the states of so many tokens no longer."""
        self.backbone.forget(num_tokens)
        self.classifiers.forget(num_tokens)

    def free_row(self, slot: int) -> None:
        """Gives the room of a row back."""
        self.backbone.free_row(slot)
        self.classifiers.free_row(slot)


class Engine:
    """Runs flat batches through a backbone under exit policies."""

    def __init__(self, backbone: Backbone, classifiers: ExitClassifiers | None = None) -> None:
        """``classifiers``: the trained exits that policies with ``confidence=classifier`` use."""
        self.backbone = backbone
        self.classifiers = classifiers
        #: State recompute was seen to make the states that the blocks make.
        self.recomputes_states = False

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> RowStates:
        """As :meth:`Backbone.new_states`, with room for the states of the classifiers."""
        classifiers = ClassifierStates(self.classifiers, self.backbone.device)
        return RowStates(self.backbone.new_states(capacity, prefix_capacity, row_stride), classifiers)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Raises UserError where this backbone cannot follow the policy."""
        self.backbone.check_state_mode(policy.state_mode, policy.active_exits)

    def account(self, trace: Trace, policy: ExitPolicy) -> ComputeRecord:
        """What a row cost under a policy, were it alone."""
        exits, kind = self.classifiers, policy.classifier
        costs = exits.costs(kind) if exits is not None and kind is not None else {}
        adapters = exits.adapter_macs() if exits is not None else {}
        return account(trace, policy.cost_terms(trace.prompt_tokens, costs, adapters), self.backbone.cost)

    @torch.inference_mode()
    def forward(
        self, batch: FlatBatch, states: RowStates, collector: LogitsCollector, materialize_all: bool = False
    ) -> IntArray:
        """Feeds a batch and hands the logits of its needs_logits tokens to ``collector``.

        ``materialize_all``: no block is left without the states of a token, as it must be where others copy them.

        Returns:
            (N,) the number of blocks that each token ran through; the backbone's depth without an exit.

        Raises:
            NotFiniteError: a confidence is no number; its ``index`` is that of the row.
        """
        backbone = self.backbone
        with backbone.running():
            run = backbone.start_pass(states.backbone, batch.layout, materialize_all)
            hidden = backbone.embed(torch.from_numpy(batch.ids).to(backbone.device))  # (1, N, D)
            tokens = np.arange(len(batch))
            layer_of = np.full(len(batch), backbone.num_layers, dtype=np.int64)
            returning = _Tokens()
            # One read for all: the LM head's weights are most of what a read costs.
            read_out = _Tokens()
            for block in range(1, backbone.num_layers + 1):
                if len(tokens) == 0 and not run.has_pending_states and not returning:
                    break
                if block == backbone.num_layers and returning:
                    returning.add(tokens, hidden)
                    tokens, hidden = returning.in_order()
                before = hidden
                hidden = _run_block(run, batch, block, tokens, hidden)
                leaves = self._decide(batch, block, tokens, before, hidden, states.classifiers, collector, read_out)
                if leaves is not None and leaves.any():
                    gone, stay = np.flatnonzero(leaves), np.flatnonzero(~leaves)
                    layer_of[tokens[gone]] = block
                    run.exit_tokens(tokens[gone], _select(hidden, gone), block)
                    for_last = gone[_has_final_block(batch, tokens[gone])]
                    returning.add(tokens[for_last], _select(hidden, for_last))
                    tokens, hidden = tokens[stay], _select(hidden, stay)
            needs_logits = np.flatnonzero(batch.needs_logits[tokens])
            read_out.add(tokens[needs_logits], _select(hidden, needs_logits))
            if read_out:
                self._read_out(*read_out.in_order(), collector)
        return layer_of

    def _decide(
        self,
        batch: FlatBatch,
        block: int,
        tokens: IntArray,
        before: Tensor,
        hidden: Tensor,
        classifiers: ClassifierStates,
        collector: LogitsCollector,
        read_out: _Tokens,
    ) -> BoolArray | None:
        """Which of the tokens in flight exit after ``block``: (n,), or None where none may.

        Those whose logits are needs_logits are handed to ``collector`` where the decision read the LM head, else left in
        ``read_out``; not if block L runs on them first.
        """
        thresholds = batch.thresholds.get(block)
        if thresholds is None or len(tokens) == 0:
            return None
        evaluated = thresholds[tokens] < NEVER
        if block in batch.warmup_tokens:
            evaluated |= batch.warmup_tokens[block][tokens]
        candidates = np.flatnonzero(evaluated)
        if len(candidates) == 0:
            return None
        leaves = np.zeros(len(tokens), dtype=np.bool_)
        way_of = batch.way_of_row[batch.layout.row_of[tokens[candidates]]]
        for i, (kind, adapted) in enumerate(batch.ways):
            chosen = candidates[way_of == i]
            if len(chosen) == 0:
                continue
            adapter = self.classifiers.adapter(block) if adapted and self.classifiers is not None else None
            limit = torch.from_numpy(thresholds[tokens[chosen]])
            if kind in confidence.READS_LM_HEAD:
                read = _adapted(_select(hidden, chosen), adapter)
                exits = self._decide_by_logits(kind, block, batch, tokens[chosen], read, limit, collector)
            else:
                if kind == "state":
                    scores = confidence.state_similarity(_select(before, chosen)[0], _select(hidden, chosen)[0])
                else:
                    scores = _classify(kind, block, batch, tokens[chosen], _select(hidden, chosen)[0], classifiers)
                exits = _reached(scores, limit, kind, block, batch, tokens[chosen])
                gone = chosen[exits]
                gone = gone[batch.needs_logits[tokens[gone]] & ~_has_final_block(batch, tokens[gone])]
                if len(gone):
                    read_out.add(tokens[gone], _adapted(_select(hidden, gone), adapter))
            leaves[chosen[exits]] = True
        return leaves

    def _decide_by_logits(
        self,
        kind: str,
        block: int,
        batch: FlatBatch,
        tokens: IntArray,
        hidden: Tensor,
        limit: Tensor,
        collector: LogitsCollector,
    ) -> BoolArray:
        """As _decide for tokens whose confidence comes from logits; the read serves the exit as well."""
        scores, reduced = [], []
        reads = batch.needs_logits[tokens] & ~_has_final_block(batch, tokens)
        for part, logits in self._logits(hidden[0]):
            scores.append(confidence.from_logits(kind, logits))
            needs_logits = np.flatnonzero(reads[part])
            if len(needs_logits):
                chosen = (
                    logits
                    if len(needs_logits) == len(logits)
                    else logits[torch.from_numpy(needs_logits).to(logits.device)]
                )
                reduced.append(collector.reduce(tokens[part][needs_logits], chosen))
        exits = _reached(torch.cat(scores), limit, kind, block, batch, tokens)
        needs_logits = np.flatnonzero(reads)
        committed = np.flatnonzero(exits[needs_logits])
        if len(committed):
            rows = torch.from_numpy(committed).to(hidden.device)
            collector.store(tokens[needs_logits[committed]], torch.cat(reduced)[rows])
        return exits

    def _read_out(self, tokens: IntArray, hidden: Tensor, collector: LogitsCollector) -> None:
        for part, logits in self._logits(hidden[0]):
            collector.store(tokens[part], collector.reduce(tokens[part], logits))

    def _logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits (t, V) of hidden states (T, D), in parts of bounded size."""
        at_once = max(1, LOGITS_AT_ONCE // self.backbone.vocab_size)
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            yield part, self.backbone.readout(hidden[part])


class _Tokens:
    """Tokens that left and wait: to come back for block L, or to be read out."""

    def __init__(self) -> None:
        self._tokens: list[IntArray] = []
        self._hidden: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, tokens: IntArray, hidden: Tensor) -> None:
        if len(tokens):
            self._tokens.append(tokens)
            self._hidden.append(hidden)

    def in_order(self) -> tuple[IntArray, Tensor]:
        """All of them in the order of the batch, with their hidden states (1, n, D)."""
        if len(self._tokens) == 1:
            return self._tokens[0], self._hidden[0]
        every = np.concatenate(self._tokens)
        order = np.argsort(every)
        joined = torch.cat(self._hidden, dim=1)
        return every[order], joined.index_select(1, torch.from_numpy(order).to(joined.device))


def _has_final_block(batch: FlatBatch, tokens: IntArray) -> BoolArray:
    return batch.layout.final_block[batch.layout.row_of[tokens]]


def _adapted(hidden: Tensor, adapter: Adapter | None) -> Tensor:
    """What is read out of hidden states (1, t, D) at an exit; the states left behind are those of ``hidden``."""
    if adapter is None:
        return hidden
    corrected: Tensor = adapter(hidden[0])
    return corrected.unsqueeze(0)


def _reached(scores: Tensor, limit: Tensor, kind: str, layer: int, batch: FlatBatch, tokens: IntArray) -> BoolArray:
    """Which confidences (t,) are at least their limits (t,); the one time at an exit layer that the host waits.

    Raises:
        NotFiniteError: with the row of the first confidence that is no number: nothing can be compared with it.
    """
    # Both answers in one small tensor: 0, 1, or 2 for what is no number.
    verdicts = torch.where(scores.isfinite(), (scores >= limit.to(scores.device)).to(torch.uint8), 2).cpu().numpy()
    if len(broken := np.flatnonzero(verdicts == 2)):
        row = int(batch.layout.row_of[tokens[broken[0]]])
        raise NotFiniteError(row, f"{kind} confidences at exit layer {layer}")
    reached: BoolArray = verdicts == 1
    return reached


def _classify(
    kind: str, layer: int, batch: FlatBatch, tokens: IntArray, hidden: Tensor, classifiers: ClassifierStates
) -> Tensor:
    """Confidences (t,) that a classifier gives hidden states (t, D)."""
    rows = batch.layout.row_of[tokens]
    lengths = [1] * len(rows)
    if len(batch) > len(batch.policies):  # some row has several tokens
        rows, counts = np.unique(rows, return_counts=True)
        lengths = counts.tolist()
    slots = [batch.layout.slots[row] for row in rows.tolist()]
    return confidence_of(classifiers.run(kind, layer, hidden, slots, lengths))


def _run_block(run: ForwardPass, batch: FlatBatch, block: int, tokens: IntArray, hidden: Tensor) -> Tensor:
    """Runs a block on the tokens whose rows do not prune it; the others pass by unchanged."""
    runs = batch.layout.runs_block[:, block]
    if runs.all():
        return run.run_block(block, tokens, hidden)
    inside = np.flatnonzero(runs[batch.layout.row_of[tokens]])
    if len(inside) == 0:
        if runs.any():
            run.run_block(block, tokens[:0], hidden[:, :0])
        return hidden
    output = hidden.clone()
    output[:, torch.from_numpy(inside).to(hidden.device)] = run.run_block(
        block, tokens[inside], _select(hidden, inside)
    )
    return output


def _select(hidden: Tensor, chosen: IntArray) -> Tensor:
    """Tokens ``chosen`` (t,) of hidden states (1, n, D); no copy where that is all of them."""
    if len(chosen) == hidden.shape[1]:
        return hidden
    return hidden.index_select(1, torch.from_numpy(chosen).to(hidden.device))
