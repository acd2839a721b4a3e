"""Compute in the harness's results: rows beside the tasks' metrics, samples, and the section ``compute``.

Knows compute records and the layout of results; knows nothing of models, and not how the records came about.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamax_lm_eval.compute.accounting import (
    ACCOUNTING,
    SCHEMA_VERSION,
    ComputeRecord,
    ExecutedCompute,
    exit_histogram,
    ratio_stderr,
    reduction_stderr,
    total_reduction_stderr,
)
from dynamax_lm_eval.compute.thesis import ThesisFormula
from dynamax_lm_eval.harness import latency, roofline
from dynamax_lm_eval.harness.latency import Latency
from dynamax_lm_eval.harness.speed import SpeedLog
from dynamax_lm_eval.types import RooflineDevice

logger = logging.getLogger(__name__)

#: Task name -> document id -> records of its responses, in the harness's order.
RecordsByDocument = dict[str, dict[int, list[ComputeRecord]]]

#: Whether more is better, of every row that is added; None where it is neither.
HIGHER_IS_BETTER = {
    **dict.fromkeys(("compute_reduction", "compute_reduction_total", "compute_reduction_paper"), True),
    "compute_vs_full": True,
    **dict.fromkeys(("mean_exit_layer", "generated_tokens")),
    **dict.fromkeys(("token_limit_share", "degenerate_rate"), False),
}
#: Numbers that every sample has, and names among its metrics.
_OF_SAMPLES = ("compute_reduction", "mean_exit_layer")


@dataclass(frozen=True)
class RankReport:
    """What one process has to say of its part of an evaluation.

    Attributes:
        records: of its documents.
        seconds: by kind of request.
        fed_tokens: that ran in them.
        executed: the compute that was executed.
        latencies: of its generations, by task.
        energy: what it drew, as :meth:`EnergyMeter.to_json` says; without tokens.
        peak_memory: most bytes of GPU memory; None on a CPU.
        batching: rows of a batch, and requests that may have begun where that was said.
        bytes_per_weight: of the backbone.
        roofline: the device whose least time is asked for.
        speed: how long the full model took beside it, where that was measured.
    """

    records: RecordsByDocument
    seconds: dict[str, float]
    fed_tokens: int
    executed: ExecutedCompute
    latencies: dict[str, list[Latency]]
    energy: dict[str, Any]
    peak_memory: int | None
    batching: tuple[Any, int | None]
    bytes_per_weight: float
    roofline: RooflineDevice | None
    speed: SpeedLog


def add_compute(
    results: dict[str, Any],
    gathered: list[RankReport],
    thesis: ThesisFormula | None = None,
) -> None:
    """Puts compute into the results of an evaluation, after the tasks' own metrics.

    Args:
        results: of the harness; rows, samples and the section ``compute`` are added.
        gathered: of each rank.
        thesis: gives ``compute_reduction_thesis``, where there is such a formula for the backbone.
    """
    by_task: RecordsByDocument = defaultdict(dict)
    seconds: dict[str, float] = {}
    latencies: dict[str, list[Latency]] = defaultdict(list)
    for rank in gathered:
        for name, documents in rank.records.items():
            by_task[name].update(documents)
        for name, found in rank.latencies.items():
            latencies[name] += found
        # Ranks work at the same time: the slowest one is what was waited for.
        seconds = {kind: max(seconds.get(kind, 0.0), rank.seconds.get(kind, 0.0)) for kind in {*seconds, *rank.seconds}}

    per_document = {
        name: [ComputeRecord.sum(records) for _, records in sorted(documents.items())]
        for name, documents in by_task.items()
    }
    subtasks: Mapping[str, list[str]] = results.get("group_subtasks", {})
    of_groups: dict[str, list[list[ComputeRecord]]] = {}
    for name, metrics in results["results"].items():
        leaves = [name] if name in per_document else sorted(_leaves(name, subtasks, per_document))
        records = [per_document[leaf] for leaf in leaves]
        if not any(records):
            continue
        of_leaves = _filters_of(leaves, results["results"]) if name in per_document else []
        filters = _filters(metrics) or of_leaves or ["none"]
        added = _metrics(records, filters)
        metrics.update(added)
        if name in results.get("groups", {}):
            results["groups"][name].update(added)
        rows = dict.fromkeys(key.partition(",")[0] for key in added if not key.partition(",")[0].endswith("_stderr"))
        directions = {row: HIGHER_IS_BETTER[row] for row in rows}
        results.setdefault("higher_is_better", {}).setdefault(name, {}).update(directions)
        if name not in per_document:
            of_groups[name] = records
    for name, samples in results.get("samples", {}).items():
        for sample in samples:
            responses = by_task[name][sample["doc_id"]]
            total = ComputeRecord.sum(responses)
            sample["compute_reduction"] = total.compute_reduction
            sample["mean_exit_layer"] = total.mean_exit_layer
            sample["metrics"] = [*sample.get("metrics", ()), *_OF_SAMPLES]
            sample["macs"] = {
                "eligible_full": total.full_macs,
                "eligible": total.spent_macs,
                "total_full": total.full_total_macs,
                "total": total.total_macs,
            }
            if total.generations:
                sample["weights"] = {"full": total.full_weights_read, "read": total.weights_read}
            sample["degenerate"] = total.degenerate
            sample["exit_layers"] = [layers for record in responses for layers in record.exit_layers]
            if total.confidences:
                sample["exit_confidences"] = [found for record in responses for found in record.confidences or [[]]]

    all_records = [record for documents in per_document.values() for record in documents]
    generations = ComputeRecord.sum(record for record in all_records if record.generations)
    by_name = {name: [documents] for name, documents in per_document.items()} | of_groups
    results["compute"] = {
        "schema_version": SCHEMA_VERSION,
        "accounting": ACCOUNTING,
        "by_task": {name: _breakdown(found, thesis) for name, found in by_name.items()},
        "overall": {
            **_breakdown([*per_document.values()], thesis),
            **_timing(sum(rank.fed_tokens for rank in gathered), seconds),
            "physical": ExecutedCompute.sum(rank.executed for rank in gathered).to_json(),
            "weights": roofline.weights(generations, gathered[0].bytes_per_weight),
            "speed": _speed([rank.speed for rank in gathered]),
            "roofline": roofline.roofline(generations, gathered[0].bytes_per_weight, gathered[0].roofline),
            "latency": latency.summary(latencies, *gathered[0].batching),
            "energy": _energy(gathered),
            "peak_memory_bytes": [rank.peak_memory for rank in gathered],
        },
    }
    if all_records and not any(record.eligible_tokens for record in all_records):
        logger.warning(
            "No token was eligible for an exit (single-token continuations, or nothing generated after the first "
            "token), so compute_reduction is 1; exit_scope=all lets prompt tokens exit too"
        )


def document_totals(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], int]:
    """Returns the MACs of each document of a task, prompts included, by its id and hash; ``samples``: as written."""
    return {(sample["doc_id"], sample["doc_hash"]): sample["macs"]["total"] for sample in samples}


def add_vs_full(results: dict[str, Any], full: Mapping[str, Mapping[tuple[int, str], int]]) -> None:
    """Puts ``compute_vs_full`` beside the metrics of tasks and groups that the full model answered as well.

    Args:
        results: with compute and samples.
        full: of each task, the MACs of its documents in the full model's run, as :func:`document_totals` has them.
    """
    own = {name: document_totals(samples) for name, samples in results["samples"].items()}
    subtasks: Mapping[str, list[str]] = results.get("group_subtasks", {})
    for name, metrics in results["results"].items():
        leaves = [name] if name in own else sorted(_leaves(name, subtasks, own))
        if not leaves or any(own[leaf].keys() != full.get(leaf, {}).keys() for leaf in leaves):
            continue
        pairs = [[(float(full[leaf][key]), float(macs)) for key, macs in own[leaf].items()] for leaf in leaves]
        sides = [sum(side) for side in zip(*(pair for task in pairs for pair in task), strict=True)]
        values = {"compute_vs_full": sides[0] / sides[1], "compute_vs_full_stderr": _or_na(ratio_stderr(pairs))}
        added = {f"{row},{chosen}": value for chosen in _filters(metrics) for row, value in values.items()}
        metrics.update(added)
        if name in results.get("groups", {}):
            results["groups"][name].update(added)
        results["higher_is_better"][name]["compute_vs_full"] = HIGHER_IS_BETTER["compute_vs_full"]


def _metrics(tasks: list[list[ComputeRecord]], filters: list[str]) -> dict[str, Any]:
    """Returns the rows that stand beside a task's or group's metrics, for each of its filters.

    ``tasks``: the records of each task's documents; of a task itself, one list.
    """
    total = ComputeRecord.sum(record for documents in tasks for record in documents)
    values: dict[str, Any] = {
        "compute_reduction": total.compute_reduction,
        "compute_reduction_stderr": _or_na(reduction_stderr(tasks)),
        "compute_reduction_total": total.compute_reduction_total,
        "compute_reduction_total_stderr": _or_na(total_reduction_stderr(tasks)),
        "compute_reduction_paper": total.compute_reduction_paper,
    }
    if total.mean_exit_layer is not None:
        values["mean_exit_layer"] = total.mean_exit_layer
    if total.generations:
        values["generated_tokens"] = total.generated_tokens / total.generations
        values["token_limit_share"] = total.hit_limit / total.generations
        values["degenerate_rate"] = total.degenerate / total.generations
    return {f"{metric},{name}": value for name in filters for metric, value in values.items()}


def _breakdown(tasks: list[list[ComputeRecord]], thesis: ThesisFormula | None) -> dict[str, Any]:
    """Returns everything that is known about the compute of the documents of some tasks, as JSON data."""
    total = ComputeRecord.sum(record for documents in tasks for record in documents)
    return {
        "documents": sum(map(len, tasks)),
        "responses": total.responses,
        "compute_reduction": total.compute_reduction,
        "compute_reduction_stderr": reduction_stderr(tasks),
        "compute_reduction_total": total.compute_reduction_total,
        "compute_reduction_total_stderr": total_reduction_stderr(tasks),
        "compute_reduction_paper": total.compute_reduction_paper,
        "compute_reduction_thesis": None if thesis is None else thesis.reduction(total.exit_layers),
        "mean_exit_layer": total.mean_exit_layer,
        "exit_histogram": exit_histogram(total),
        "tokens": {
            "prompt": total.prompt_tokens,
            "fed": total.fed_tokens,
            "eligible_tokens": total.eligible_tokens,
            "generated": total.generated_tokens,
            "scored": total.scored_tokens,
        },
        "generations": total.generations,
        "mean_generated_tokens": total.generated_tokens / total.generations if total.generations else None,
        "token_limit_share": total.hit_limit / total.generations if total.generations else None,
        "degenerate_rate": total.degenerate / total.generations if total.generations else None,
        "macs": {
            "eligible_full": total.full_macs,
            "eligible_blocks": total.block_macs,
            "exits": {
                "classifiers": total.classifier_macs,
                "state_recompute": total.recompute_macs,
                "adapters": total.adapter_macs,
                "lm_head_reads": total.lm_head_macs,
            },
            "total_full": total.full_total_macs,
            "total": total.total_macs,
        },
        "paper_units": {"full": total.paper_full, "spent": total.paper_spent},
        "drafts": roofline.drafts(total),
    }


def _speed(logs: list[SpeedLog]) -> dict[str, Any] | None:
    """Returns the clock against the full model's, over the blocks of all processes; None where nobody measured it."""
    pairs = [pair for log in logs for pair in log.pairs]
    if not pairs:
        return None
    return SpeedLog(pairs, sum(log.requests for log in logs), sum(log.same for log in logs)).to_json()


def _energy(gathered: list[RankReport]) -> dict[str, Any]:
    """Returns the energy of all processes: of GPUs the sum, since each has its own, of one machine's processor once."""
    first = gathered[0].energy
    tokens = sum(
        record.generated_tokens
        for rank in gathered
        for documents in rank.records.values()
        for records in documents.values()
        for record in records
    )
    if first["joules"] is None:
        return first
    counted = [rank.energy["joules"] for rank in gathered]
    joules = sum(counted) if first["source"] == "nvml" else max(counted)
    return {**first, "joules": joules, "per_generated_token": joules / tokens if tokens else None}


def _timing(fed_tokens: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Returns wall-clock time and the tokens that ran in it; cached responses are not among them."""
    spent = sum(seconds.values())
    return {
        "seconds": dict(seconds),
        "seconds_total": spent,
        "fed_tokens_in_seconds": fed_tokens,
        "fed_tokens_per_second": fed_tokens / spent if spent > 0 else None,
    }


def _filters(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the filters that a result entry has metrics for, in order."""
    return list(dict.fromkeys(key.partition(",")[2] for key in metrics if "," in key))


def _filters_of(tasks: Iterable[str], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks for name in _filters(results.get(task, {}))))


def _leaves(group: str, subtasks: Mapping[str, list[str]], tasks: Mapping[str, Any]) -> set[str]:
    """Returns the tasks below a group, each once even where it belongs to several of its subgroups."""
    leaves: set[str] = set()
    for child in subtasks.get(group, []):
        leaves |= {child} if child in tasks else _leaves(child, subtasks, tasks)
    return leaves


def _or_na(value: float | None) -> float | str:
    return "N/A" if value is None else value
