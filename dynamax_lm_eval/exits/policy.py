"""The exit policy: everything that decides which blocks a token runs, as plain data.

A policy belongs to a request, not to an engine: rows of one batch may follow different policies.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamax_lm_eval import config
from dynamax_lm_eval.compute.cost import ExitTerms
from dynamax_lm_eval.config import Confidence, DynamaxArgs, ExitScope, StateMode
from dynamax_lm_eval.exits.confidence import READS_LM_HEAD

#: Compares above every confidence: the token does not exit there, and nothing is evaluated.
NEVER = math.inf


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

    def __post_init__(self) -> None:
        assert len(self.exit_layers) == len(self.thresholds)
        assert all(0 < layer < self.num_layers for layer in self.exit_layers)

    @classmethod
    def from_args(cls, args: DynamaxArgs, num_layers: int) -> tuple[ExitPolicy, str | None]:
        """The policy that arguments mean for ``num_layers`` blocks, and a note if something was left out.

        Raises:
            UserError: layers or blocks lie outside the backbone or contradict each other, or thresholds do
                not match the exits.
        """
        pruned = config.resolve_pruned_blocks(args.prune_layers, num_layers)
        exit_layers = config.resolve_exit_layers(args.exit_layers, num_layers)
        note = None
        dropped = sorted(pruned.intersection(exit_layers))
        if args.exit_layers is None and dropped:
            exit_layers = tuple(layer for layer in exit_layers if layer not in pruned)
            note = f"default exits {dropped} end with pruned blocks and are left out; exits are at {list(exit_layers)}"
        policy = cls(
            num_layers=num_layers,
            exit_layers=exit_layers,
            thresholds=config.resolve_thresholds(args.threshold, exit_layers),
            confidence=args.confidence or "softmax",
            state_mode=args.state_mode,
            pruned_blocks=pruned,
            exit_scope=args.exit_scope,
            threshold_decay=args.threshold_decay,
        )
        at_pruned = sorted(pruned.intersection(policy.active_exits))
        if at_pruned:
            raise config.UserError(
                f"exit_layers {at_pruned} end with a pruned block, so there is nothing new to decide on; "
                "choose other exit_layers or prune_layers"
            )
        return policy, note

    @cached_property
    def active_exits(self) -> tuple[int, ...]:
        """Exit layers where something is evaluated: those whose threshold is below 1."""
        pairs = zip(self.exit_layers, self.thresholds, strict=True)
        return tuple(layer for layer, threshold in pairs if threshold < 1)

    def first_eligible_position(self, prompt_length: int) -> int:
        """Position of the first token that may exit, in a row whose prompt has ``prompt_length`` tokens."""
        return 1 if self.exit_scope == "all" else prompt_length

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

    def terms(self, prompt_length: int) -> ExitTerms:
        """What of this policy matters for the cost of a row with ``prompt_length`` prompt tokens."""
        return ExitTerms(
            evaluated_layers=self.active_exits,
            classifier_macs=(0,) * len(self.active_exits),
            reads_lm_head=self.confidence in READS_LM_HEAD,
            recomputes_state=self.state_mode == "recompute",
            pruned_blocks=self.pruned_blocks,
            first_eligible=self.first_eligible_position(prompt_length),
        )

    def describe(self) -> dict[str, Any]:
        """Every setting as JSON data, for result files and cache identities."""
        description = asdict(self)
        description["exit_layers"] = list(self.exit_layers)
        description["thresholds"] = list(self.thresholds)
        description["pruned_blocks"] = sorted(self.pruned_blocks)
        return description
