"""In which order requests run and under which policy: all at once, or block by block to hold a budget.

A block's threshold depends on the blocks before it only, and blocks are made of documents in the order of requests;
so results do not depend on the batch size. Knows policies and compute records; knows no texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from dynamax_lm_eval.budget.controller import (
    SAMPLE_DOCUMENTS,
    SAMPLE_THRESHOLDS,
    Curve,
    LatencyController,
    Measurement,
    ThresholdController,
    blocks_of,
)
from dynamax_lm_eval.compute.accounting import ComputeRecord, Trace
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy

logger = logging.getLogger(__name__)

#: Answers requests, each a (policy, index); returns their records in order. With False the answers are thrown away.
Answer = Callable[[Sequence[tuple[ExitPolicy, int]], bool], Sequence[ComputeRecord]]

#: Prompt and answer of the row whose cost at threshold 0 bounds what a budget may ask for.
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 64, 32
#: A budget that is missed by more than this is warned of.
_MISSED = 0.02


class BudgetRunner:
    """Runs requests as the arguments of a run say."""

    def __init__(self, args: DynamaxArgs, policy: ExitPolicy, engine: Engine) -> None:
        """
        Raises:
            UserError: no threshold can hold the budget.
        """
        self._args = args
        self._trajectories: dict[str, list[dict[str, Any]]] = {}
        if not self.has_budget:
            return
        if not policy.exit_layers:
            raise UserError("a budget needs exits, and this policy has none")
        self._cheapest = cheapest_fraction(policy, engine)
        most = 1 / self._cheapest
        if args.target_reduction is not None and args.target_reduction > most:
            raise UserError(
                f"target_reduction={args.target_reduction:g} cannot be reached: if every token left at the first of "
                f"the exits {list(policy.exit_layers)}, compute_reduction would be {most:.2f}"
            )

    @property
    def has_budget(self) -> bool:
        return self.is_asked_for(self._args)

    @staticmethod
    def is_asked_for(args: DynamaxArgs) -> bool:
        """Whether these arguments name a budget."""
        return args.target_reduction is not None or args.target_latency_ms is not None

    @property
    def in_blocks(self) -> bool:
        """Requests run in several calls, each too short for a progress bar of its own."""
        return self.has_budget and self._args.budget != "two_pass"

    def describe(self) -> dict[str, Any] | None:
        """For result files: what was asked for, and the thresholds of every block of every task so far."""
        if not self.has_budget:
            return None
        args = self._args
        return {
            "target_reduction": args.target_reduction,
            "target_latency_ms": args.target_latency_ms,
            "strategy": args.budget or "online",
            "reproducible": args.target_latency_ms is None,
            "trajectory": self._trajectories,
        }

    def start_run(self) -> None:
        """Forgets earlier evaluations."""
        self._trajectories = {}

    def run(
        self, documents: Sequence[tuple[str, Any]], policy: ExitPolicy, answer: Answer, disable_tqdm: bool = False
    ) -> None:
        """Answers all requests.

        Args:
            documents: task and document of every request.
            policy: of the run; a budget replaces its thresholds.
            answer: runs some of them.
            disable_tqdm: shows no progress over blocks.
        """
        if not self.has_budget:
            answer([(policy, i) for i in range(len(documents))], True)
            return
        tasks: dict[str, list[int]] = {}
        for index, (task, _) in enumerate(documents):
            tasks.setdefault(task, []).append(index)
        for task, indices in tasks.items():
            own = [documents[i] for i in indices]

            def run(asked: Sequence[tuple[ExitPolicy, int]], keep: bool, indices: list[int] = indices) -> Any:
                return answer([(chosen, indices[i]) for chosen, i in asked], keep)

            if self._args.budget == "two_pass":
                self._two_passes(task, own, policy, run)
            else:
                self._blocks(task, own, policy, run, disable_tqdm)

    def _blocks(
        self, task: str, documents: Sequence[Any], policy: ExitPolicy, answer: Answer, disable_tqdm: bool
    ) -> None:
        args, curve, count = self._args, Curve(self._cheapest), len(set(documents))
        latency = (
            None if args.target_latency_ms is None else LatencyController(args.target_latency_ms / 1e3, curve, count)
        )
        budget = latency or ThresholdController(1 / (args.target_reduction or 1), curve, count)
        self._trajectories[task] = budget.trajectory
        for block in tqdm(blocks_of(documents), desc=f"Running {task} to a budget, in blocks", disable=disable_tqdm):
            threshold = budget.threshold()
            start = time.perf_counter()
            total = _sum(answer([(_at(policy, threshold), i) for i in block], True))
            seconds = time.perf_counter() - start
            found = budget.record(threshold, len({documents[i] for i in block}), total.full_macs, total.spent_macs)
            if latency is not None:
                if not total.generations:
                    raise UserError(
                        f"target_latency_ms is per generated token, and {task} generates none; use target_reduction"
                    )
                latency.timed(seconds, total.generated_tokens)
            logger.info("%s, %s", task, ", ".join(f"{name} {_shown(value)}" for name, value in found.items()))
        self._warn_if_missed(task, budget.trajectory)

    def _two_passes(self, task: str, documents: Sequence[Any], policy: ExitPolicy, answer: Answer) -> None:
        assert self._args.target_reduction is not None
        names = list(dict.fromkeys(documents))
        step = max(1, len(names) // SAMPLE_DOCUMENTS)
        sample = set(names[::step][:SAMPLE_DOCUMENTS])
        tried = [i for i, document in enumerate(documents) if document in sample]
        asked = [(_at(policy, threshold), i) for threshold in SAMPLE_THRESHOLDS for i in tried]
        records = answer(asked, False)
        curve = Curve(self._cheapest)
        for n, threshold in enumerate(SAMPLE_THRESHOLDS):
            total = _sum(records[n * len(tried) : (n + 1) * len(tried)])
            if total.full_macs:
                curve.seen.append(Measurement(threshold, total.full_macs, total.spent_macs))
        threshold = curve.threshold_for(1 / self._args.target_reduction)
        logger.info("%s: threshold %.4f, chosen on %d documents", task, threshold, len(sample))
        total = _sum(answer([(_at(policy, threshold), i) for i in range(len(documents))], True))
        budget = ThresholdController(
            1 / self._args.target_reduction, curve, len(names), self._trajectories.setdefault(task, [])
        )
        budget.record(threshold, len(names), total.full_macs, total.spent_macs)
        self._warn_if_missed(task, budget.trajectory)

    def _warn_if_missed(self, task: str, trajectory: list[dict[str, Any]]) -> None:
        if not trajectory:
            return
        for name, target, found, missed in (
            ("compute_reduction", self._args.target_reduction, trajectory[-1]["compute_reduction_so_far"], abs),
            ("ms per token", self._args.target_latency_ms, trajectory[-1].get("ms_per_token_so_far"), float),
        ):
            if target is not None and (found is None or missed(found / target - 1) > _MISSED):
                logger.warning("%s: %s is %s, not the %g that was asked for", task, name, _shown(found), target)


def cheapest_fraction(policy: ExitPolicy, engine: Engine) -> float:
    """Fraction of compute at threshold 0, for a row of typical length."""
    trace = Trace(
        prompt_tokens=_TYPICAL_PROMPT,
        fed_tokens=_TYPICAL_PROMPT + _TYPICAL_ANSWER,
        num_output_tokens=_TYPICAL_ANSWER,
        exit_layers=(policy.exit_layers[0],)
        * (_TYPICAL_ANSWER if policy.exit_scope == "generated" else _TYPICAL_PROMPT + _TYPICAL_ANSWER - 1),
        generated=True,
    )
    return min(1.0, 1 / engine.account(trace, _at(policy, 0.0)).compute_reduction)


def _at(policy: ExitPolicy, threshold: float) -> ExitPolicy:
    return replace(policy, thresholds=(threshold,) * len(policy.exit_layers))


def _sum(records: Sequence[ComputeRecord]) -> ComputeRecord:
    return ComputeRecord.sum(records)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
