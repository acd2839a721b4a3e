"""Compute beside the metrics: what happens around lm-evaluation-harness's ``evaluate``.

Responses cannot carry compute (filters and scorers expect plain values), so the model keeps a
:class:`ResponseLedger` on the side. The public ``lm_eval.evaluator.evaluate`` is wrapped once; afterwards the
records are matched to the tasks' instances, gathered over ranks, summed, and written into the results.

Knows the harness's instances, caches and result layout; knows nothing of models.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CellType, FrameType
from typing import Any

import lm_eval.evaluator
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.utils import handle_non_serializable, hash_string
from torch.utils import collect_env

from dynamax_lm_eval.compute.accounting import (
    ACCOUNTING,
    SCHEMA_VERSION,
    ComputeRecord,
    ExecutedCompute,
    exit_histogram,
    reduction_stderr,
    total_reduction_stderr,
)
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.ledger import ResponseLedger, check_database

logger = logging.getLogger(__name__)


_HIGHER_IS_BETTER = ("compute_reduction", "compute_reduction_total", "compute_reduction_paper")


def install() -> None:
    """Wraps ``lm_eval.evaluator.evaluate`` so that results of our model carry compute. Idempotent.

    The harness decorates its function. What the decorator calls is replaced, so that names which were bound to
    ``evaluate`` before (``from lm_eval import evaluate``) lead here as well.
    """
    _share_log()
    _check_caches()
    cell = _decorated(lm_eval.evaluator.evaluate)
    original = lm_eval.evaluator.evaluate if cell is None else cell.cell_contents
    if getattr(original, "_dynamax_wrapped", False):
        return
    wrapped = _wrap(original)
    wrapped._dynamax_wrapped = True  # type: ignore[attr-defined]
    if cell is None:  # a release without the decorator; check_followed tells where an earlier name is called
        lm_eval.evaluator.evaluate = wrapped
    else:
        cell.cell_contents = wrapped


def _decorated(function: Any) -> CellType | None:
    """Where the innermost decorator of a function keeps what it calls."""
    found = None
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        for cell in function.__closure__ or ():
            if cell.cell_contents is inner or getattr(cell.cell_contents, "_dynamax_wrapped", False):
                found = cell
        function = inner
    return found


def check_followed(ledger: ResponseLedger, needed_by: str | None) -> None:
    """Notices that the harness evaluates a model without having passed through :func:`install`'s wrapper.

    Models that are called directly are not meant. ``needed_by``: what of the model's arguments cannot do without.

    Raises:
        UserError: there is such an argument; otherwise a warning is logged.
    """
    if ledger.is_followed:
        return
    theirs = inspect.unwrap(lm_eval.evaluator.evaluate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not theirs:
        frame = frame.f_back
    if frame is None:
        return
    remedy = "import dynamax_lm_eval.lm before lm_eval.evaluate is bound to a name, or call lm_eval.simple_evaluate"
    if needed_by is not None:
        raise UserError(f"{needed_by} cannot be checked: evaluate was called past dynamax-lm-eval; {remedy}")
    logger.warning("The results will have no compute: evaluate was called past dynamax-lm-eval; %s", remedy)


def _check_caches() -> None:
    """Looks at files of ``--use_cache`` before the harness opens them: a damaged one would end in its thread."""
    original = CachingLM.__init__
    if getattr(original, "_dynamax_wrapped", False):
        return

    @functools.wraps(original)
    def checked(self: Any, lm: Any, cache_db: str) -> None:
        if isinstance(getattr(lm, "response_ledger", None), ResponseLedger):
            check_database(Path(cache_db))
        original(self, lm, cache_db)

    checked._dynamax_wrapped = True  # type: ignore[attr-defined]
    CachingLM.__init__ = checked


def _share_log() -> None:
    """Sends this package's messages where the harness's command sends its own."""
    theirs, ours = logging.getLogger("lm_eval"), logging.getLogger("dynamax_lm_eval")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate


@contextmanager
def one_of_many_evaluations() -> Iterator[None]:
    """Makes what the harness would repeat for each of many evaluations happen once in the process.

    It writes torch's description of the environment into every result, for which pip is started, seconds each time;
    and it logs the same messages: here errors only.
    """
    collect, log = collect_env.get_pretty_env_info, logging.getLogger("lm_eval")
    level = log.level
    collect_env.get_pretty_env_info = functools.partial(_collected, collect)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = collect
        log.setLevel(level)


@functools.cache
def _collected(collect: Callable[[], str]) -> str:
    return collect()


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        lm, task_dict = given["lm"], given["task_dict"]
        ledger = getattr(lm, "response_ledger", None)
        if not isinstance(ledger, ResponseLedger):
            return original(*args, **kwargs)
        _announce(lm, dict(_tasks(task_dict)), given)
        ledger.start_run()
        ledger.is_followed = True
        try:
            results = original(*args, **kwargs)
        except Exception as error:
            # Tells errors of a running evaluation from errors in what the user asked for.
            error.raised_while_evaluating = True  # type: ignore[attr-defined]
            raise
        finally:
            ledger.is_followed = False
        gathered = lm.gather_object(
            (
                _records_by_document(task_dict, ledger, given.get("samples")),
                dict(ledger.seconds),
                ledger.fed_tokens,
                ledger.executed,
            ),
            dst=0,
        )
        if results is not None:
            _write(results, gathered)
        return results

    return evaluate


def _announce(lm: Any, tasks: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Tells the model what will be asked, so that it can refuse before anything runs."""
    limit, samples = options.get("limit"), options.get("samples") or {}
    if not isinstance(samples, Mapping):  # what the harness makes of a path that does not exist
        raise UserError(f'--samples must be a file, or JSON like {{"task": [0, 7]}}, got {samples!r}')

    def documents(name: str) -> list[str]:
        task = tasks[name]
        chosen = task.doc_iterator(limit=get_sample_size(task, limit), samples=samples.get(name))
        return [document_hash(document) for _, document in chosen]

    names = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn")
    settings = {name: options.get(name) for name in names}
    lm.begin_run(tasks, documents, settings)


def document_hash(document: Any) -> str:
    """The harness's ``doc_hash`` of a document."""
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


#: Task name -> document id -> records of its responses, in the harness's order.
_ByDocument = dict[str, dict[int, list[ComputeRecord]]]


def _records_by_document(
    task_dict: Mapping[Any, Any], ledger: ResponseLedger, samples: Mapping[str, list[int]] | None
) -> _ByDocument:
    """The records of this rank's documents; clones that only pad ranks to equal length are left out."""
    seen: Counter[tuple[str, str]] = Counter()
    found: _ByDocument = {}
    for name, task in _tasks(task_dict):
        documents: dict[int, list[ComputeRecord]] = defaultdict(list)
        indices = (samples or {}).get(name)
        for instance in task.instances:
            for _ in range(instance.repeats or 1):
                key = (instance.request_type, hash_args(instance.request_type, instance.args))
                record = ledger.find(instance.request_type, instance.args, seen[key])
                seen[key] += 1
                documents[indices[instance.doc_id] if indices else instance.doc_id].append(record)
        found[name] = dict(documents)
    return found


def _tasks(task_dict: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """All (name, task), from the harness's present layout or the nested one of earlier releases."""
    if "tasks" in task_dict:
        yield from task_dict["tasks"].items()
        return
    for key, value in task_dict.items():
        if isinstance(value, Mapping):
            yield from _tasks(value)
        else:
            yield key, value


def _write(results: dict[str, Any], gathered: list[tuple[_ByDocument, dict[str, float], int, ExecutedCompute]]) -> None:
    """Puts compute into the results of an evaluation, after the tasks' own metrics."""
    by_task: _ByDocument = defaultdict(dict)
    seconds: dict[str, float] = {}
    for found, rank_seconds, *_ in gathered:
        for name, documents in found.items():
            by_task[name].update(documents)
        # Ranks work at the same time: the slowest one is what was waited for.
        seconds = {kind: max(seconds.get(kind, 0.0), rank_seconds.get(kind, 0.0)) for kind in {*seconds, *rank_seconds}}

    per_document = {
        name: [ComputeRecord.sum(records) for _, records in sorted(documents.items())]
        for name, documents in by_task.items()
    }
    subtasks: Mapping[str, list[str]] = results.get("group_subtasks", {})
    for name, metrics in results["results"].items():
        leaves = [name] if name in per_document else sorted(_leaves(name, subtasks, per_document))
        records = [record for leaf in leaves for record in per_document[leaf]]
        if not records:
            continue
        filters = _filters(metrics) or _filters_of(leaves, results["results"]) or ["none"]
        added = _metrics(records, filters)
        metrics.update(added)
        if name in results.get("groups", {}):
            results["groups"][name].update(added)
        results.setdefault("higher_is_better", {}).setdefault(name, {}).update(dict.fromkeys(_HIGHER_IS_BETTER, True))
    for name, samples in results.get("samples", {}).items():
        for sample in samples:
            responses = by_task[name][sample["doc_id"]]
            total = ComputeRecord.sum(responses)
            sample["compute_reduction"] = total.compute_reduction
            sample["macs"] = {
                "eligible_full": total.full_macs,
                "eligible": total.spent_macs,
                "total_full": total.full_total_macs,
                "total": total.total_macs,
            }
            sample["degenerate"] = total.degenerate
            sample["exit_layers"] = [layers for record in responses for layers in record.exit_layers]

    everything = [record for documents in per_document.values() for record in documents]
    results["compute"] = {
        "schema_version": SCHEMA_VERSION,
        "accounting": ACCOUNTING,
        "by_task": {name: _breakdown(documents) for name, documents in per_document.items()},
        "overall": {
            **_breakdown(everything),
            **_timing(sum(fed for _, _, fed, _ in gathered), seconds),
            "physical": ExecutedCompute.sum(physical for *_, physical in gathered).to_json(),
        },
    }
    if everything and not any(record.eligible_tokens for record in everything):
        logger.warning(
            "No token was eligible for an exit (single-token continuations, or nothing generated after the first "
            "token), so compute_reduction is 1; exit_scope=all lets prompt tokens exit too"
        )


def _metrics(documents: list[ComputeRecord], filters: list[str]) -> dict[str, Any]:
    """The rows that stand beside a task's metrics, for each of its filters."""
    total = ComputeRecord.sum(documents)
    values: dict[str, Any] = {
        "compute_reduction": total.compute_reduction,
        "compute_reduction_stderr": _or_na(reduction_stderr(documents)),
        "compute_reduction_total": total.compute_reduction_total,
        "compute_reduction_total_stderr": _or_na(total_reduction_stderr(documents)),
        "compute_reduction_paper": total.compute_reduction_paper,
    }
    if total.mean_exit_layer is not None:
        values["mean_exit_layer"] = total.mean_exit_layer
    if total.generations:
        values["generated_tokens"] = total.generated_tokens / total.generations
        values["token_limit_share"] = total.hit_limit / total.generations
        values["degenerate_rate"] = total.degenerate / total.generations
    return {f"{metric},{name}": value for name in filters for metric, value in values.items()}


def _breakdown(documents: list[ComputeRecord]) -> dict[str, Any]:
    """Everything known about the compute of some documents, as JSON data."""
    total = ComputeRecord.sum(documents)
    return {
        "documents": len(documents),
        "responses": total.responses,
        "compute_reduction": total.compute_reduction,
        "compute_reduction_stderr": reduction_stderr(documents),
        "compute_reduction_total": total.compute_reduction_total,
        "compute_reduction_total_stderr": total_reduction_stderr(documents),
        "compute_reduction_paper": total.compute_reduction_paper,
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
    }


def _timing(fed_tokens: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Wall-clock time and the tokens that ran in it, apart from counted compute: without cached responses."""
    spent = sum(seconds.values())
    return {
        "seconds": dict(seconds),
        "seconds_total": spent,
        "fed_tokens_in_seconds": fed_tokens,
        "fed_tokens_per_second": fed_tokens / spent if spent > 0 else None,
    }


def _filters(metrics: Mapping[str, Any]) -> list[str]:
    """Filters that a result entry has metrics for, in order."""
    return list(dict.fromkeys(key.partition(",")[2] for key in metrics if "," in key))


def _filters_of(tasks: Iterable[str], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks for name in _filters(results.get(task, {}))))


def _leaves(group: str, subtasks: Mapping[str, list[str]], tasks: Mapping[str, Any]) -> set[str]:
    """The tasks below a group, each once even where it belongs to several of its subgroups."""
    found: set[str] = set()
    for child in subtasks.get(group, []):
        found |= {child} if child in tasks else _leaves(child, subtasks, tasks)
    return found


def _or_na(value: float | None) -> float | str:
    return "N/A" if value is None else value
