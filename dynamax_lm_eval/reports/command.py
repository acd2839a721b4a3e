"""``dynamax-lm-eval report``: everything that is shown of sweeps, from the folders that they wrote."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.files import check_writable, naming, write_text
from dynamax_lm_eval.reports import drafts, noise, page, plots, statistics
from dynamax_lm_eval.reports.names import SIMILARITY, first_metric, flat_line, is_flat, metric_name, opening_metric
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.reports.tables import (
    TaskNumbers,
    against_full_shown,
    intervals,
    markdown,
    settled,
    with_intervals,
    with_numbers,
)
from dynamax_lm_eval.sweep.files import missing_points
from dynamax_lm_eval.sweep.results import TaskResults, read, tidy

logger = logging.getLogger(__name__)

_COLUMNS = (
    "line",
    "value",
    "score",
    "score_stderr",
    "compute_reduction",
    "compute_vs_full",
    "median_vs_full",
    "mean_exit_layer",
    "generated_tokens",
    "degenerate_rate",
    "consistency_exact",
    "consistency_rouge_l",
    "within_noise",
    "valid",
)


def report(options: ReportOptions) -> Path:
    """Writes tables, plots and the page; returns their folder.

    Raises:
        UserError: there is nothing to report, or a package is missing.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UserError("reports need plotly; run: pip install 'dynamax-lm-eval[report]'")
    folders = [Path(folder).expanduser() for folder in options.folders]
    limits = _token_limits(options.max_token_limit)
    results = read(folders, options.max_degenerate, lambda task: limits.get(task, limits.get("", 1.0)))
    if unknown := sorted(set(limits) - {""} - {task.task for task in results}):
        raise UserError(f"--max_token_limit: there is no task {', '.join(unknown)} in these folders")
    metrics = _shown_metrics(options, results)
    output = Path(options.output).expanduser() if options.output else folders[0] / "report"
    check_writable(output, "--output: the folder", "choose another")
    missing = [name for folder in folders for name in missing_points(folder)]
    with naming(output):
        _write(output, results, metrics, options, missing)
    return output


def command(options: ReportOptions) -> str:
    """Writes a report; returns its folder, for the terminal."""
    return f"{report(options)}\n"


def _write(
    output: Path,
    results: Sequence[TaskResults],
    metrics: dict[str, str],
    options: ReportOptions,
    missing: Sequence[str],
) -> None:
    numbers = {(task.backbone, task.task): TaskNumbers.of(task, options.draws, options.seed) for task in results}
    table = drafts.columns(results, noise.column(results, with_numbers(tidy(results), numbers)))
    write_text(output / "points.csv", table.to_csv(index=False))
    table.to_parquet(output / "points.parquet", index=False)
    parts = ["# Early exits: score vs. compute\n"]
    figures: dict[tuple[str, str], dict[str, list[str]]] = {}
    if missing:
        parts.append(f"**Not finished yet, and left out ({len(missing)}):** {', '.join(missing)}\n")
    for whole in results:
        task = drafts.others(whole)
        parts.append(f"## {task.title}\n")
        for metric in dict.fromkeys((metrics[task.task], SIMILARITY)):
            if metric in task.metrics:
                files = plots.plot(
                    task, metric, output / plots.file_stem(task, metric), numbers[task.backbone, task.task].points
                )
                figures.setdefault((task.backbone, task.task), {})[metric] = [file.name for file in files]
                logger.info("%s: %s", task.title, files[0])
                parts += _figure(task, metric, files[0].name, options)
        compared = opening_metric(task, metrics[task.task])
        if not is_flat(task, compared):
            parts += against_full_shown(task, compared, numbers[task.backbone, task.task])
        parts += noise.section(task, metrics[task.task])
        if len(verified := drafts.table(whole, options.draws, options.seed)):
            parts += [
                "### Exits as drafts\n",
                "Texts are the full model's; what is gained is weights that are read once for several tokens "
                "(`weights_reduction`, with 95 % intervals): with few rows the clock gains no more than that.\n",
                markdown(verified),
            ]
        if rounded := [point.name for point in task.points if point.only_rounding]:
            parts.append(
                f"No token left early under {', '.join(rounded)}, and still some answers are not the full model's: "
                "that is rounding, which depends on what else is in a batch, and how far other points can be told from "
                "the full model. `dtype=float32` makes it small.\n"
            )
        parts += ["### All points\n", markdown(_points(task, metrics[task.task], table))]
    write_text(output / "report.md", "\n".join(parts))
    write_text(
        output / "report.html",
        page.render(results, _opening(results, metrics, options), options, missing, numbers, figures),
    )


def _token_limits(text: str | None) -> dict[str, float]:
    """Returns the shares of ``--max_token_limit`` by task; one for all of them by the empty name."""
    try:
        pairs = (pair.rpartition("=") for pair in filter(None, (text or "").split(",")))
        return {name.strip(): float(share) for name, _, share in pairs}
    except ValueError:
        raise UserError(
            f"--max_token_limit must be a number, or task=number pairs separated by commas, got {text!r}"
        ) from None


def _asked_for(options: ReportOptions) -> dict[str, str]:
    """Returns the metrics (without their filters) of ``--metrics`` by task."""
    named_metrics = {}
    for pair in filter(None, (options.metrics or "").split(",")):
        task_name, equals, metric = pair.partition("=")
        if not equals:
            raise UserError(f"--metrics must be task=metric pairs separated by commas, got {pair!r}")
        named_metrics[task_name.strip()] = metric.strip()
    return named_metrics


def _shown_metrics(options: ReportOptions, results: Sequence[TaskResults]) -> dict[str, str]:
    """Returns the metric (with its filter) that each task is shown by."""
    named_metrics = _asked_for(options)
    shown = {}
    for task in results:
        if not task.metrics:
            raise UserError(f"{task.title} has no metric to show")
        name = named_metrics.pop(task.task, first_metric(task).partition(",")[0])
        with_filters = [metric for metric in task.metrics if metric.partition(",")[0] == name]
        if not with_filters:
            names = ", ".join(metric.partition(",")[0] for metric in task.metrics)
            raise UserError(f"--metrics: {task.task} has no metric {name!r}; it has {names}")
        shown[task.task] = with_filters[0]
    if named_metrics:
        raise UserError(f"--metrics: there is no task {', '.join(named_metrics)} in these folders")
    return shown


def _opening(results: Sequence[TaskResults], metrics: dict[str, str], options: ReportOptions) -> dict[str, str]:
    """Returns the metrics that the page opens with: those that were asked for, else such that tell points apart."""
    asked_for = _asked_for(options)
    opening = dict(metrics)
    for task in map(drafts.others, results):
        if task.task not in asked_for and is_flat(task, metrics[task.task]):
            opening[task.task] = opening_metric(task, metrics[task.task])
    return opening


def _figure(task: TaskResults, metric: str, figure: str, options: ReportOptions) -> list[str]:
    """Returns a plot and the numbers that belong to it, as Markdown."""
    name = metric_name(metric, task.metrics)
    count = len(task.full.samples)
    parts = [f"### {name} (`{metric.partition(',')[0]}`), {count} documents\n"]
    if is_flat(task, metric):
        return [*parts, f"{flat_line(task, metric)} and on every document: it tells no points apart.\n"]
    parts.append(f"![{task.title}, {name}]({figure})\n")
    left_out = any(task.loops(point).any() for point in task.points)
    for axis, label in statistics.AXES.items():
        for without in (False, True) if left_out else (False,):
            given = (task, metric, axis, options.bootstrap, options.seed, without)
            note = ", without texts that loop, as differences from the full model" if without else ""
            summary, paired = statistics.summary(*given), statistics.against_pruning(*given)
            if len(summary):
                text = f"Score vs. {label}{note}, with 95 % intervals over documents:\n"
                parts += [text, markdown(intervals(settled(summary)))]
            if len(paired):
                text = (
                    f"Score minus that of a pruned model or static exit at its {label}{note}, paired over documents:\n"
                )
                parts += [text, markdown(intervals(settled(paired)))]
    return parts


def _points(task: TaskResults, metric: str, table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of a task's points."""
    of_task = table[(table["backbone"] == task.backbone) & (table["task"] == task.task)]
    of_task = of_task[of_task["point"].isin([point.name for point in task.points])]
    name, _, harness_filter = metric.partition(",")
    if metric in task.full.similarity:
        shown = of_task.drop_duplicates("point")
    else:
        shown = of_task[(of_task["metric"] == name) & (of_task["filter"] == harness_filter)]
    columns = [column for column in _COLUMNS if column in shown and not shown[column].isna().all()]
    return with_intervals(shown, ("compute_vs_full", "consistency_exact", "consistency_rouge_l"))[columns]
