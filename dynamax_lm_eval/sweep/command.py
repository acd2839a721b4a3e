"""``dynamax-lm-eval sweep``: answers all tasks under all points of a grid, one standard result file per point."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import lm_eval
import torch
import yaml
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

import dynamax_lm_eval
from dynamax_lm_eval.config import ClassifierKind, UserError, changed_settings
from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.harness import one_of_many_evaluations
from dynamax_lm_eval.lm import Setting
from dynamax_lm_eval.sweep.files import POINT_NAME, RESPONSES_NAME, SWEEP_NAME
from dynamax_lm_eval.sweep.model import SweepLM, SweepPoint
from dynamax_lm_eval.sweep.options import Point, SweepOptions, confidences_of, grid
from dynamax_lm_eval.sweep.store import ResponseStore

logger = logging.getLogger(__name__)

#: Options that change nothing in the results.
_FREE = frozenset(
    [
        "output",
        "batch_size",
        "device",
        "tasks",
        "limit",
        "samples",
        "thresholds",
        "confidences",
        "state_modes",
        "prune",
        "prune_profile",
        "include_path",
    ]
)


def sweep(options: SweepOptions, lm: SweepLM | None = None) -> Path:
    """Runs a sweep, or what is missing of it; returns its folder.

    Args:
        options: of the sweep.
        lm: the model, where it was loaded before (by :func:`load`, for the same backbone and model arguments).

    Raises:
        UserError: an option cannot be honoured, or the folder holds another sweep.
    """
    folder = Path(options.output).expanduser()
    tasks = load_tasks(options)
    _check_folder(folder, options)
    lm = load(options) if lm is None else lm
    kinds: tuple[str, ...] = ()
    adapters = False
    if lm.exits is not None:
        kinds, adapters = lm.exits.config.classifiers, lm.exits.config.adapter != "none"
    every = grid(options, replace(lm.args, threshold=(1.0,)), kinds, adapters)
    rank, world_size = process()
    answered = _resolve(lm, every)[rank::world_size]
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = {**options.to_json(), "confidences": ",".join(confidences_of(options, kinds))}
        write_text(folder / SWEEP_NAME, yaml.safe_dump(resolved, sort_keys=False))
    points = [
        SweepPoint(point, setting, ResponseStore(folder / "points" / point.name / RESPONSES_NAME, identity))
        for point, setting, identity in answered
    ]
    waiting = [point for point in points if not _is_done(folder, point, options)]
    if done := len(points) - len(waiting):
        logger.info("%d of %d points are done already", done, len(points))
    lm.start(waiting)
    for number, point in enumerate(waiting, start=1):
        results = _evaluate(lm, point, options, tasks)
        _save(folder, point, options, results, lm.run_settings)
        line = _summary(results)
        logger.info("point %d of %d, %s: %s", number, len(waiting), point.point.name, line)
    for point in points:
        point.store.close()
    return folder


def load(options: SweepOptions) -> SweepLM:
    """The backbone with the exits that it has, whatever the full model needs."""
    given: dict[str, Any] = {"backbone": options.backbone, "threshold": 1.0, **options.shared_arguments}
    given |= {
        "batch_size": options.batch_size,
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    if options.confidences is None or set(confidences_of(options, ())).intersection(get_args(ClassifierKind)):
        # Exits are looked up where something may exit; the grid decides what does.
        given = {**given, "threshold": 0.5}
    return SweepLM(**given)


def load_tasks(options: SweepOptions) -> TaskManager:
    """The harness's tasks and our own; refuses unknown names before weights load."""
    manager = _task_manager(options.include_path, json.dumps(options.metadata_given, sort_keys=True))
    unknown = [name for name in options.task_names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks: there is no task {', '.join(unknown)}; see `lm_eval ls tasks`, or add --include_path"
        )
    return manager


@functools.cache
def _task_manager(include_path: str | None, metadata: str) -> TaskManager:
    """Made once: it reads the files of all the harness's tasks."""
    paths = [str(dynamax_lm_eval.tasks_dir()), *([include_path] if include_path else [])]
    return TaskManager(include_path=paths, metadata=json.loads(metadata))


def _check_folder(folder: Path, options: SweepOptions) -> None:
    """Refuses to mix two sweeps; a grid may grow."""
    path = folder / SWEEP_NAME
    if not path.is_file():
        return
    stored, now = yaml.safe_load(path.read_text(encoding="utf-8")), options.to_json()
    for name in _FREE:
        stored.pop(name, None)
        now.pop(name, None)
    if changed := changed_settings(stored, now):
        raise UserError(f"{folder} holds a sweep that differs in {changed}; choose another --output")


def _resolve(lm: SweepLM, points: Sequence[Point]) -> list[tuple[Point, Setting, dict[str, Any]]]:
    """Each point with what it means for requests and the identity of its answers.

    Raises:
        UserError: the backbone cannot run one of them; before any is answered.
    """
    resolved = []
    for point in points:
        try:
            lm.follow(point.args)
        except UserError as error:
            raise UserError(f"point {point.name}: {error}") from error
        resolved.append((point, lm.setting, lm.identity()))
    return resolved


def process() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun and accelerate tell."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _is_done(folder: Path, point: SweepPoint, options: SweepOptions) -> bool:
    path = folder / "points" / point.point.name / POINT_NAME
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["asked"] == _asked(options)


def _asked(options: SweepOptions) -> dict[str, Any]:
    """What a finished point must have been asked to be finished."""
    asked = {"tasks": options.task_names, "limit": options.limit}
    samples = options.samples_given
    return asked if samples is None else {**asked, "samples": samples}


@contextmanager
def _as_only_process() -> Iterator[None]:
    """The harness gives results to the process whose LOCAL_RANK is 0; here each has results of its own."""
    before = os.environ.get("LOCAL_RANK")
    if before is not None:
        os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _evaluate(lm: SweepLM, point: SweepPoint, options: SweepOptions, tasks: TaskManager) -> dict[str, Any]:
    lm.replay(point)
    with _as_only_process(), one_of_many_evaluations():
        results = lm_eval.simple_evaluate(
            lm,
            tasks=options.task_names,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            samples=options.samples_given,
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
    found = dict(results)
    # What ran, and how long it took, belongs to all points that were answered together.
    for name in ("physical", "seconds", "seconds_total", "fed_tokens_in_seconds", "fed_tokens_per_second"):
        found["compute"]["overall"].pop(name, None)
    found["config"]["dynamax"]["sweep"] = {"point": point.point.name, "family": point.point.family}
    return found


def _save(folder: Path, point: SweepPoint, options: SweepOptions, results: dict[str, Any], run: dict[str, Any]) -> None:
    """The harness's own files, then the line that says that they are whole.

    ``run``: settings of the tasks, as certificates bind them.
    """
    home = folder / "points" / point.point.name
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(home))
    tracker.general_config_tracker.log_experiment_args(
        model_source="dynamax",
        model_args=f"pretrained={options.backbone}",
        system_instruction=options.system_instruction,
        chat_template=None,
        fewshot_as_multiturn=options.apply_chat_template,
    )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, lines in samples.items():
        tracker.save_results_samples(task_name=task, samples=lines)
    place = home / str(tracker.general_config_tracker.model_name_sanitized)
    files = {task: str((place / f"samples_{task}_{tracker.date_id}.jsonl").relative_to(home)) for task in samples}
    summary = str((place / f"results_{tracker.date_id}.json").relative_to(home))
    for file in (summary, *files.values()):
        if not (home / file).is_file():
            raise OSError(f"the harness did not write {home / file}; is the disk full?")
    done = {
        "point": point.point.name,
        "family": point.point.family,
        "line": point.point.line,
        "value": point.point.value,
        "policy": point.setting.policy.describe(),
        "asked": _asked(options),
        "run": run,
        "results": summary,
        "samples": files,
        "finished": time.time(),
    }
    write_text(home / POINT_NAME, json.dumps(done, indent=2) + "\n")


def _summary(results: dict[str, Any]) -> str:
    """The first metric of every task, and its compute reduction."""
    parts = []
    for task, metrics in results["results"].items():
        keys = [key for key, value in metrics.items() if "," in key and isinstance(value, float)]
        reduction = next((metrics[key] for key in keys if key.startswith("compute_reduction,")), None)
        first = f"{keys[0].partition(',')[0]} {metrics[keys[0]]:.3f}" if keys else "no metric"
        parts.append(f"{task} {first}" + ("" if reduction is None else f", compute_reduction {reduction:.3f}"))
    return "; ".join(parts)
