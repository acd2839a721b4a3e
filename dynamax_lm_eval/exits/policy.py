"""The exit policy: everything that decides which blocks a token runs, as plain data.

A policy belongs to a request, not to an engine: rows of one batch may follow different policies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval.compute.cost import EvaluationCost, ExitCost
from dynamax_lm_eval.exits.confidences import Confidence, LogitsConfidence, resolve_confidence
from dynamax_lm_eval.exits.vocabulary import RowVocabulary, row_vocabulary
from dynamax_lm_eval.types import ClassifierKind, ConfidenceName, Confirm, ExitScope, PruneScope, StateMode

#: Compares above every confidence: the token does not exit there, and nothing is evaluated.
NEVER = math.inf

#: Tokens that a row drafts at most.
DEFAULT_VERIFY_TOKENS = 8

#: Prompt tokens that warm a recurrent classifier: as many as help (docs/search.md).
DEFAULT_WARMUP = 16


@dataclass(frozen=True)
class ExitPolicy:
    """Exit layers with their thresholds, and what surrounds them.

    ``exit_layers`` are in rising order and below ``num_layers``; ``thresholds`` has one number for each,
    as the user gave them (1 never exits).
    """

    num_layers: int
    exit_layers: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    confidence: ConfidenceName = "softmax"
    state_mode: StateMode = "recompute"
    pruned_blocks: frozenset[int] = frozenset()
    #: Which tokens do not run them.
    prune_scope: PruneScope = "all"
    exit_scope: ExitScope = "generated"
    threshold_decay: float | None = None
    #: Which classifier gives the confidence, where that is ``classifier``.
    classifier: ClassifierKind | None = None
    #: Last prompt tokens that a recurrent classifier sees.
    classifier_warmup: int = DEFAULT_WARMUP
    #: Block L runs after an exit.
    final_block: bool = False
    #: The layer after which all prompt tokens but the last ``prompt_exit_keep`` leave; None: none do.
    prompt_exit_layer: int | None = None
    prompt_exit_keep: int = DEFAULT_WARMUP
    #: Read-outs at exits go through the adapters of the trained exits (``none`` where they have none).
    adapter: str = "none"
    #: Logits that give the confidence are those of so many tokens, and drafts are chosen from these; None: of all.
    vocab_subset: int | None = None
    #: A token exits where its confidence is above the threshold, not where it reaches it.
    above_threshold: bool = False
    #: The classifier's confidence from which on a cascade reads out; None: it is none.
    propose: float | None = None
    #: What of the read-out then confirms.
    confirm: Confirm = "read_out"
    #: Tokens that left are drafts, at most so many at a time, which the full model verifies; None: they stand.
    verify_tokens: int | None = None
    #: The fingerprint of the adapter that tokens which do without the pruned blocks are read out through; None: none.
    prune_adapter: str | None = None
    #: What the user should know of how the policy came about; decides nothing.
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        assert len(self.exit_layers) == len(self.thresholds)
        assert all(0 < layer < self.num_layers for layer in self.exit_layers)
        assert self.adapter == "none" or not self.final_block
        assert self.prompt_exit_layer is None or (self.exit_scope == "generated" and not self.final_block)
        # The first token of a row leaves nobody states, unless it runs every block.
        assert self.prompt_exit_layer is None or self.state_mode != "copy_previous"
        # Prompt tokens that left would owe states to blocks that the others of their prompt run.
        leaves_prompt = self.exit_scope == "all" or self.prompt_exit_layer is not None
        assert self.prune_scope == "all" or not leaves_prompt
        of_logits = self.confidence in ("softmax", "entropy", "cascade")
        assert self.vocab_subset is None or of_logits or self.verify_tokens is not None
        # What is verified is the full model's, from its prompt on.
        assert self.verify_tokens is None or (self.exit_scope == "generated" and not self.pruned_blocks)
        assert self.verify_tokens is None or (self.prompt_exit_layer is None and not self.final_block)
        assert self.prune_adapter is None or (self.pruned_blocks and not self.used_exits)
        assert (self.classifier is None) or self.confidence in ("classifier", "cascade")
        assert (self.propose is None) == (self.confidence != "cascade")
        assert self.confirm == "read_out" or (self.propose is not None and self.vocab_subset is None)
        # The read that confirms gives the token.
        assert self.confidence != "cascade" or not self.final_block

    @cached_property
    def active_exits(self) -> tuple[int, ...]:
        """Exit layers where something is evaluated: those whose threshold is below 1."""
        pairs = zip(self.exit_layers, self.thresholds, strict=True)
        return tuple(layer for layer, threshold in pairs if threshold < 1)

    @cached_property
    def used_exits(self) -> tuple[int, ...]:
        """Layers after which any token may leave: the active exits, and that of the prompt."""
        at_prompt = () if self.prompt_exit_layer is None else (self.prompt_exit_layer,)
        return tuple(sorted({*self.active_exits, *at_prompt}))

    def num_leaving_prompt(self, prompt_length: int) -> int:
        """How many tokens of a prompt leave after ``prompt_exit_layer`` blocks: all but the last."""
        return 0 if self.prompt_exit_layer is None else max(0, prompt_length - self.prompt_exit_keep)

    @cached_property
    def resolved_confidence(self) -> Confidence | None:
        """What gives the confidence; None where that would be a classifier and there is none."""
        if self.confidence in ("classifier", "cascade") and self.classifier is None:
            return None
        return resolve_confidence(self.confidence, self.classifier, self.vocab_subset, self.propose, self.confirm)

    @property
    def is_recurrent(self) -> bool:
        """Whether its confidence carries a state from token to token."""
        return self.resolved_confidence is not None and self.resolved_confidence.recurrent

    def first_warmed_position(self, prompt_length: int) -> int:
        """Position from which on a recurrent classifier sees the tokens."""
        if self.exit_scope == "all":
            return 0
        # Tokens that leave do not get to every exit, and those that a classifier sees are to be the same at all.
        return max(0, prompt_length - self.classifier_warmup, self.num_leaving_prompt(prompt_length))

    def first_eligible_position(self, prompt_length: int) -> int:
        """Position of the first token that may exit, in a row whose prompt has ``prompt_length`` tokens."""
        return 1 if self.exit_scope == "all" else prompt_length

    def first_pruned_position(self, prompt_length: int) -> int:
        """Position of the first token that does not run the pruned blocks."""
        return 0 if self.prune_scope == "all" else prompt_length

    @cached_property
    def drafts(self) -> bool:
        """Whether tokens that leave are drafts, which are verified."""
        return self.verify_tokens is not None and bool(self.active_exits)

    @property
    def for_scores(self) -> ExitPolicy:
        """The policy under which texts are scored: the full model, where what is drafted is verified."""
        return self if self.verify_tokens is None else ExitPolicy(self.num_layers)

    def for_prefixes(self) -> ExitPolicy:
        """All of the policy that decides what prompt tokens leave in the states; equal where rows can share them."""
        if self.exit_scope == "all":
            return self
        pruned = self.pruned_blocks if self.prune_scope == "all" else frozenset[int]()
        plain = ExitPolicy(self.num_layers, pruned_blocks=pruned)
        if self.prompt_exit_layer is None:
            return plain
        # All of a prefix leaves; what follows its end is not known there.
        layer, mode = self.prompt_exit_layer, self.state_mode
        return replace(plain, prompt_exit_layer=layer, prompt_exit_keep=0, state_mode=mode)

    def shareable_tokens(self, prompt_length: int) -> int:
        """How many tokens at the beginning of a prompt leave what follows from them and :meth:`for_prefixes` alone."""
        before_answer = prompt_length - 1
        if self.prompt_exit_layer is not None:
            before_answer = self.num_leaving_prompt(prompt_length)
        if self.exit_scope == "all":
            # Of these, both depend on the prompt as a whole.
            return 0 if self.threshold_decay is not None or self.vocab_subset is not None else before_answer
        warmup_tokens = self.is_recurrent and bool(self.active_exits)
        return min(before_answer, self.first_warmed_position(prompt_length)) if warmup_tokens else before_answer

    def row_vocabulary(self, prompt: Sequence[int]) -> RowVocabulary | None:
        """Returns the tokens that the confidence of a row looks at; None: all of them, or nothing is evaluated."""
        if self.vocab_subset is None or not self.active_exits:
            return None
        return row_vocabulary(prompt, self.vocab_subset)

    def effective_thresholds(self, steps: npt.NDArray[np.int64], max_steps: int) -> npt.NDArray[np.float32]:
        """What the confidence of each token is compared with.

        With decay tau the threshold is clip(0.9*threshold + 0.1*exp(-tau*t/N), 0, 1), equation 5 of CALM
        (Schuster et al. 2022, arXiv 2207.07061).

        Args:
            steps: t, the number of eligible tokens of the row before each token; negative for tokens that
                may not exit. (T,)
            max_steps: N, the most tokens that the row may produce.

        Returns:
            (T, exits), ``NEVER`` where the token may not exit or the user's threshold is 1.
        """
        base = np.asarray(self.thresholds, dtype=np.float64)
        values = np.broadcast_to(base, (len(steps), len(base))).copy()
        if self.threshold_decay is not None:
            decayed = 0.1 * np.exp(-self.threshold_decay * np.maximum(steps, 0) / max(max_steps, 1))
            values = np.clip(0.9 * values + decayed[:, None], 0.0, 1.0)
        values[:, base >= 1] = NEVER
        values[steps < 0] = NEVER
        rounded: npt.NDArray[np.float32] = values.astype(np.float32)
        if self.above_threshold:
            # Above a number is at or beyond the next one.
            rounded = np.nextafter(rounded, np.float32(np.inf))
        return rounded

    def cost_terms(
        self,
        prompt_length: int,
        evaluation_costs: Mapping[int, EvaluationCost] | None = None,
        adapter_macs: Mapping[int, int] | None = None,
        state_map_macs: tuple[int, ...] = (),
        lm_head: int = 0,
        prune_adapter_macs: int = 0,
    ) -> ExitCost:
        """What of this policy matters for the cost of a row with ``prompt_length`` prompt tokens.

        ``evaluation_costs``: of one evaluation of the confidence at each exit layer, where it costs anything;
        ``adapter_macs``: MACs of the adapter there, where read-outs have one; ``state_map_macs``: of a learned state
        beyond a recomputed one, by block; ``lm_head``: MACs of a read of the LM head for one token;
        ``prune_adapter_macs``: of the adapter of a pruned model's read-out.
        """
        first = self.first_eligible_position(prompt_length)
        costs = [(evaluation_costs or {}).get(layer, EvaluationCost()) for layer in self.active_exits]
        confidence = self.resolved_confidence
        return ExitCost(
            evaluated_layers=self.active_exits,
            classifier_macs=tuple(cost.macs for cost in costs),
            classifier_paper_weights=tuple(cost.paper_weights for cost in costs),
            partial_read_macs=tuple(cost.lm_head_macs for cost in costs),
            adapter_macs=tuple((adapter_macs or {}).get(layer, 0) for layer in self.active_exits),
            warmed_tokens=max(0, first - self.first_warmed_position(prompt_length)) if self.is_recurrent else 0,
            final_block=self.final_block,
            confirm_read_macs=lm_head if self.confidence == "cascade" else 0,
            reads_to_confirm_alone=self.vocab_subset is not None,
            draft_read_macs=self._draft_read_macs(lm_head) if self.drafts else 0,
            reads_lm_head=confidence is not None and confidence.reads_lm_head,
            recomputes_state=self.state_mode in ("recompute", "learned") and not self.drafts,
            state_map_macs=state_map_macs if self.state_mode == "learned" else (),
            pruned_blocks=self.pruned_blocks,
            prune_adapter_macs=prune_adapter_macs,
            prunes_eligible_only=self.prune_scope == "generated",
            first_eligible=first,
            prompt_exit=(self.num_leaving_prompt(prompt_length), self.prompt_exit_layer or 0),
        )

    def _draft_read_macs(self, lm_head: int) -> int:
        """MACs of the read that gives a draft, where no evaluation has read what it is chosen from."""
        if isinstance(self.resolved_confidence, LogitsConfidence):
            return 0
        return lm_head

    def describe(self) -> dict[str, Any]:
        """Every setting as JSON data, for result files and cache identities."""
        description = asdict(self)
        del description["notes"]
        # What was described before there were these settings is still the same.
        for name, value in {
            "vocab_subset": None,
            "prune_scope": "all",
            "above_threshold": False,
            "verify_tokens": None,
            "propose": None,
            "confirm": "read_out",
            "prune_adapter": None,
        }.items():
            if description[name] == value:
                del description[name]
        description["exit_layers"] = list(self.exit_layers)
        description["thresholds"] = list(self.thresholds)
        description["pruned_blocks"] = sorted(self.pruned_blocks)
        if self.prompt_exit_layer is None:
            del description["prompt_exit_layer"], description["prompt_exit_keep"]
        if not self.is_recurrent or self.exit_scope == "all":
            description["classifier_warmup"] = None  # of no effect
        return description
