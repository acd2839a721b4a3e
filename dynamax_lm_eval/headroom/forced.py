"""Texts scored by the engine with given exits: what is answered when tokens leave states behind.

A confidence that returns what was decided before makes the engine itself do the rest: states, read-outs, traces.
T tokens that may leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.requests import Scoring, ScoringRequest
from dynamax_lm_eval.engine.scoring import score
from dynamax_lm_eval.exits.confidences import Confidence, ExitInputs
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness.documents import naming_document
from dynamax_lm_eval.headroom.text import Row
from dynamax_lm_eval.progress import Bar


class ForcedConfidence(Confidence):
    """The confidence of one row: 1 where its tokens are to leave, else 0; costs nothing.

    Of a row, an exit sees the tokens that have not left, in the order of their positions.
    """

    name = "forced"

    def __init__(self, layers: IntArray) -> None:
        """``layers``: (T,) the number of blocks that each token of the row which may leave is to run through."""
        self._layers = layers

    def score(self, inputs: ExitInputs) -> Tensor:
        in_flight = self._layers[self._layers >= inputs.layer]
        assert len(in_flight) == len(inputs.after), "an exit sees all tokens of one row that have not left"
        leaves = torch.from_numpy(in_flight == inputs.layer)
        return leaves.to(device=inputs.after.device, dtype=torch.float32)


@dataclass(frozen=True)
class ForcedPolicy(ExitPolicy):
    """A policy of one row whose tokens leave after the numbers of blocks ``forced`` (depth: not at all)."""

    forced: tuple[int, ...] = ()

    @cached_property
    def resolved_confidence(self) -> Confidence:
        return ForcedConfidence(np.asarray(self.forced, dtype=np.int64))


def forced_policies(policy: ExitPolicy, rows: Sequence[Row], layers: IntArray) -> list[ExitPolicy]:
    """Returns a policy for each row, with the exits, states and adapters of ``policy``, whose tokens leave as given.

    Args:
        policy: its thresholds and confidence are not looked at.
        rows: T tokens of them may leave.
        layers: (T,) the number of blocks that each of them is to run through.
    """
    policies: list[ExitPolicy] = []
    for part in np.split(layers, np.cumsum([row.num_eligible for row in rows])[:-1]):
        policies.append(
            ForcedPolicy(
                policy.num_layers,
                policy.exit_layers,
                (0.5,) * len(policy.exit_layers),
                state_mode=policy.state_mode,
                final_block=policy.final_block,
                adapter=policy.adapter,
                forced=tuple(part.tolist()),
            )
        )
    return policies


@dataclass(frozen=True)
class Measured:
    """What the engine did with T tokens that may leave.

    Attributes:
        layers: (T,) the number of blocks that each ran through.
        best: (T,) its best token where it was read out.
        record: the compute of all rows.
    """

    layers: IntArray
    best: IntArray
    record: ComputeRecord


def measure(engine: Engine, rows: Sequence[Row], policies: Sequence[ExitPolicy], max_rows: int, shown: str) -> Measured:
    """Scores rows, each under a policy of its own; tokens that leave leave states behind.

    Raises:
        UserError: the model computed something that is not finite.
    """
    requests = [
        ScoringRequest(row.ids, row.prompt_length, [[0]] * (row.num_eligible + 1), policy)
        for row, policy in zip(rows, policies, strict=True)
    ]
    found: dict[int, Scoring] = {}
    with (
        naming_document([("", f"row {i} of the text") for i in range(len(rows))]),
        Bar(len(rows), shown) as bar,
    ):
        for index, scoring in score(engine, requests, max_rows):
            found[index] = scoring
            bar.update()
    results = [found[i] for i in range(len(rows))]
    # The first of the best tokens is that of the last token of the prompt, which does not leave.
    return Measured(
        layers=np.concatenate([np.asarray(result.trace.exit_layers, dtype=np.int64) for result in results]),
        best=np.concatenate([np.asarray(result.greedy_tokens[1:], dtype=np.int64) for result in results]),
        record=ComputeRecord.sum(
            engine.account(result.trace, policy) for result, policy in zip(results, policies, strict=True)
        ),
    )
