"""Score against compute as PNG and SVG: legible in grey, lines named where they end, upper right is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamax_lm_eval.files import clean_name, short_name
from dynamax_lm_eval.reports.statistics import AXES, front
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

#: Told apart by lightness, dash and marker together; colours of Okabe and Ito (2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))


def coordinates(task: TaskResults, point: PointResult, metric: str, axis: str) -> tuple[float, float, float]:
    """Returns (reduction, score, its standard error or NaN) of a point."""
    return (task.reduction(point, axis), *point.scores[metric])


def file_stem(task: TaskResults, metric: str) -> str:
    """Returns the beginning of the names of a figure's files."""
    # The backbone may be a path: only what makes a name too long gets a hash.
    name = f"{task.backbone}-{task.task}-{metric.partition(',')[0]}"
    safe = clean_name(name)
    return safe if len(safe.encode()) <= 200 else short_name(name)


def plot(task: TaskResults, metric: str, stem: Path) -> list[Path]:
    """Draws both compute axes side by side; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(AXES), figsize=(7.4 * len(AXES), 5.4), sharey=True)
    # Room for names right of each panel.
    figure.subplots_adjust(left=0.05, right=0.89, top=0.92, bottom=0.11, wspace=0.27)
    for panel, (axis, label) in zip(axes, AXES.items(), strict=True):
        _draw(panel, task, metric, axis)
        panel.set_xlabel(f"{label} (times)")
        panel.grid(visible=True, color="0.9", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    if not task.higher_is_better(metric):
        axes[0].invert_yaxis()
    axes[0].set_ylabel(metric.partition(",")[0])
    left_out = [point.name for point in task.points if not point.valid]
    note = f"; {len(left_out)} invalid points left out" if left_out else ""
    figure.suptitle(f"{task.title}, {len(task.full.samples)} documents, bars: standard errors{note}", fontsize=11)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def _draw(panel: Any, task: TaskResults, metric: str, axis: str) -> None:
    baseline = task.full.scores[metric][0]
    panel.axhline(baseline, color="0.35", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    panel.plot(1, baseline, marker="*", markersize=13, color="black", zorder=5)
    plotted = [(1.0, baseline)]
    ends: list[tuple[float, float, str, str]] = []
    for i, (name, points) in enumerate(task.series().items()):
        shown = [coordinates(task, point, metric, axis) for point in points if point.valid]
        if not shown:
            continue
        x, y, errors = (list(column) for column in zip(*shown, strict=True))
        plotted += list(zip(x, y, strict=True))
        colour = COLOURS[i % len(COLOURS)]
        panel.errorbar(
            x,
            y,
            yerr=[0 if math.isnan(error) else error for error in errors],
            color=colour,
            linestyle=_DASHES[i % len(_DASHES)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.6,
            alpha=0.9,
            zorder=3,
        )
        ends.append((*max(zip(x, y, strict=True)), name, colour))
    best = [plotted[i] for i in front(plotted, task.higher_is_better(metric))]
    panel.plot(*zip(*best, strict=True), color="0.75", linewidth=6, alpha=0.6, zorder=0, solid_capstyle="round")
    _name_lines(panel, ends, baseline)


def _name_lines(panel: Any, ends: Sequence[tuple[float, float, str, str]], baseline: float) -> None:
    """Writes names right of the plot, at the height of each line's end, moved apart where they would touch."""
    low, high = panel.get_ylim()
    gap = (high - low) * 0.045  # the axis is turned around after this, where less is better
    labels = [(baseline, None, "full model", "black"), *((y, x, name, colour) for x, y, name, colour in ends)]
    right = panel.get_xlim()[1]
    place = low - gap
    for height, x, name, colour in sorted(labels, key=lambda end: end[0]):
        place = max(height, place + gap)
        panel.annotate(
            name,
            xy=(x if x is not None else right, height),
            xytext=(right, place),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            in_layout=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6} if x is not None else None,
        )
