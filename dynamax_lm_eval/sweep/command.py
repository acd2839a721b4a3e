"""``dynamax-lm-eval sweep``: answers all tasks under all points of a grid, one standard result file per point."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.errors import UserError, changed_settings
from dynamax_lm_eval.exits import pruning
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.files import file_checksum, short_name
from dynamax_lm_eval.harness import naming
from dynamax_lm_eval.harness.documents import naming_tasks
from dynamax_lm_eval.harness.evaluate import one_of_many_evaluations
from dynamax_lm_eval.harness.results import add_vs_full, document_totals
from dynamax_lm_eval.harness.tasks import not_found, task_manager
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.models.fingerprint import files_fingerprints
from dynamax_lm_eval.sweep import noise, timings
from dynamax_lm_eval.sweep.drawing import with_drawn_documents
from dynamax_lm_eval.sweep.files import (
    FULL_NAME,
    GRID,
    GRID_NAME,
    POINT,
    POINT_NAME,
    RESPONSES_NAME,
    SWEEP_NAME,
    check_results,
    full_totals,
    point_folder,
    read_options,
    write_options,
)
from dynamax_lm_eval.sweep.grid import Point, confidences_of, grid
from dynamax_lm_eval.sweep.model import SweepLM, SweepPoint
from dynamax_lm_eval.sweep.options import SweepOptions, uses_classifiers
from dynamax_lm_eval.sweep.plan import asked_of, documents_of, plan
from dynamax_lm_eval.sweep.store import ResponseStore

logger = logging.getLogger(__name__)

#: Options that change nothing in the results.
_FREE = frozenset(
    [
        "backbone",  # the identity of the answers binds its weights, wherever they lie
        "output",
        "batch_size",
        "noise_rows",
        "device",
        "tasks",
        "limit",
        "draw",
        "samples",
        "thresholds",
        "confidences",
        *("propose", "confirm"),
        "state_modes",
        *("prune", "prune_scope", "prune_profile", "prune_adapter", "static_exits"),
        *("verify_tokens", "verify_at"),
        "include_path",
    ]
)


def sweep(options: SweepOptions, lm: SweepLM | None = None) -> Path:
    """Runs a sweep, or what is missing of it; returns its folder.

    Args:
        options: of the sweep.
        lm: the model, where it was loaded before (by :func:`load`, for the same backbone and model arguments).

    Raises:
        UserError: an option cannot be honoured, the folder holds another sweep, or another process writes there.
    """
    folder = Path(options.output).expanduser()
    tasks = load_tasks(options)
    options = with_drawn_documents(options, tasks)
    # The processes of one launcher share the lock of the first.
    with locked(folder) if process()[0] == 0 else nullcontext():
        _sweep(options, lm, folder, tasks)
    return folder


def command(options: SweepOptions) -> str:
    """Runs a sweep; returns its folder, for the terminal."""
    return f"{sweep(options)}\n"


def _sweep(options: SweepOptions, lm: SweepLM | None, folder: Path, tasks: TaskManager) -> None:
    _check_folder(folder, options)
    lm = load(options) if lm is None else lm
    exits = None if lm.exits is None else lm.exits.config
    kinds = () if exits is None else exits.classifiers
    noise_rows = noise.rows_of(options, lm.mixed_precision_dtype or lm.model.dtype, lm.device)
    all_points = noise.with_noise(
        grid(options, replace(lm.loaded, threshold=(1.0,)), exits, lm.has_recurrence, lm.exits_named), noise_rows
    )
    rank, world_size = process()
    own_points = _resolve(lm, all_points, options)[rank::world_size]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = {**options.to_json(), "confidences": ",".join(confidences_of(options, kinds))}
        write_options(folder / SWEEP_NAME, resolved)
        GRID.write(folder / GRID_NAME, {"points": [point.name for point in all_points]})
    documents = documents_of(options, tasks)
    points = [
        SweepPoint(
            point,
            policy,
            ResponseStore(point_folder(folder, point.name) / RESPONSES_NAME, identity),
            # 0.5.0.dev1 loads GROUP::TASK; its requests, too, say TASK.
            frozenset(name.rpartition("::")[2] for task in point.tasks for name in documents[task]),
            noise_rows if point.kind == noise.NOISE else None,
        )
        for point, policy, identity in own_points
    ]
    asked = {point.point.name: asked_of(options, point.point, documents) for point in points}
    waiting = [point for point in points if not _is_done(folder, point, asked[point.point.name])]
    done = len(points) - len(waiting)
    logger.info(plan(lm, options, [point.point for point in points], done, documents))
    lm.start(waiting)
    for number, point in enumerate(waiting, start=done + 1):
        timing = timings.before(folder, point, asked[point.point.name]) if options.timed else timings.NONE
        if options.timed:
            lm.start([point], timed=True)
        results = _evaluate(lm, point, options, tasks)
        timings.put(results, timing)
        compared = _compare(results, point, folder)
        _save(folder, point, options, results, {"run": lm.run_settings, **compared}, asked[point.point.name])
        logger.info("point %d of %d, %s: %s", number, len(points), point.point.name, _summary(results))
    for point in points:
        point.store.close()


def load(options: SweepOptions) -> SweepLM:
    """Loads the backbone with the exits that it has, whatever the full model needs."""
    if options.prune_profile is not None or options.prune_adapter is not None:
        # Where the files are not known, points are compared with the loaded weights.
        fingerprints = files_fingerprints(aliases.resolve_backbone(options.backbone), options.shared_arguments)
        pruning.check_files(options.prune_profile, options.prune_adapter, fingerprints)
    arguments: dict[str, Any] = {"backbone": options.backbone, "threshold": 1.0, **options.shared_arguments}
    arguments |= {
        "batch_size": options.batch_size,
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    uses = uses_classifiers(confidences_of(options, ())) or bool(options.static_exits)
    if options.confidences is None or uses:
        # Exits are looked up where something may exit; the grid decides what does.
        arguments = {**arguments, "threshold": 0.5}
    lm = SweepLM(**arguments)
    noise.warn_of_half_precision(lm.mixed_precision_dtype or lm.model.dtype, lm.device)
    return lm


def load_tasks(options: SweepOptions) -> TaskManager:
    """Returns the harness's tasks and our own; refuses unknown names before weights load."""
    metadata = json.dumps(options.metadata_given, sort_keys=True)
    manager = task_manager(options.include_path, metadata, tuple(options.task_names))
    unknown = [name for name in options.task_names if name not in manager.all_tasks]
    if unknown:
        folders = [options.include_path] if options.include_path else []
        raise UserError(f"--tasks: {not_found(unknown, manager.all_tasks, folders)}")
    return manager


def _check_folder(folder: Path, options: SweepOptions) -> None:
    """Refuses to mix two sweeps, or a sweep with other files; a grid may grow."""
    stored = read_options(folder / SWEEP_NAME)
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if names and not {SWEEP_NAME, "points"}.intersection(names):
        raise UserError(
            f"--output {folder} is no folder of a sweep, and holds other files ({', '.join(names[:3])}, ...); "
            "choose another one"
        )
    if stored is not None and (changed := changed_settings(_bound(stored), _bound(options.to_json()))):
        raise UserError(f"{folder} holds a sweep that differs in {changed}; choose another --output")


def _bound(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that decide answers."""
    bound = {name: value for name, value in options.items() if name not in _FREE}
    if not bound.get("timed"):  # what was answered before there was this option is still the same
        bound.pop("timed", None)
    return bound


def _resolve(
    lm: SweepLM, points: Sequence[Point], options: SweepOptions
) -> list[tuple[Point, ExitPolicy, dict[str, Any]]]:
    """Returns each point with its policy and the identity of its answers, options of the sweep included.

    Raises:
        UserError: the backbone cannot run one of them; before any is answered.
    """
    resolved = []
    for point in points:
        try:
            lm.use_policy(point.args)
        except UserError as error:
            exits = lm.exits if "exits=FOLDER" in str(error) else None
            at_hand = "" if exits is None else f"; here: --model_args exits={exits.path}"
            raise UserError(f"point {point.name}: {error}{at_hand}") from error
        resolved.append((point, lm.policy, {**lm.identity(), **_bound(options.to_json())}))
    return resolved


def process() -> tuple[int, int]:
    """Returns this process's number and how many there are, as torchrun and accelerate tell."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _is_done(folder: Path, point: SweepPoint, asked: dict[str, Any]) -> bool:
    """Says whether a point is finished and nothing of it is damaged; what is damaged is made anew, with a warning."""
    path = point_folder(folder, point.point.name) / POINT_NAME
    if not path.is_file():
        return False
    try:
        done = POINT.read(path)
        if done["asked"] != asked:
            return False
        check_results(path.parent, done["checksums"])
        if not done.get("vs_full") and (point_folder(folder, FULL_NAME) / POINT_NAME).is_file():
            return False  # the full model was not finished before it, or an earlier release did not compare
    except UserError as error:
        logger.warning("Point %s is run again: %s", point.point.name, str(error).removesuffix(f"; {POINT.remedy}"))
        return False
    if (missing := done["answers"] - len(point.store)) > 0 and not point.store.damaged:
        logger.warning("Point %s is run again: %d of its answers are missing", point.point.name, missing)
    return missing <= 0 and not point.store.damaged


@contextmanager
def _as_only_process() -> Iterator[None]:
    """Makes the harness give this process its results, as it does where LOCAL_RANK is 0: here each has its own."""
    before = os.environ.get("LOCAL_RANK")
    if before is not None:
        os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _evaluate(lm: SweepLM, point: SweepPoint, options: SweepOptions, tasks: TaskManager) -> dict[str, Any]:
    """Returns the harness's results of a point, from the answers that are stored or asked for now."""
    lm.replay(point)
    samples = options.samples_given
    with _as_only_process(), naming_tasks(), one_of_many_evaluations():
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(point.point.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            samples=samples and {name: samples[name] for name in point.point.tasks},
            task_manager=tasks,
            log_samples=True,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            metadata=options.metadata_given or None,
        )
    assert results is not None, "every process evaluates its points alone"
    results = dict(results)
    rows = options.batch_size if point.rows is None else point.rows
    results["config"] |= {"model": "dynamax", "batch_size": rows, "device": str(lm.device)}
    ours = results["config"]["dynamax"]
    ours |= {"batch_size": rows, "sweep": {"point": point.point.name, "family": point.point.kind}}
    if point.rows is not None:  # a label is of one operating point, and this is the full model's again
        ours["label"] = point.point.name
        results["config"]["model_name"] = f"{ours['backbone_name']}@{ours['label']}"
    return results


def _compare(results: dict[str, Any], point: SweepPoint, folder: Path) -> dict[str, bool]:
    """Puts compute against the full model's run into the results of a point; says whether that was known.

    Another process may be answering the full model still; a sweep that is started again makes up for it.
    """
    if point.point.name == FULL_NAME:
        full = {name: document_totals(samples) for name, samples in results["samples"].items()}
    else:
        try:
            full = full_totals(folder) or {}
        except UserError as error:  # another process makes it anew
            logger.warning("Point %s is not compared with the full model yet: %s", point.point.name, error)
            full = {}
    add_vs_full(results, full)
    return {"vs_full": bool(full)}


def _save(
    folder: Path,
    point: SweepPoint,
    options: SweepOptions,
    results: dict[str, Any],
    known: dict[str, Any],
    asked: dict[str, Any],
) -> None:
    """Writes the harness's own files, then ``point.json``, which says that they are whole.

    ``known``: settings of the tasks, as certificates bind them, and whether the full model's run was known; ``asked``:
    as :func:`~dynamax_lm_eval.sweep.plan.asked_of` returns it.
    """
    directory = point_folder(folder, point.point.name)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(directory))
    name = results["config"]["model_name"]
    tracker.general_config_tracker.log_experiment_args(
        model_source="dynamax",
        model_args=f"pretrained={name}",
        system_instruction=options.system_instruction,
        chat_template=None,
        fewshot_as_multiturn=options.apply_chat_template,
    )
    naming.name_tracker(tracker, name if len(name) < 100 else short_name(name))
    # The harness would write how long saving took.
    tracker.general_config_tracker.log_end_time = lambda: None
    with one_of_many_evaluations():
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, task_samples in samples.items():
            tracker.save_results_samples(task_name=short_name(task), samples=task_samples)
    place = directory / str(tracker.general_config_tracker.model_name_sanitized)
    files = {
        task: str((place / f"samples_{short_name(task)}_{tracker.date_id}.jsonl").relative_to(directory))
        for task in samples
    }
    summary = str((place / f"results_{tracker.date_id}.json").relative_to(directory))
    for file in (summary, *files.values()):
        if not (directory / file).is_file():
            raise OSError(f"the harness did not write {directory / file}; is the disk full?")
    done = {
        "point": point.point.name,
        "family": point.point.kind,
        "line": point.point.series,
        "value": point.point.x,
        "policy": point.policy.describe(),
        "asked": asked,
        **known,
        "results": summary,
        "samples": files,
        "checksums": {name: file_checksum(directory / name) for name in (summary, *files.values())},
        "answers": len(point.store),
        "finished": time.time(),
    }
    POINT.write(directory / POINT_NAME, done)


def _summary(results: dict[str, Any]) -> str:
    """Returns the first metric of each task, and its compute reduction."""
    parts = []
    for task, metrics in results["results"].items():
        keys = [key for key, value in metrics.items() if "," in key and isinstance(value, float)]
        reduction = next((metrics[key] for key in keys if key.startswith("compute_reduction,")), None)
        first = f"{keys[0].partition(',')[0]} {metrics[keys[0]]:.3f}" if keys else "no metric"
        parts.append(f"{task} {first}" + ("" if reduction is None else f", compute_reduction {reduction:.3f}"))
    return "; ".join(parts)
