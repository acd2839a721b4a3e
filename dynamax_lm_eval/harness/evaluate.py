"""What happens around lm-evaluation-harness's ``evaluate``: it is wrapped, so that results carry compute.

Responses cannot carry compute (filters and scorers expect plain values), so the model keeps a
:class:`ResponseLedger` on the side. The public ``lm_eval.evaluator.evaluate`` is wrapped once; afterwards the
records are matched to the tasks' instances and gathered over ranks, for :mod:`~dynamax_lm_eval.harness.results`.

Knows the harness's functions, tasks and instances; knows nothing of models and of the layout of results.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import CellType, FrameType
from typing import Any

import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.api.model import CachingLM
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.utils import handle_non_serializable, hash_string
from torch.utils import collect_env

from dynamax_lm_eval import progress
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.cache import check_database
from dynamax_lm_eval.harness.describe import thesis_formula
from dynamax_lm_eval.harness.energy import EnergyMeter
from dynamax_lm_eval.harness.ledger import ResponseLedger, request_keys
from dynamax_lm_eval.harness.results import RankReport, RecordsByDocument, add_compute
from dynamax_lm_eval.harness.roofline import bytes_per_weight

logger = logging.getLogger(__name__)


def install() -> None:
    """Wraps ``lm_eval.evaluator.evaluate``, once, so that results of our model carry compute.

    The harness decorates its function. What the decorator calls is replaced, so that names which were bound to
    ``evaluate`` before (``from lm_eval import evaluate``) lead here as well.
    """
    _share_log()
    _check_caches()
    _ask_git_quietly()
    _name_devices()
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
    """Returns the cell in which the innermost decorator of a function keeps what it calls."""
    innermost = None
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        for cell in function.__closure__ or ():
            if cell.cell_contents is inner or getattr(cell.cell_contents, "_dynamax_wrapped", False):
                innermost = cell
        function = inner
    return innermost


def check_followed(ledger: ResponseLedger, needed_by: str | None, by_hand: bool) -> None:
    """Notices that the harness evaluates a model without having passed through :func:`install`'s wrapper.

    Args:
        ledger: of the model.
        needed_by: what of the model's arguments cannot do without; None: nothing.
        by_hand: it can where no harness evaluates, and requests are made by hand.

    Raises:
        UserError: there is such an argument; otherwise a warning is logged, where the harness evaluates.
    """
    if ledger.is_followed:
        return
    theirs = inspect.unwrap(lm_eval.evaluator.evaluate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not theirs:
        frame = frame.f_back
    if frame is None and needed_by is not None and not by_hand:
        raise UserError(
            f"{needed_by} cannot be checked where the model is called directly; call lm_eval.simple_evaluate"
        )
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


def _ask_git_quietly() -> None:
    """Keeps git's complaint off the terminal where the harness asks for a commit and there is no repository."""
    original = getattr(lm_eval.evaluator, "get_git_commit_hash", None)
    if original is None or getattr(original, "_dynamax_wrapped", False):
        return

    @functools.wraps(original)
    def commit() -> Any:
        try:
            asked = subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, check=False)
        except OSError:
            return original()
        return original() if asked.returncode == 0 else get_commit_from_path(Path.cwd())

    commit._dynamax_wrapped = True  # type: ignore[attr-defined]
    lm_eval.evaluator.get_git_commit_hash = commit


def _name_devices() -> None:
    """Lets ``config.device`` of results say where our model ran.

    The harness writes what its ``--device`` says, by default the first GPU, even where there is none. It does so after
    it has asked the model, so that the place for it is what the harness calls next with results and model.
    """
    original = getattr(lm_eval.evaluator, "add_tokenizer_info", None)
    if original is None or getattr(original, "_dynamax_wrapped", False):
        return

    @functools.wraps(original)
    def add(results: Any, lm: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(lm, "response_ledger", None), ResponseLedger):
            results["config"]["device"] = str(lm.device)
        return original(results, lm, *args, **kwargs)

    add._dynamax_wrapped = True  # type: ignore[attr-defined]
    lm_eval.evaluator.add_tokenizer_info = add


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
    and it logs the same messages: here errors only. So does it with what it prints about standard errors, in bars of
    their own.
    """
    collect, log = collect_env.get_pretty_env_info, logging.getLogger("lm_eval")
    level, bootstrap = log.level, lm_eval.api.metrics.bootstrap_stderr
    lm_eval.api.metrics.bootstrap_stderr = functools.partial(_silently, bootstrap)
    collect_env.get_pretty_env_info = functools.partial(_collected, collect)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = collect
        log.setLevel(level)
        lm_eval.api.metrics.bootstrap_stderr = bootstrap


def _silently(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns what a function does, without what it shows; log lines go where their handlers send them."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return function(*args, **options)


@contextmanager
def _showing_prompts_as_ours() -> Iterator[None]:
    """Shows how many prompts the harness has made as all other progress: its own bars stay, one for each task."""

    def shown(documents: Collection[Any], **_: Any) -> Iterator[Any]:
        return progress.over(documents, "Building prompts", unit="documents", leave=False)

    theirs = getattr(lm_eval.api.task, "tqdm", None)
    if theirs is None:
        yield
        return
    lm_eval.api.task.tqdm = shown
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = theirs


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
        lm.responder.energy.joules = 0.0
        ledger.is_followed = True
        try:
            with _showing_prompts_as_ours():
                results = original(*args, **kwargs)
        except Exception as error:
            # Tells errors of a running evaluation from errors in what the user asked for.
            error.raised_while_evaluating = True  # type: ignore[attr-defined]
            raise
        finally:
            ledger.is_followed = False
        gathered = gather(
            lm,
            RankReport(
                records=_records_by_document(task_dict, ledger, given.get("samples")),
                seconds=dict(ledger.seconds),
                fed_tokens=ledger.fed_tokens,
                executed=ledger.executed,
                latencies=dict(ledger.latencies),
                energy=_energy(lm, ledger),
                peak_memory=_peak_memory(lm.engine.backbone.device),
                batching=(lm.batch_size, lm.args.rows_in_flight),
                bytes_per_weight=bytes_per_weight(lm.engine.backbone.model),
                roofline=lm.args.roofline,
                speed=ledger.speed,
            ),
        )
        if results is not None and gathered is not None:
            add_compute(results, gathered, thesis_formula(lm))
        return results

    return evaluate


def _energy(lm: Any, ledger: ResponseLedger) -> dict[str, Any]:
    if ledger.speed.pairs:
        meter = EnergyMeter(None, "the full model ran as well, to measure the speed")
        return meter.to_json(0)
    energy: dict[str, Any] = lm.responder.energy.to_json(0)
    return energy


def gather(lm: Any, item: Any) -> list[Any] | None:
    """Returns the ``item`` of every process to the first one, and None to the others.

    The harness's ``LM.gather_object`` does the same in 0.4.13; 0.5.0.dev1 has none.
    """
    if lm.world_size <= 1:
        return [item]
    items: list[Any] | None = [None] * lm.world_size if lm.rank == 0 else None
    torch.distributed.gather_object(item, items, dst=0)
    return items


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _announce(lm: Any, tasks: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Tells the model what will be asked, so that it can refuse before anything runs."""
    limit, samples = options.get("limit"), options.get("samples") or {}
    if not isinstance(samples, Mapping):  # what the harness makes of a path that does not exist
        raise UserError(f'--samples must be a file, or JSON like {{"task": [0, 7]}}, got {samples!r}')

    for name, task in tasks.items():
        check_samples(task, samples.get(name) or ())

    def documents(name: str) -> list[str]:
        return document_hashes(tasks[name], limit, samples.get(name))

    names = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn")
    settings = {name: options.get(name) for name in names}
    lm.begin_run(tasks, documents, settings)


def document_hashes(task: Any, limit: float | None = None, samples: list[int] | None = None) -> list[str]:
    """Returns the harness's ``doc_hash`` of each document of a task that an evaluation with these options takes."""
    check_samples(task, samples or ())
    # As the harness counts: a share of the documents below 1, else a number of them.
    number = None if limit is None else math.ceil(len(task.eval_docs) * limit) if limit < 1 else int(limit)
    evaluated = task.doc_iterator(limit=number, samples=samples)
    return [document_hash(document) for _, document in evaluated]


def check_samples(task: Any, samples: Sequence[int]) -> None:
    """Raises UserError where ``--samples`` names a document that a task does not have."""
    count = len(task.eval_docs)
    for index in samples:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise UserError(f"--samples: task {task.config.task} has no document {index!r}; it has 0 to {count - 1}")


def document_hash(document: Any) -> str:
    """Returns the harness's ``doc_hash`` of a document."""
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def _records_by_document(
    task_dict: Mapping[Any, Any], ledger: ResponseLedger, samples: Mapping[str, list[int]] | None
) -> RecordsByDocument:
    """Returns the records of this rank's documents, without clones that only pad ranks to equal length."""
    tasks = list(_tasks(task_dict))
    responses = [
        (name, instance) for name, task in tasks for instance in task.instances for _ in range(instance.repeats or 1)
    ]
    keys = request_keys((instance.request_type, instance.args) for _, instance in responses)
    by_task: RecordsByDocument = {name: {} for name, _ in tasks}
    for (name, instance), key in zip(responses, keys, strict=True):
        indices = (samples or {}).get(name)
        document = indices[instance.doc_id] if indices else instance.doc_id
        by_task[name].setdefault(document, []).append(ledger.find(key))
    return by_task


def _tasks(task_dict: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    """Yields all (name, task), from the harness's present layout or the nested one of earlier releases."""
    if "tasks" in task_dict:
        yield from task_dict["tasks"].items()
        return
    for key, value in task_dict.items():
        if isinstance(value, Mapping):
            yield from _tasks(value)
        else:
            yield key, value
