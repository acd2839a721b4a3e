"""The exit policy: everything that decides which blocks a token runs, as plain data.

A policy belongs to a request, not to an engine: rows of one batch may follow different policies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval import config
from dynamax_lm_eval.compute.cost import ClassifierCost, ExitCost
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import pruning
from dynamax_lm_eval.exits.checkpoint import ExitConfig
from dynamax_lm_eval.exits.confidence import READS_LM_HEAD
from dynamax_lm_eval.models.loading import copy_is_impossible
from dynamax_lm_eval.types import ClassifierKind, Confidence, ExitScope, StateMode

#: Compares above every confidence: the token does not exit there, and nothing is evaluated.
NEVER = math.inf


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
    confidence: Confidence = "softmax"
    state_mode: StateMode = "recompute"
    pruned_blocks: frozenset[int] = frozenset()
    exit_scope: ExitScope = "generated"
    threshold_decay: float | None = None
    #: Which classifier gives the confidence, where that is ``classifier``.
    classifier: ClassifierKind | None = None
    #: Last prompt tokens that a recurrent classifier sees; only ``mamba`` is recurrent.
    classifier_warmup: int = DEFAULT_WARMUP
    #: Block L runs after an exit.
    final_block: bool = False
    #: Read-outs at exits go through the adapters of the trained exits (``none`` where they have none).
    adapter: str = "none"

    def __post_init__(self) -> None:
        assert len(self.exit_layers) == len(self.thresholds)
        assert all(0 < layer < self.num_layers for layer in self.exit_layers)
        assert self.adapter == "none" or not self.final_block
        assert (self.classifier is None) or self.confidence == "classifier"

    @classmethod
    def from_args(
        cls, args: DynamaxArgs, num_layers: int, exits: ExitConfig | None = None, recurrent_backbone: bool = False
    ) -> tuple[ExitPolicy, str | None]:
        """The policy that arguments mean for a backbone, and a note if something was left out.

        Args:
            args: what the user asked for.
            num_layers: blocks of the backbone.
            exits: the trained exits at hand.
            recurrent_backbone: Mamba; decides what ``preset=paper`` leaves behind, and excludes ``copy``.

        Raises:
            UserError: layers or blocks lie outside the backbone or contradict each other, thresholds do
                not match the exits, or the exits are not what was asked for.
        """
        pruned = pruning.pruned_blocks(args, num_layers)
        confidence = args.confidence or ("classifier" if exits is not None else "softmax")
        classifier, final_block = None, bool(args.final_block)
        if confidence == "classifier" and exits is not None:
            classifier = _choose_classifier(args, exits)
            final_block = _check_final_block(args, exits)
            _check_trained_layers(args, exits)
        elif all(threshold >= 1 for threshold in args.threshold):
            pass  # the plain backbone: nothing is evaluated, whatever would have been
        elif args.classifier is not None or args.classifier_warmup is not None:
            name = "classifier" if args.classifier is not None else "classifier_warmup"
            raise UserError(f"{name} needs confidence=classifier and trained exits; this run uses {confidence}")
        elif args.exits is not None and confidence != "classifier":
            if exits is None or exits.adapter == "none":
                raise UserError(
                    f"exits={args.exits!r} has no effect with confidence={confidence}: these exits have no adapters; "
                    "remove one of them"
                )
            # Their adapters correct the read-outs of training-free confidences as well.
            _check_trained_layers(args, exits)
            if final_block:
                raise UserError("final_block and exit adapters exclude each other; remove final_block or exits")
        requested = args.exit_layers
        if requested is None and exits is not None:
            exit_layers = exits.exit_layers
        else:
            exit_layers = config.resolve_exit_layers(requested, num_layers, final_block)
        state_mode: StateMode = args.state_mode or "recompute"
        if args.state_mode is None and args.preset == "paper":
            state_mode = "skip" if recurrent_backbone else "copy"
        note = None
        dropped = sorted(pruned.intersection(exit_layers))
        if args.exit_layers is None and dropped:
            exit_layers = tuple(layer for layer in exit_layers if layer not in pruned)
            if any(threshold < 1 for threshold in args.threshold):
                note = (
                    f"default exits {dropped} end with pruned blocks and are left out; exits are at {list(exit_layers)}"
                )
        policy = cls(
            num_layers=num_layers,
            exit_layers=exit_layers,
            thresholds=config.resolve_thresholds(args.threshold, exit_layers),
            confidence=confidence,
            state_mode=state_mode,
            pruned_blocks=pruned,
            exit_scope=args.exit_scope,
            threshold_decay=args.threshold_decay,
            classifier=classifier,
            classifier_warmup=DEFAULT_WARMUP if args.classifier_warmup is None else args.classifier_warmup,
            final_block=final_block,
            adapter=exits.adapter if exits is not None else "none",
        )
        if recurrent_backbone and policy.active_exits and state_mode == "copy":
            raise UserError(copy_is_impossible("a Mamba backbone"))
        if policy.active_exits and confidence == "classifier" and exits is None:
            raise UserError(
                "confidence=classifier needs exits that were trained for this backbone, and none are known; name them "
                "with exits=, or train them: dynamax-lm-eval train --backbone ..."
            )
        at_pruned = sorted(pruned.intersection(policy.active_exits))
        if at_pruned:
            raise UserError(
                f"exit_layers {at_pruned} end with a pruned block, so there is nothing new to decide on; "
                "choose other exit_layers or prune_layers"
            )
        return policy, note

    @classmethod
    def of_exits(cls, exits: ExitConfig, kind: str, threshold: float, **settings: Any) -> ExitPolicy:
        """One threshold at all layers of trained exits, with their classifiers of this kind.

        ``settings``: other attributes of the policy.
        """
        return cls(
            num_layers=exits.backbone.num_layers,
            exit_layers=exits.exit_layers,
            thresholds=(threshold,) * len(exits.exit_layers),
            confidence="classifier",
            classifier=cast(ClassifierKind, kind),
            final_block=exits.final_block,
            adapter=exits.adapter,
            **settings,
        )

    @cached_property
    def active_exits(self) -> tuple[int, ...]:
        """Exit layers where something is evaluated: those whose threshold is below 1."""
        pairs = zip(self.exit_layers, self.thresholds, strict=True)
        return tuple(layer for layer, threshold in pairs if threshold < 1)

    @property
    def scorer(self) -> str:
        """What gives the confidence: a kind of classifier or of training-free confidence."""
        return self.classifier or self.confidence

    @property
    def is_recurrent(self) -> bool:
        """Its classifier carries a state from token to token."""
        return self.classifier == "mamba"

    def first_warmed_position(self, prompt_length: int) -> int:
        """Position from which on a recurrent classifier sees the tokens."""
        return 0 if self.exit_scope == "all" else max(0, prompt_length - self.classifier_warmup)

    def first_eligible_position(self, prompt_length: int) -> int:
        """Position of the first token that may exit, in a row whose prompt has ``prompt_length`` tokens."""
        return 1 if self.exit_scope == "all" else prompt_length

    def for_prefixes(self) -> ExitPolicy:
        """All of the policy that decides what prompt tokens leave in the states; equal where rows can share them."""
        return self if self.exit_scope == "all" else ExitPolicy(self.num_layers, pruned_blocks=self.pruned_blocks)

    def shareable_tokens(self, prompt_length: int) -> int:
        """How many tokens at the beginning of a prompt leave what follows from them and :meth:`for_prefixes` alone."""
        before_answer = prompt_length - 1
        if self.exit_scope == "all":
            return 0 if self.threshold_decay is not None else before_answer
        warmup_tokens = self.is_recurrent and bool(self.active_exits)
        return min(before_answer, self.first_warmed_position(prompt_length)) if warmup_tokens else before_answer

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
        return rounded

    def cost_terms(
        self,
        prompt_length: int,
        classifier_costs: Mapping[int, ClassifierCost] | None = None,
        adapter_macs: Mapping[int, int] | None = None,
    ) -> ExitCost:
        """What of this policy matters for the cost of a row with ``prompt_length`` prompt tokens.

        ``classifier_costs``: cost of one evaluation at each exit layer, where a classifier gives the confidence;
        ``adapter_macs``: MACs of the adapter there, where read-outs have one.
        """
        first = self.first_eligible_position(prompt_length)
        costs = classifier_costs or {}
        return ExitCost(
            evaluated_layers=self.active_exits,
            classifier_macs=tuple(costs[layer].macs if layer in costs else 0 for layer in self.active_exits),
            classifier_paper_weights=tuple(
                costs[layer].paper_weights if layer in costs else 0 for layer in self.active_exits
            ),
            adapter_macs=tuple((adapter_macs or {}).get(layer, 0) for layer in self.active_exits),
            warmed_tokens=max(0, first - self.first_warmed_position(prompt_length)) if self.is_recurrent else 0,
            final_block=self.final_block,
            reads_lm_head=self.confidence in READS_LM_HEAD,
            recomputes_state=self.state_mode == "recompute",
            pruned_blocks=self.pruned_blocks,
            first_eligible=first,
        )

    def describe(self) -> dict[str, Any]:
        """Every setting as JSON data, for result files and cache identities."""
        description = asdict(self)
        description["exit_layers"] = list(self.exit_layers)
        description["thresholds"] = list(self.thresholds)
        description["pruned_blocks"] = sorted(self.pruned_blocks)
        if not self.is_recurrent or self.exit_scope == "all":
            description["classifier_warmup"] = None  # of no effect
        return description


def _choose_classifier(args: DynamaxArgs, exits: ExitConfig) -> ClassifierKind:
    kind = args.classifier or exits.classifiers[0]
    if kind not in exits.classifiers:
        raise UserError(f"classifier={kind} is not among the trained exits, which have {', '.join(exits.classifiers)}")
    if args.classifier_warmup is not None and kind != "mamba":
        raise UserError(f"classifier_warmup has no effect with classifier={kind}, which carries no state; remove it")
    if args.classifier_warmup is not None and args.exit_scope == "all":
        raise UserError("classifier_warmup has no effect with exit_scope=all, where prompts are evaluated; remove it")
    return cast(ClassifierKind, kind)


def _check_final_block(args: DynamaxArgs, exits: ExitConfig) -> bool:
    """Exits only work as they were trained."""
    if args.final_block is not None and args.final_block != exits.final_block:
        source = "preset=paper sets final_block=true" if args.preset else f"final_block={str(args.final_block).lower()}"
        raise UserError(
            f"{source}, but these exits were trained with final_block={str(exits.final_block).lower()}; "
            "leave it out, or train others (dynamax-lm-eval train --final_block)"
        )
    return exits.final_block


def _check_trained_layers(args: DynamaxArgs, exits: ExitConfig) -> None:
    missing = sorted(set(args.exit_layers or ()) - set(exits.exit_layers))
    if missing:
        raise UserError(
            f"exit_layers {missing} have no trained classifier; there are some at {list(exits.exit_layers)}"
        )
