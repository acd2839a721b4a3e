"""The layer loop: one function for prefill, decoding and scoring, over a flat ragged batch.

A block runs on the tokens in flight; those that leave at an exit layer are compacted out of the batch. Which blocks a
token runs through depends on its own row alone, never on who shares the batch.

N tokens of the batch, n in flight, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, IntArray, States, on_device
from dynamax_lm_eval.backbones.segments import SegmentUse, StaticSegments
from dynamax_lm_eval.compute.accounting import ComputeRecord, account
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.batch import FlatBatch
from dynamax_lm_eval.engine.decisions import Confidences, ExitDecisions, LogitsCollector
from dynamax_lm_eval.engine.drafts import Drafts
from dynamax_lm_eval.engine.running import BlockRunner, SegmentRunner
from dynamax_lm_eval.engine.tokens import HeldTokens, WaitingTokens, select
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.states import ClassifierStates


class RowStates:
    """The states that the backbone's blocks and the recurrent classifiers keep of the rows in flight."""

    def __init__(self, backbone: States, classifiers: ClassifierStates) -> None:
        self.backbone = backbone
        self.classifiers = classifiers

    def allocate_row(self, capacity: int) -> int | None:
        """Allocates a row of up to ``capacity`` tokens and returns its slot; None where there is no memory now."""
        slot = self.backbone.allocate_row(capacity)
        if slot is not None:
            self.classifiers.allocate_row(slot)
        return slot

    def copy_row(self, source: int, slot: int, num_tokens: int) -> None:
        """Gives a new row the states of another, which has seen ``num_tokens`` tokens."""
        self.backbone.copy_row(source, slot, num_tokens)
        self.classifiers.copy_row(source, slot)

    def keep(self, slot: int, num_tokens: int) -> bool:
        """Keeps the states of a row, which has seen ``num_tokens`` tokens, as :meth:`States.keep` does."""
        kept = self.backbone.keep(slot, num_tokens)
        if kept:
            self.classifiers.keep(slot, num_tokens)
        return kept

    def give(self, num_tokens: int, slot: int) -> None:
        """Gives a new row the states that are kept of a prefix of ``num_tokens`` tokens."""
        self.backbone.give(num_tokens, slot)
        self.classifiers.give(num_tokens, slot)

    def forget(self, num_tokens: int) -> None:
        """Drops the states that are kept of a prefix of ``num_tokens`` tokens."""
        self.backbone.forget(num_tokens)
        self.classifiers.forget(num_tokens)

    def settle(self, slot: int, kept: int | None) -> None:
        """Takes a row back to after the first ``kept`` of its drafted tokens, as :meth:`States.settle` does."""
        self.backbone.settle(slot, kept)
        self.classifiers.settle(slot, kept)

    def free_row(self, slot: int) -> None:
        """Frees the memory of a row."""
        self.backbone.free_row(slot)
        self.classifiers.free_row(slot)


class PassResult(NamedTuple):
    """What became of the tokens of a pass."""

    layers: IntArray  # (N,) the number of blocks that each ran through, so far
    refused: IntArray  # (N,) exits at which a read refused to confirm, as bits in the order of the policy's
    confidences: Sequence[Confidences]
    held: HeldTokens | None
    #: Tokens of rows that draft, which stopped after some blocks.
    stopped: Sequence[HeldTokens]
    #: Tokens (u,) that are yet to be read out, with the hidden states (1, u, D) to read.
    unread: tuple[IntArray, Tensor] | None


class Engine:
    """The engine, which runs flat batches through a backbone under exit policies."""

    def __init__(
        self,
        backbone: Backbone,
        classifiers: ExitClassifiers | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            backbone: runs the blocks.
            classifiers: the trained exits that policies with ``confidence=classifier`` use.
            autocast_dtype: dtype that torch's autocast computes products in; None: each module's own.
        """
        self.backbone = backbone
        self.classifiers = classifiers
        if classifiers is not None:
            classifiers.place([place.device for place in backbone.places])
        self._state_maps = {} if classifiers is None else classifiers.maps_by_exit_and_block()
        self._autocast_dtype = autocast_dtype
        self._prune_adapters: dict[str, Adapter] = {}
        #: Whether state recompute was seen to make the states that the blocks make.
        self.recomputes_states = False
        #: Whether drafts were seen to go on as the blocks want it.
        self.verifies = False
        #: How passes in which every row has one token run in segments; None: their blocks run one by one.
        self.segments: SegmentUse | None = None

    def use_segments(self, choice: bool | None, against: str | None = None) -> None:
        """Lets passes in which every row has one token run all blocks up to an exit in one call, and counts them anew.

        Args:
            choice: whether they do; None: on a GPU whose kernels can.
            against: why none does all the same, in a few words.
        """
        is_used = self.backbone.device.type == "cuda" if choice is None else choice
        if self._autocast_dtype is not None:
            against = "autocast"
        self.segments = SegmentUse(everywhere=choice is True, against=against) if is_used else None

    def add_prune_adapter(self, fingerprint: str, load: Callable[[], Adapter]) -> None:
        """Keeps the adapter of a pruned model's read-out, which policies name by its fingerprint.

        ``load``: gives it, and is asked where it is not here yet.
        """
        if fingerprint not in self._prune_adapters:
            self._prune_adapters[fingerprint] = load().to(self.backbone.places[-1].device)

    def autocast(self) -> torch.autocast:
        """Returns the autocast context that blocks run in."""
        dtype = self._autocast_dtype
        return torch.autocast(self.backbone.device.type, dtype=dtype, enabled=dtype is not None)

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> RowStates:
        """Makes states of the backbone, as :meth:`Backbone.new_states` does, and of the classifiers."""
        classifiers = ClassifierStates(self.classifiers, self.backbone.mamba_kernels)
        states = self.backbone.new_states(capacity, prefix_capacity, row_stride)
        if self.segments is not None:
            states.use_segments(StaticSegments(self.segments))
        return RowStates(states, classifiers)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Raises UserError where this backbone cannot follow the policy."""
        self.backbone.check_state_mode(policy.state_mode, policy.used_exits)
        if policy.drafts and not self.backbone.takes_back:
            raise UserError(
                f"verify is not possible on {self.backbone.name}, whose blocks cannot go on where tokens left or whose "
                f"states cannot be taken back ({self.backbone.rung}); leave it out"
            )
        if policy.vocab_subset is not None and policy.active_exits:
            if policy.vocab_subset >= self.backbone.vocab_size:
                raise UserError(
                    f"vocab_subset={policy.vocab_subset} must be below the size of this backbone's vocabulary, "
                    f"{self.backbone.vocab_size}; leave it out to read all of it"
                )
            self.backbone.check_readout_of()
        if policy.state_mode != "learned" or self.classifiers is None:  # where there is no model yet
            return
        if missing := sorted({*policy.used_exits} - self._mapped_exits):
            raise UserError(
                f"state_mode=learned needs exits with state maps at exit_layers {missing}, and these have none; train "
                "them: dynamax-lm-eval train --states linear, or use state_mode=recompute"
            )

    @property
    def _mapped_exits(self) -> set[int]:
        # The block right behind an exit needs no map.
        return {*(layer for layer, _ in self._state_maps), self.backbone.num_layers - 1}

    def account(self, trace: Trace, policy: ExitPolicy) -> ComputeRecord:
        """Returns what a row cost under a policy, as if it were alone."""
        exits, confidence = self.classifiers, policy.resolved_confidence
        costs = (
            {}
            if confidence is None
            else {layer: confidence.cost(layer, exits, self.backbone.hidden_size) for layer in policy.active_exits}
        )
        adapters = exits.adapter_macs() if exits is not None else {}
        state_maps = exits.state_map_macs() if exits is not None else ()
        lm_head = self.backbone.cost.lm_head
        if policy.vocab_subset is not None:
            lm_head = self.backbone.hidden_size * policy.vocab_subset
        healed = 0 if policy.prune_adapter is None else self._prune_adapters[policy.prune_adapter].macs
        terms = policy.cost_terms(trace.prompt_tokens, costs, adapters, state_maps, lm_head, healed)
        return account(trace, terms, self.backbone.cost)

    def forward(
        self, batch: FlatBatch, states: RowStates, collector: LogitsCollector, materialize_all: bool = False
    ) -> PassResult:
        """Feeds a batch and hands the logits of the tokens that need them to ``collector``.

        ``materialize_all``: no states are deferred, so that every block has those of all tokens and rows may be copied.

        Raises:
            NotFiniteError: a confidence is no number; its ``index`` is that of the row.
        """
        return self.advance(batch, states, collector, materialize_all=materialize_all)

    @torch.inference_mode()
    def advance(
        self,
        batch: FlatBatch,
        states: RowStates,
        collector: LogitsCollector,
        start: tuple[int, Tensor] | None = None,
        holds: Callable[[int, int], bool] | None = None,
        materialize_all: bool = False,
        resumed: Sequence[Tensor] = (),
    ) -> PassResult:
        """Does what :meth:`forward` does, from any block on and up to an exit at which the tokens are to wait.

        Args:
            batch: the tokens.
            states: of the rows.
            collector: gets the logits of the tokens that are done.
            start: the number of blocks that the tokens have run through, and their hidden states (1, N, D); None: they
                are new. Only where ``backbone.resumes``.
            holds: asked with an exit layer and the number of tokens that go on; True holds them there. Only where
                every row has one token. Tokens whose logits no decision needed are then left unread.
            materialize_all: as for :meth:`forward`.
            resumed: hidden states (1, 1, D) of the drafts that the batch resumes, in order.
        """
        backbone = self.backbone
        drafts = Drafts(batch, resumed)
        states.classifiers.drafted = batch.drafted_slots
        held: HeldTokens | None = None
        with self.autocast(), backbone.running():
            run = backbone.start_pass(states.backbone, batch.layout, materialize_all)
            run.state_maps = self._state_maps
            decisions = ExitDecisions(
                batch, backbone, self.classifiers, states.classifiers, collector, self._prune_adapters
            )
            first, hidden = 0, run.embed(on_device(batch.ids, backbone.device))  # (1, N, D)
            if start is not None:
                first, hidden = start
            tokens = np.arange(len(batch))
            layer_of = np.full(len(batch), backbone.num_layers, dtype=np.int64)
            if len(resumed):
                first, tokens, hidden = drafts.first, drafts.new, select(hidden, drafts.new)
                tokens, hidden = drafts.joined(first, tokens, hidden)
            returning = WaitingTokens()
            runner = self._runner(run, batch, states, materialize_all)
            for block in runner.stops_after(first):
                if len(tokens) == 0 and not run.has_pending_states and not returning and not drafts.will_join:
                    break
                if block == backbone.num_layers and returning:
                    returning.add(tokens, hidden)
                    tokens, hidden = returning.in_order()
                before, hidden = runner.run_to(block, tokens, hidden)
                leaves = decisions.leaving(block, tokens, before, hidden)
                if leaves is not None and leaves.any():
                    leaves = drafts.with_followers(tokens, leaves)
                    exiting, staying = np.flatnonzero(leaves), np.flatnonzero(~leaves)
                    layer_of[tokens[exiting]] = block
                    for_good, left = drafts.stop(block, tokens[exiting], select(hidden, exiting))
                    if len(for_good):
                        run.exit_tokens(for_good, left, block)
                    for_last = exiting[batch.has_final_block(tokens[exiting])]
                    returning.add(tokens[for_last], select(hidden, for_last))
                    tokens, hidden = tokens[staying], select(hidden, staying)
                if leaves is not None and holds is not None and len(tokens) and holds(block, len(tokens)):
                    held = HeldTokens(block, tokens, hidden)
                    layer_of[tokens] = block
                    tokens, hidden = tokens[:0], hidden[:, :0]
                tokens, hidden = drafts.joined(block, tokens, hidden)
            runner.count()
            layer_of[drafts.waiting] = batch.resumed[drafts.waiting]
            if holds is not None:
                unread = decisions.unread(tokens, hidden)
            else:
                decisions.read_out(tokens, hidden)
                unread = None
        return PassResult(layer_of, decisions.refused, decisions.confidences, held, drafts.stopped, unread)

    def _runner(self, run: ForwardPass, batch: FlatBatch, states: RowStates, materialize_all: bool) -> BlockRunner:
        """Returns what runs the blocks of a pass."""
        if self.segments is None or states.backbone.segments is None or materialize_all:
            return BlockRunner(run, batch)
        return SegmentRunner(run, batch, self.segments)

    @torch.inference_mode()
    def read_out(self, hidden: Tensor) -> Tensor:
        """Returns the logits (u, V) of hidden states (1, u, D) that a pass left unread."""
        with self.autocast(), self.backbone.running():
            return self.backbone.readout(hidden[0])
