"""``dynamax-lm-eval calibrate``: a threshold with a guarantee, and the file that says so.

Knows the order of work: sweep over candidates, losses, test, certificate. Knows nothing of models.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

import dynamax_lm_eval
from dynamax_lm_eval.calibration.losses import LossKind, loss_matrix
from dynamax_lm_eval.calibration.options import CalibrateOptions
from dynamax_lm_eval.calibration.testing import (
    Floats,
    Selection,
    conformal_risk_control,
    fewest_documents,
    learn_then_test,
)
from dynamax_lm_eval.compute.accounting import ratio_stderr
from dynamax_lm_eval.errors import UserError, unknown_name
from dynamax_lm_eval.files import check_writable, naming, write_text
from dynamax_lm_eval.harness.certificate import Certificate, binding, directory, file_name
from dynamax_lm_eval.harness.documents import naming_tasks
from dynamax_lm_eval.harness.evaluate import document_hashes
from dynamax_lm_eval.locks import locked
from dynamax_lm_eval.sweep.command import load, load_tasks, process, sweep
from dynamax_lm_eval.sweep.files import finished_points
from dynamax_lm_eval.sweep.model import SweepLM
from dynamax_lm_eval.sweep.options import SweepOptions, name_of, names_of, parse_thresholds
from dynamax_lm_eval.sweep.results import PointResult, TaskResults, read

if TYPE_CHECKING:
    from dynamax_lm_eval.measure.threshold_search import ThresholdPath

logger = logging.getLogger(__name__)

CERTIFICATE_NAME = "certificate.json"
TABLE_NAME = "candidates.md"
#: For --samples of a run: the documents that the threshold was not chosen on.
TEST_SAMPLES_NAME = "test_samples.json"


@dataclass(frozen=True)
class Split:
    """The documents of a task by what they are used for, as indices in the task's order.

    Attributes:
        calibration: documents that choose.
        test: documents that test.
        first: the first of each different calibration document, as places in ``calibration``. A document that comes
            twice is one draw.
        population: how many different documents both were drawn from.
    """

    calibration: list[int]
    test: list[int]
    first: list[int]
    population: int


def calibrate(options: CalibrateOptions) -> tuple[Certificate, Path]:
    """Tests the candidates and writes the certificate; returns it and its file beside the exits.

    Raises:
        UserError: an option cannot be honoured, or the task has no such loss.
    """
    if process()[1] > 1:
        raise UserError("calibrate is one process; run it without torchrun")
    options, candidates, path = _candidates(options)
    manager = load_tasks(options.sweep("calibration", ",".join(name_of(thresholds) for thresholds in candidates)))
    hashes = _document_hashes(manager, options)
    split_documents(hashes, options.share, options.seed, options.limit)  # refuses before the model loads
    with locked(Path(options.output).expanduser()):
        return _calibrate(options, candidates, hashes, path)


def command(options: CalibrateOptions) -> str:
    """Calibrates; returns the summary, for the terminal."""
    certificate, path = calibrate(options)
    return summary(certificate, path, options)


def _calibrate(
    options: CalibrateOptions,
    candidates: Sequence[tuple[float, ...]],
    hashes: Sequence[str],
    searched: ThresholdPath | None,
) -> tuple[Certificate, Path]:
    folder = Path(options.output).expanduser()
    text = ",".join(name_of(candidate) for candidate in candidates)
    lm = load(options.sweep("calibration", text))
    if searched is not None and searched.exits not in (None, lm.exits_fingerprint):
        raise UserError(
            f"--per_exit {options.per_exit} was searched for other exits; search thresholds for these: "
            "dynamax-lm-eval exit-thresholds"
        )
    split = split_documents(hashes, options.share, options.seed, options.limit, _trained_on(lm, hashes))
    _warn_of_few(options, len(split.first))
    beside_exits = directory(options.backbone, lm.backbone_fingerprint(), lm.exits)
    check_writable(beside_exits, "the folder of the certificate,", "set DYNAMAX_CACHE to a folder that can be")
    if options.confidence is None:
        options = replace(options, confidence=lm.exits.config.classifiers[0] if lm.exits is not None else "softmax")
    first = options.sweep("calibration", text, _samples(options, split.calibration))
    task, points = _answered(first, lm, candidates)
    run = finished_points(folder / "calibration")[0]["run"][options.tasks]
    model = _binding(lm, points)
    kind = LossKind.find(options.loss, options.metric if options.loss == "metric" else options.likeness, task)
    losses = loss_matrix(kind, task, points)[:, split.first]
    reductions = [_reduction(point) for point in points]
    if options.method == "ltt":
        selection = learn_then_test(
            losses,
            options.tolerance,
            options.level,
            options.p_values,
            seed=options.seed,
            population=split.population,
        )
    else:
        selection = conformal_risk_control(losses, options.tolerance)
    best = selection.best(reductions)
    thresholds = list(candidates[best]) if best is not None else [1.0]

    tested = None
    if options.test and best is not None:
        second = options.sweep("test", name_of(thresholds), _samples(options, split.test))
        tested = _tested(kind, *_answered(second, lm, [tuple(thresholds)]))
        if tested["compute_reduction"] <= 1:
            logger.warning(
                "On the held-out documents this threshold saves nothing (compute_reduction %.3f): threshold=1 costs no "
                "more",
                tested["compute_reduction"],
            )
    elif options.test:
        what = "None that passed saves compute" if selection.certified else "No candidate passed"
        logger.warning("%s: the certified threshold is 1, the full model, which loses nothing", what)

    certificate = Certificate(
        method=options.method,
        bound=options.bound if options.method == "ltt" else None,
        loss=kind.name,
        measured_by=kind.measured_by,
        tolerance=options.tolerance,
        level=options.level if options.method == "ltt" else None,
        thresholds=thresholds,
        candidates=[list(candidate) for candidate in candidates],
        certified=selection.certified,
        scores=list(selection.scores),
        losses=losses.mean(axis=1).tolist(),
        reductions=reductions,
        compute_reduction=reductions[best] if best is not None else 1.0,
        task=options.tasks,
        run=run,
        model=model,
        fingerprint=lm.backbone_fingerprint(),
        seed=options.seed,
        population=split.population,
        calibration_documents=sorted({hashes[i] for i in split.calibration}),
        test=tested,
        created=date.today().isoformat(),
        version=dynamax_lm_eval.__version__,
    )
    certificate.save(folder / CERTIFICATE_NAME)
    with naming(folder):
        write_text(folder / TEST_SAMPLES_NAME, json.dumps({options.tasks: split.test}) + "\n")
        write_text(folder / TABLE_NAME, table(candidates, losses, selection, reductions))
    path = beside_exits / file_name(certificate, *points[0].series.split(", ")[:2])
    certificate.save(path)
    return certificate, path


def summary(certificate: Certificate, path: Path, options: CalibrateOptions) -> str:
    """Returns for people what was certified, and how to use it where something may exit."""
    folder = Path(options.output).expanduser()
    lines = [(folder / TABLE_NAME).read_text(encoding="utf-8")]
    if certificate.certifies_exits:
        at, reduction = name_of(certificate.thresholds), certificate.compute_reduction
        lines.append(f"threshold {at}: {certificate.guarantee}; expected compute_reduction {reduction:.3f}\n")
    elif certificate.certified:
        most = max(certificate.reductions[: certificate.certified])
        lines.append(
            f"threshold 1: {certificate.certified} candidates passed and none saves compute (the largest expected "
            f"compute_reduction is {most:.3f}), so the full model is the better choice\n"
        )
    else:
        lines.append(f"threshold 1: no candidate passed at tolerance {certificate.tolerance:g}, so nothing may exit\n")
    if certificate.test is not None:
        tested = certificate.test
        lines.append(
            f"on {tested['documents']} other documents: mean loss {tested['mean_loss']:.4f} "
            f"(standard error {tested['mean_loss_stderr'] or 0:.4f}), compute_reduction "
            f"{tested['compute_reduction']:.3f}\n"
        )
    if not certificate.certifies_exits:
        return "\n".join(lines)
    policy = certificate.model
    given = [f"backbone={options.backbone}", f"threshold={path}"]
    names = ("confidence", "classifier", "propose", "state_mode")
    given += [f"{name}={policy.get(f'policy.{name}')}" for name in names]
    if options.confirm is not None:
        given.append(f"confirm={options.confirm}")
    arguments = ",".join([*(item for item in given if not item.endswith("=None")), *filter(None, [options.model_args])])
    lines.append(
        f"use it: dynamax-lm-eval run --model_args {arguments} --tasks {certificate.task} "
        f"--samples {folder / TEST_SAMPLES_NAME}\n"
    )
    return "\n".join(lines)


def _trained_on(lm: SweepLM, hashes: Sequence[str]) -> set[str]:
    """Returns the documents on whose answers the exits were trained: they say too much good of them."""
    if lm.exits is None:
        return set()
    seen = {digest for digest in set(hashes) if lm.exits.trained_on([digest])}
    if seen:
        logger.info("%d documents are left out: these exits were trained on answers to them", len(seen))
    return seen


def split_documents(
    hashes: Sequence[str], share: float, seed: int, limit: int | None = None, without: Collection[str] = ()
) -> Split:
    """Draws documents at random and splits them, equal ones to the same side.

    Args:
        hashes: of all documents of the task.
        share: of the drawn documents that choose.
        seed: of the draw.
        limit: how many different documents are drawn; None: all.
        without: documents that are not drawn.

    Raises:
        UserError: one side would be empty.
    """
    distinct = [digest for digest in dict.fromkeys(hashes) if digest not in without]
    order = np.random.default_rng(seed).permutation(len(distinct))[:limit]
    count = round(share * len(order))
    if not 0 < count < len(order):
        raise UserError(f"--share {share:g} of {len(order)} documents leaves none to calibrate or none to test")
    calibrating, testing = ({distinct[i] for i in part} for part in (order[:count], order[count:]))
    calibration = [i for i, digest in enumerate(hashes) if digest in calibrating]
    return Split(
        calibration,
        test=[i for i, digest in enumerate(hashes) if digest in testing],
        first=sorted(np.unique([hashes[i] for i in calibration], return_index=True)[1].tolist()),
        population=len(distinct),
    )


def table(
    candidates: Sequence[Sequence[float]], losses: Floats, selection: Selection, reductions: Sequence[float]
) -> str:
    """Returns all candidates with their losses, their scores and what became of them, as Markdown."""
    rows = []
    best = selection.best(reductions)
    for i, thresholds in enumerate(candidates):
        verdict = "passed" if i < selection.certified else "failed" if i < len(selection.scores) else "not tested"
        score = selection.scores[i] if i < len(selection.scores) else None
        verdict = "chosen" if i == best else verdict
        rows.append([name_of(thresholds), float(losses[i].mean()), score, reductions[i], verdict])
    headers = ["thresholds", "mean loss", "p-value or bound", "compute_reduction", "verdict"]
    text = tabulate(rows, headers, tablefmt="github", floatfmt=".4f", missingval="")
    return f"{text}\n"


def _candidates(
    options: CalibrateOptions,
) -> tuple[CalibrateOptions, list[tuple[float, ...]], ThresholdPath | None]:
    """Returns the options with what candidates ask for, these in the order of testing, and the file that they are of.

    The most conservative comes first.
    """
    if options.per_exit is not None:
        from dynamax_lm_eval.measure.threshold_search import ThresholdPath

        path = ThresholdPath.load(Path(options.per_exit).expanduser())
        return options.of_path(path), path.thresholds, path
    return options, parse_thresholds(options.thresholds)[::-1], None


def _document_hashes(manager: Any, options: CalibrateOptions) -> list[str]:
    """Returns the hashes of all documents of the task; UserError where there are several, or no such metric."""
    names = options.sweep("calibration", "0.5").task_names
    with naming_tasks():
        tasks = manager.load(names)["tasks"]
    if list(tasks) != [options.tasks]:
        raise UserError(f"--tasks must name one task, and {options.tasks!r} is {', '.join(tasks)}; calibrate each")
    _check_metric(tasks[options.tasks], options)
    return document_hashes(tasks[options.tasks])


def _check_metric(task: Any, options: CalibrateOptions) -> None:
    """Raises UserError where the task has no metric of the name that is asked for; answers would come first else."""
    known = list(task.aggregation())
    if options.metric is not None and known and options.metric.partition(",")[0] not in known:
        raise UserError(
            f"--metric: {unknown_name(f'metric of {options.tasks}', options.metric, known, 'it has', known)}"
        )


def _samples(options: CalibrateOptions, documents: list[int]) -> str:
    return json.dumps({options.tasks: documents})


def _warn_of_few(options: CalibrateOptions, count: int) -> None:
    """Warns where ``count`` documents are too few to certify anything."""
    level = options.level if options.method == "ltt" else None
    fewest = fewest_documents(options.tolerance, level, options.p_values)
    if count < fewest:
        logger.warning(
            "%d documents cannot certify tolerance %g, even if none of them lost anything: that takes %d. Raise "
            "--limit, --share, --tolerance or --level",
            count,
            options.tolerance,
            fewest,
        )


def _answered(
    options: SweepOptions, lm: SweepLM, candidates: Sequence[tuple[float, ...]]
) -> tuple[TaskResults, list[PointResult]]:
    """Runs a sweep; returns its results, and the points of the candidates in their order."""
    (task,) = read([sweep(options, lm)], max_degenerate=1.0)
    by_name = {point.name: point for point in task.points}
    # The folder may hold other lines as well, of confidences that were calibrated before.
    own = ",".join(names_of(options))
    line = next(series for point in task.points if (series := point.series).startswith(f"{own}, "))
    line = line.removesuffix(", per exit").replace(", ", "-")
    return task, [by_name[f"{line}-{name_of(thresholds)}"] for thresholds in candidates]


def _binding(lm: SweepLM, points: Sequence[PointResult]) -> dict[str, Any]:
    return binding({**lm.identity(), "policy": points[0].policy})


def _reduction(point: PointResult) -> float:
    return float(point.compute["compute_reduction"])


def _tested(kind: LossKind, task: TaskResults, points: Sequence[PointResult]) -> dict[str, Any]:
    """Returns what the certified thresholds did on documents that they were not chosen on."""
    (point,) = points
    losses = kind.of(task, point)
    n = len(losses)
    pairs = list(zip(task.full.macs("total").tolist(), point.macs("total").tolist(), strict=True))
    return {
        "documents": n,
        "mean_loss": float(losses.mean()),
        "mean_loss_stderr": float(losses.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "compute_reduction": _reduction(point),
        "compute_vs_full": task.vs_full(point),
        "compute_vs_full_stderr": ratio_stderr([pairs]),
    }
