"""Score against compute as PNG and SVG: legible in grey, thresholds at points, one legend, upper right is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dynamax_lm_eval.files import clean_name, short_name
from dynamax_lm_eval.reports.curves import (
    COLOURS,
    Place,
    joined,
    labelled,
    pareto_front,
    place,
    reduction_range,
    score_range,
)
from dynamax_lm_eval.reports.names import metric_name, setting
from dynamax_lm_eval.reports.statistics import AXES
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_FRONT_COLOUR = "0.8"
#: Where a label may stand, in points from its marker, the best place first.
_OFFSETS = ((0, 6), (0, -13), (7, -3), (-7, -3), (6, 5), (-6, 5), (6, -12), (-6, -12))
_LABEL_SIZE = 7.5


def file_stem(task: TaskResults, metric: str) -> str:
    """Returns the beginning of the names of a figure's files."""
    # The backbone may be a path: only what makes a name too long gets a hash.
    name = f"{task.backbone}-{task.task}-{metric.partition(',')[0]}"
    safe = clean_name(name)
    return safe if len(safe.encode()) <= 200 else short_name(name)


def plot(task: TaskResults, metric: str, stem: Path, points: pd.DataFrame | None = None) -> list[Path]:
    """Draws both compute axes side by side; returns the files.

    Args:
        task: what is drawn.
        metric: the score, with its filter.
        stem: the files without their endings.
        points: as ``paired.of_points`` returns it, for intervals of ``compute_vs_full``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(task.series())
    columns = min(4, max(1, len(names) + 2))
    legend_rows = math.ceil((len(names) + 3) / columns)
    height = 5.0 + 0.24 * legend_rows
    figure, axes = plt.subplots(1, len(AXES), figsize=(6.4 * len(AXES), height), sharey=True)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 0.5 / height, bottom=(0.75 + 0.24 * legend_rows) / height, wspace=0.06
    )
    for panel, (axis, label) in zip(axes, AXES.items(), strict=True):
        panel.set_xlim(*reduction_range(task, metric, axis, points))
        panel.set_ylim(*score_range(task, metric))
        if not task.higher_is_better(metric):
            panel.invert_yaxis()
        _draw(panel, task, metric, axis, points)
        panel.set_xlabel(f"{label} (\N{MULTIPLICATION SIGN})")
        panel.grid(visible=True, color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelleft=panel is axes[0])
    axes[0].set_ylabel(metric_name(metric) + ("" if task.higher_is_better(metric) else " (less is better)"))
    figure.suptitle(
        f"{task.title}, {len(task.full.samples)} documents; bars: 95 % intervals; numbers: {_numbers(task)}",
        fontsize=10.5,
        x=0.065,
        ha="left",
    )
    figure.legend(
        *_legend(task, metric),
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.6,
        columnspacing=2,
    )
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        # Text stays text: it can be searched, and read by a screen reader.
        with plt.rc_context({"svg.fonttype": "none"}):
            figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def _numbers(task: TaskResults) -> str:
    kinds = {point.kind for points in task.series().values() for point in points}
    return "thresholds" if kinds <= {"exits"} else "thresholds, or what is pruned"


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)][0],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def _legend(task: TaskResults, metric: str) -> tuple[list[Any], list[str]]:
    """Returns what stands for each line, the full model, the front and points that are left out, with their names."""
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, str]] = [
        (
            Line2D([], [], color="0.35", linestyle=(0, (2, 2)), marker="*", markersize=11, markerfacecolor="black"),
            "full model",
        ),
    ]
    if any(len(pareto_front(task, metric, axis)) > 1 for axis in AXES):
        entries.append((Line2D([], [], color=_FRONT_COLOUR, linewidth=6), "Pareto front"))
    entries += [
        (Line2D([], [], markersize=5.5, linewidth=1.5, **_style(i)), name) for i, name in enumerate(task.series())
    ]
    if left_out := [point for point in task.points if not point.valid]:
        mark = Line2D([], [], color="0.3", linestyle="none", marker="o", markerfacecolor="white", markersize=6)
        entries.append((mark, f"hollow: left out, texts repeat or do not end ({len(left_out)})"))
    handles, names = zip(*entries, strict=True)
    return list(handles), list(names)


class _Label(NamedTuple):
    text: str
    at: Place
    colour: str


def _draw(panel: Any, task: TaskResults, metric: str, axis: str, points: pd.DataFrame | None) -> None:
    def at(point: PointResult) -> Place:
        return place(task, point, metric, axis, points)

    full = at(task.full)
    best = [at(point) for point in pareto_front(task, metric, axis)]
    if len(best) > 1:  # one point would be hidden by its marker
        panel.plot(
            [p.x for p in best],
            [p.y for p in best],
            color=_FRONT_COLOUR,
            linewidth=8,
            zorder=0.5,
            solid_capstyle="round",
            marker="o",
            markersize=9,
        )
    panel.axhline(full.y, color="0.35", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    panel.plot(full.x, full.y, marker="*", markersize=13, color="black", zorder=5)
    colours, places = {}, [full]
    for i, line in enumerate(task.series().values()):
        style = _style(i)
        through = [at(point) for point in joined(task, line, metric, axis)]
        if len(through) > 1:
            panel.plot(
                [p.x for p in through], [p.y for p in through], linewidth=1.4, zorder=3, **style | {"marker": None}
            )
        for point in line:
            found = at(point)
            places.append(found)
            colours[point.name] = style["color"]
            panel.errorbar(
                found.x,
                found.y,
                xerr=_lengths(found.x, found.x_bar),
                yerr=_lengths(found.y, found.y_bar),
                elinewidth=0.9,
                ecolor=(style["color"], 0.4),
                color=style["color"],
                marker=style["marker"],
                markersize=5.5,
                markerfacecolor=style["color"] if point.valid else "white",
                zorder=3.5,
            )
    labels = [_Label(setting(point, is_short=True), at(point), colours[point.name]) for point in labelled(task)]
    _write_labels(panel, labels, places)


def _lengths(value: float, bar: tuple[float, float]) -> list[list[float]] | None:
    """Returns the lengths of a bar below and above a value, as matplotlib wants them."""
    if not all(math.isfinite(end) for end in bar):
        return None
    return [[max(value - bar[0], 0.0)], [max(bar[1] - value, 0.0)]]


def _write_labels(panel: Any, labels: Sequence[_Label], places: Sequence[Place]) -> None:
    """Writes each label beside its marker, where it covers no other one and no marker; distances are in pixels."""
    from matplotlib.patheffects import withStroke

    scale = float(panel.figure.dpi) / 72
    x0, y0, x1, y1 = (float(edge) for edge in panel.get_window_extent().extents)
    taken = [_Box(float(x), float(y), 4.0, 4.0) for x, y in panel.transData.transform([(p.x, p.y) for p in places])]
    for label in labels:
        x, y = (float(value) for value in panel.transData.transform((label.at.x, label.at.y)))
        boxes = {offset: _Box.beside(x, y, offset, len(label.text), scale) for offset in _OFFSETS}
        covered = {
            offset: sum(box.shared(other) for other in taken) + 1e3 * box.beyond(x0, y0, x1, y1)
            for offset, box in boxes.items()
        }
        best = min(_OFFSETS, key=covered.__getitem__)
        if covered[best] > boxes[best].width * boxes[best].height:
            continue  # a quarter of it would be covered: no label is better than two that cannot be read
        taken.append(boxes[best])
        panel.annotate(
            label.text,
            (label.at.x, label.at.y),
            xytext=best,
            textcoords="offset points",
            fontsize=_LABEL_SIZE,
            color=label.colour,
            ha="center" if best[0] == 0 else "left" if best[0] > 0 else "right",
            va="bottom",
            annotation_clip=False,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.8)],
        )


class _Box(NamedTuple):
    """A box in pixels: its middle, and half its width and height."""

    x: float
    y: float
    width: float
    height: float

    @classmethod
    def beside(cls, x: float, y: float, offset: tuple[int, int], letters: int, scale: float) -> _Box:
        """Returns the box of a label of so many letters beside a marker."""
        width, height = 0.31 * _LABEL_SIZE * letters * scale, 0.55 * _LABEL_SIZE * scale
        side = (offset[0] > 0) - (offset[0] < 0)
        return cls(x + offset[0] * scale + side * width, y + offset[1] * scale + height, width, height)

    def shared(self, other: _Box) -> float:
        """Returns the area that two boxes share."""
        width = self.width + other.width - abs(self.x - other.x)
        height = self.height + other.height - abs(self.y - other.y)
        return max(0.0, width) * max(0.0, height)

    def beyond(self, x0: float, y0: float, x1: float, y1: float) -> float:
        """Returns by how much the box runs out of a frame."""
        sides = max(0.0, x0 + self.width - self.x, self.x + self.width - x1)
        return sides + max(0.0, y0 + self.height - self.y, self.y + self.height - y1)
