"""Draws the picture of README.md and of the site's first page from stored results; nothing in it is written by hand.

    python benchmarks/overview_picture.py --lines "mamba, recompute" "pruning, angular"

Left: one sweep's similarity to the full model's answers against compute, from the points.csv of a report. Right: one
answer, each token shaded by the number of blocks that it ran, from a JSON file. That file is made again from a point of
a sweep by

    python benchmarks/overview_picture.py --question "What causes earthquakes?" --point out/sweep/points/NAME
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COLOURS, MARKERS = ("#0072B2", "#B34700", "#006B4F", "#444444"), ("o", "s", "^", "D")
#: Blues of a token that ran all blocks and of one that left at the first exit.
LATE, EARLY = (0.93, 0.96, 1.0), (0.22, 0.48, 0.78)


def points_of(file: Path, lines: list[str]) -> dict[str, list[dict[str, str]]]:
    """Returns the valid points of each line, one row per point, in the order of their compute."""
    with file.open(encoding="utf-8", newline="") as text:
        rows = {row["point"]: row for row in csv.DictReader(text) if row["valid"] == "True"}
    known = sorted({row["line"] for row in rows.values()})
    if unknown := [line for line in lines if line not in known]:
        raise SystemExit(f"{file} has no valid points of {', '.join(unknown)}; its lines: {'; '.join(known)}")
    chosen = {line: [row for row in rows.values() if row["line"] == line] for line in lines}
    return {line: sorted(found, key=lambda row: float(row["value"])) for line, found in chosen.items()}


def draw_curve(axes: Axes, lines: dict[str, list[dict[str, str]]]) -> None:
    """Draws one mark per point, with its threshold or its number of pruned blocks beside it."""
    for (line, rows), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        pruned = rows[0]["family"] == "pruning"
        x, y = ([float(row[name]) for row in rows] for name in ("compute_reduction", "consistency_rouge_l"))
        errors = [float(row["compute_reduction_stderr"]) for row in rows]
        axes.errorbar(x, y, xerr=errors, fmt=marker, ms=6, color=colour, elinewidth=0.8, alpha=0.95, label=line)
        for row, at in zip(rows, zip(x, y, strict=True), strict=True):
            text = f"{float(row['value']):g}" + pruned * " off"
            axes.annotate(text, at, xytext=(7, 5), textcoords="offset points", fontsize=8.5, color=colour)
    axes.plot([1], [1], "*", ms=13, color="black")
    axes.annotate("full model", (1, 1), xytext=(-8, -18), textcoords="offset points", fontsize=9.5)
    axes.set_ylim(0, 1.06)
    axes.margins(x=0.09)
    axes.set_xlabel("compute_reduction  →  saves more")
    axes.set_ylabel("ROUGE-L with the full model's answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False, fontsize=9.5)


def draw_answer(axes: Axes, answer: dict[str, Any]) -> None:
    """Draws the tokens in lines of text, each on a ground that is the darker the earlier it left."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    blocks, layers = answer["blocks"], [answer["blocks"], *answer["exit_layers"]]
    first = min(answer["exit_points"])

    def ground(layer: int) -> tuple[float, ...]:
        share = (blocks - layer) / (blocks - first)
        return tuple(late + share * (early - late) for late, early in zip(LATE, EARLY, strict=True))

    def place(text: str, x: float, y: float, layer: int | None, **style: Any) -> float:
        box = None if layer is None else {"boxstyle": "square,pad=0.16", "fc": ground(layer), "ec": "none"}
        ink = "white" if layer is not None and layer <= first else "black"
        shown = axes.text(x, y, text, va="center", color=ink, bbox=box, **style)
        extent = shown.get_window_extent(axes.figure.canvas.get_renderer())
        return float(axes.transData.inverted().transform((extent.x1, 0))[0])

    place(answer["question"], 0, 0.95, None, fontsize=13, fontweight="bold")
    x, y = 0.0, 0.83
    for piece, layer in zip(answer["pieces"], layers, strict=True):
        if not piece.strip():
            continue
        # A word goes to the next line as a whole, unless it is a sign that belongs to the one before.
        x += 0.014 if piece.startswith(" ") else 0.004
        if x + 0.0205 * len(piece) > 1 and piece.startswith(" "):
            x, y = 0.0, y - 0.115
        x = place(piece.strip(), x, y, layer, fontsize=12, family="DejaVu Sans Mono") + 0.008
    y -= 0.17
    place("blocks run:", 0, y, None, fontsize=10)
    for x, layer in zip((0.21, 0.33, 0.45, 0.57), sorted({*answer["exit_points"], blocks}), strict=False):
        place(f"{layer}" if layer < blocks else f"{layer} (all)", x, y, layer, fontsize=10)
    left = sum(layer < blocks for layer in layers)
    note = (
        f"{left} of {len(layers)} tokens come from an early exit ({answer['backbone']}, {answer['point']}). "
        "The first always comes from the full model."
    )
    place(textwrap.fill(note, 58), 0, y - 0.16, None, fontsize=10)


def stored_answer(point: Path, question: str) -> dict[str, Any]:
    """Returns what the picture needs of one answer of a sweep's point."""
    samples = [json.loads(line) for file in point.rglob("samples_*.jsonl") for line in file.open(encoding="utf-8")]
    sample = next((found for found in samples if found["doc"].get("question") == question), None)
    if sample is None:
        raise SystemExit(f"{point} has no sample with the question {question!r}")
    results = json.loads(next(point.rglob("results_*.json")).read_text(encoding="utf-8"))
    header, *lines = [json.loads(line) for line in (point / "responses.jsonl").open(encoding="utf-8")]
    response = next(line for line in lines if line["answer"] == sample["resps"][0][0])
    policy = header["identity"]["policy"]
    return {
        "question": question,
        "pieces": response["pieces"],
        "exit_layers": response["record"]["exit_layers"][0],
        "exit_points": policy["exit_layers"],
        "blocks": policy["num_layers"],
        "backbone": results["config"]["dynamax"]["backbone_name"].rpartition("/")[2],
        "point": point.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=RESULTS / "truthfulqa" / "points.csv")
    parser.add_argument("--lines", nargs="+", default=["mamba, recompute", "pruning, angular"])
    parser.add_argument("--answer", type=Path, default=RESULTS / "explain_demo" / "answer.json")
    parser.add_argument("--point", type=Path, help="of a sweep: writes --answer from it, with --question")
    parser.add_argument("--question")
    parser.add_argument("--output", type=Path, default=RESULTS.parent / "images" / "overview.png")
    options = parser.parse_args()
    if options.point is not None:
        answer = stored_answer(options.point, options.question)
        options.answer.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    lines = points_of(options.points, options.lines)
    some = next(iter(lines.values()))[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.3), width_ratios=(1, 1.05), layout="constrained")
    draw_curve(left, lines)
    title = f"{some['backbone']} on {some['documents']} documents of {some['task']}"
    left.set_title(f"{title}\nlabels: thresholds of exits, blocks switched off", fontsize=10.5, loc="left")
    # The layout is then final, and widths of texts can be measured.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    draw_answer(right, json.loads(options.answer.read_text(encoding="utf-8")))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    # A palette makes the file a third as large, and nobody sees the difference.
    Image.open(drawn).convert("RGB").quantize(64).save(options.output, optimize=True)
    print(json.dumps({"picture": str(options.output), "bytes": options.output.stat().st_size}))


if __name__ == "__main__":
    main()
