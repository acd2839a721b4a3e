"""In which order requests run and under which policy: all at once, or block by block to hold a budget.

A block's threshold depends on the blocks before it only, and blocks are made of documents in the order of requests;
so results do not depend on the batch size. Knows policies and compute records; knows no texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from dynamax_lm_eval.budget.controller import (
    SAMPLE_DOCUMENTS,
    SAMPLE_THRESHOLDS,
    Curve,
    LatencyController,
    Measurement,
    ThresholdController,
    blocks_of,
)
from dynamax_lm_eval.budget.fastest import OFF, Fastest, find_fastest
from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.progress import over

logger = logging.getLogger(__name__)


class Answered(Protocol):
    """An answer to a request; all that a budget needs of it is its compute."""

    @property
    def record(self) -> ComputeRecord: ...


AnyAnswer = TypeVar("AnyAnswer", bound=Answered)
#: Answers requests, each a (policy, index of the request); yields places among them, with the answers.
Run = Callable[[Sequence[tuple[ExitPolicy, int]]], Iterator[tuple[int, AnyAnswer]]]

#: Prompt and answer of the row whose cost at threshold 0 bounds what a budget may ask for.
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 64, 32
#: A budget that is missed by more than this is warned of.
_MISSED = 0.02


class BudgetRunner:
    """Runs requests as the arguments of a run say."""

    def __init__(self, args: DynamaxArgs, policy: ExitPolicy, engine: Engine, num_processes: int = 1) -> None:
        """Checks that the budget, if there is one, can be held.

        Raises:
            UserError: no threshold can hold the budget, or several processes share the documents.
        """
        self._args = args
        self._is_trying = False
        self._fastest: dict[str, Fastest] = {}
        self._trajectories: dict[str, list[dict[str, Any]]] = {}
        if not self.has_budget:
            return
        if num_processes > 1:
            raise UserError(
                "target_reduction, target_latency_ms and threshold=speed follow one sequence of documents, not "
                f"that of {num_processes} processes; run one"
            )
        if not policy.exit_layers:
            raise UserError("a budget needs exits, and this policy has none")
        if args.fastest:
            return
        self._cheapest = cheapest_fraction(policy, engine)
        most = 1 / self._cheapest
        if args.target_reduction is not None and args.target_reduction > most:
            raise UserError(
                f"target_reduction={args.target_reduction:g} cannot be reached: if every token left at the first of "
                f"the exits {list(policy.exit_layers)}, compute_reduction would be {most:.2f}"
            )

    @property
    def has_budget(self) -> bool:
        """Says whether the run has a budget."""
        return self.is_asked_for(self._args)

    @staticmethod
    def is_asked_for(args: DynamaxArgs) -> bool:
        """Says whether these arguments name a budget."""
        return args.target_reduction is not None or args.target_latency_ms is not None or args.fastest

    def check_no_cache(self) -> None:
        """Refuses a cache of answers (UserError) where answers depend on what ran before them."""
        if self.has_budget:
            raise UserError(
                "--use_cache and target_reduction, target_latency_ms or threshold=speed exclude each other: an answer, "
                "or what it cost, depends on what ran before it"
            )

    @property
    def in_blocks(self) -> bool:
        """Says whether requests run in several calls, each too short for a progress bar of its own."""
        if self._args.fastest:
            return self._is_trying
        return self.has_budget and self._args.budget != "two_pass"

    def describe(self) -> dict[str, Any] | None:
        """Returns for result files what was asked for, and the thresholds of all blocks of all tasks so far."""
        if not self.has_budget:
            return None
        args = self._args
        if args.fastest:
            return {"chosen_for": "speed", "by_task": {task: found.to_json() for task, found in self._fastest.items()}}
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
        self._fastest = {}

    def answers(
        self,
        documents: Sequence[tuple[str, Any]],
        policy: ExitPolicy,
        run: Run[AnyAnswer],
        disable_tqdm: bool = False,
    ) -> Generator[tuple[int, AnyAnswer], None, None]:
        """Yields the index of every request with its answer, as soon as it is known.

        Args:
            documents: task and document of every request.
            policy: of the run; a budget replaces its thresholds.
            run: answers some of the requests.
            disable_tqdm: shows no progress over blocks.
        """
        if not self.has_budget:
            yield from run([(policy, i) for i in range(len(documents))])
            return
        tasks: dict[str, list[int]] = {}
        for index, (task, _) in enumerate(documents):
            tasks.setdefault(task, []).append(index)
        for task, indices in tasks.items():
            own = [documents[i] for i in indices]

            def run_task(
                jobs: Sequence[tuple[ExitPolicy, int]], indices: list[int] = indices
            ) -> Iterator[tuple[int, AnyAnswer]]:
                return run([(job_policy, indices[i]) for job_policy, i in jobs])

            if self._args.fastest:
                answers = self._at_fastest(task, own, policy, run_task)
            elif self._args.budget == "two_pass":
                answers = self._two_passes(task, own, policy, run_task)
            else:
                answers = self._blocks(task, own, policy, run_task, disable_tqdm)
            for place, answer in answers:
                yield indices[place], answer

    def _at_fastest(
        self, task: str, documents: Sequence[Any], policy: ExitPolicy, run: Run[AnyAnswer]
    ) -> Iterator[tuple[int, AnyAnswer]]:
        """Runs a task at the threshold that is fastest on some of its documents; scores need none."""

        def tried(threshold: float, places: Sequence[int]) -> None:
            for _, answer in run([(_at(policy, threshold), i) for i in places]):
                if not answer.record.generations:
                    raise _NothingGenerated

        threshold, self._is_trying = OFF, True
        try:
            found = self._fastest[task] = find_fastest(documents, tried)
            threshold = found.threshold
            shown = ", ".join(f"{value:g} {speedup:.3f}" for value, speedup in found.speedups.items())
            logger.info("%s: speed against the full model on %d documents: %s", task, found.documents, shown)
            if threshold == OFF:
                logger.warning("%s: no threshold that was tried is faster than the full model, which runs", task)
        except _NothingGenerated:
            pass
        finally:
            self._is_trying = False
        yield from run([(_at(policy, threshold), i) for i in range(len(documents))])

    def _blocks(
        self, task: str, documents: Sequence[Any], policy: ExitPolicy, run: Run[AnyAnswer], disable_tqdm: bool
    ) -> Iterator[tuple[int, AnyAnswer]]:
        args, curve, count = self._args, Curve(self._cheapest), len(set(documents))
        latency = None
        if args.target_latency_ms is not None:
            latency = LatencyController(args.target_latency_ms / 1e3, curve, count)
        controller = latency or ThresholdController(1 / (args.target_reduction or 1), curve, count)
        self._trajectories[task] = controller.trajectory
        for block in over(blocks_of(documents), f"Running {task} to a budget, in blocks", disable=disable_tqdm):
            threshold = controller.threshold()
            start = time.perf_counter()
            records = []
            for place, answer in run([(_at(policy, threshold), i) for i in block]):
                records.append(answer.record)
                yield block[place], answer
            seconds = time.perf_counter() - start
            total = ComputeRecord.sum(records)
            entry = controller.record(threshold, len({documents[i] for i in block}), total.full_macs, total.spent_macs)
            if latency is not None:
                if not total.generations:
                    raise UserError(
                        f"target_latency_ms is per generated token, and {task} generates none; use target_reduction"
                    )
                latency.timed(seconds, total.generated_tokens)
            logger.info("%s, %s", task, ", ".join(f"{name} {_shown(value)}" for name, value in entry.items()))
        self._warn_if_missed(task, controller.trajectory)

    def _two_passes(
        self, task: str, documents: Sequence[Any], policy: ExitPolicy, run: Run[AnyAnswer]
    ) -> Iterator[tuple[int, AnyAnswer]]:
        assert self._args.target_reduction is not None
        names = list(dict.fromkeys(documents))
        step = max(1, len(names) // SAMPLE_DOCUMENTS)
        sample = set(names[::step][:SAMPLE_DOCUMENTS])
        sampled = [i for i, document in enumerate(documents) if document in sample]
        jobs = [(_at(policy, threshold), i) for threshold in SAMPLE_THRESHOLDS for i in sampled]
        records = {place: answer.record for place, answer in run(jobs)}  # the answers are thrown away
        curve = Curve(self._cheapest)
        for n, threshold in enumerate(SAMPLE_THRESHOLDS):
            total = ComputeRecord.sum(records[place] for place in range(n * len(sampled), (n + 1) * len(sampled)))
            if total.full_macs:
                curve.measurements.append(Measurement(threshold, total.full_macs, total.spent_macs))
        threshold = curve.threshold_for(1 / self._args.target_reduction)
        logger.info("%s: threshold %.4f, chosen on %d documents", task, threshold, len(sample))
        final_records = {}
        for place, answer in run([(_at(policy, threshold), i) for i in range(len(documents))]):
            final_records[place] = answer.record
            yield place, answer
        total = ComputeRecord.sum(final_records.values())
        careful = [records[len(records) - len(sampled) + n] for n in range(len(sampled))]
        _warn_of_longer_texts(task, careful, [final_records[i] for i in sampled], len(sample))
        trajectory = self._trajectories.setdefault(task, [])
        controller = ThresholdController(1 / self._args.target_reduction, curve, len(names), trajectory)
        controller.record(threshold, len(names), total.full_macs, total.spent_macs)
        self._warn_if_missed(task, controller.trajectory)

    def _warn_if_missed(self, task: str, trajectory: list[dict[str, Any]]) -> None:
        if not trajectory:
            return
        for name, target, reached, miss in (
            ("compute_reduction", self._args.target_reduction, trajectory[-1]["compute_reduction_so_far"], abs),
            ("ms per token", self._args.target_latency_ms, trajectory[-1].get("ms_per_token_so_far"), float),
        ):
            if target is not None and (reached is None or miss(reached / target - 1) > _MISSED):
                logger.warning("%s: %s is %s, not the %g that was asked for", task, name, _shown(reached), target)


def _warn_of_longer_texts(
    task: str, careful: Sequence[ComputeRecord], own: Sequence[ComputeRecord], documents: int
) -> None:
    """Warns where a budget per token is held, and texts that got longer took more than that saved.

    The full model's run is not known. What comes nearest to it are the ``careful`` answers, at the highest threshold
    that was tried, with all their tokens at full depth; ``own`` are those of the run to the same requests.
    """
    full = sum(record.full_total_macs for record in careful)
    spent = sum(record.total_macs for record in own)
    if spent > full > 0:
        logger.warning(
            "%s: compute_reduction is per token, and texts got longer: the %d documents that were tried took %.2f "
            "times the compute of their answers at threshold %g, these at full depth; compare with a run of the full "
            "model",
            task,
            documents,
            spent / full,
            SAMPLE_THRESHOLDS[-1],
        )


class _NothingGenerated(Exception):  # noqa: N818 (a signal)
    """A task asks for scores."""


def cheapest_fraction(policy: ExitPolicy, engine: Engine) -> float:
    """Returns the fraction of compute at threshold 0, for a row of typical length."""
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


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
