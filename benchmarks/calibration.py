"""What calibration promises and what it keeps, over many random splits of the documents of one sweep.

    dynamax-lm-eval sweep --backbone smollm2-gguf --tasks truthfulqa_gen_1shot --metadata data_dir=DATA \\
        --confidences calm --thresholds 0.75:0.95:0.05,0.97 --output sweep
    python benchmarks/calibration.py --sweep sweep --metric rougeL_acc

The sweep answered its documents at all candidates, so every split into documents that choose and documents that test
is a matter of numbers. Each split draws its own order of bets. Per method and tolerance: how often each threshold is
chosen; expected compute_reduction (on the documents that chose) and realised (on the others), means over splits; mean
test loss and the share of splits where it is above the tolerance. Splits of the same documents overlap, and a test loss
is itself an estimate: the share above the tolerance is a description, not a test of the promise. Prints two Markdown
tables, the candidates on all documents and the splits; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from environment import environment
from tabulate import tabulate

from dynamax_lm_eval.calibration.command import split_documents
from dynamax_lm_eval.calibration.losses import LossKind, loss_matrix
from dynamax_lm_eval.calibration.testing import Bound, Floats, conformal_risk_control, learn_then_test
from dynamax_lm_eval.sweep import results as collect
from dynamax_lm_eval.sweep.results import PointResult

METHODS: tuple[tuple[str, Bound | None], ...] = (
    ("ltt, betting", "betting"),
    ("ltt, hoeffding-bentkus", "hoeffding-bentkus"),
    ("crc", None),
)


def reduction(points: list[PointResult], chosen: int | None, documents: list[int]) -> float:
    """compute_reduction of a candidate on some documents; of the full model where none was chosen."""
    if chosen is None:
        return 1.0
    full, spent = (points[chosen].macs(name)[documents].sum() for name in ("eligible_full", "eligible"))
    return float(full / spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sweep", type=Path, required=True, help="folder of a sweep of one task with one line of exits"
    )
    parser.add_argument("--line", dest="series", help="the line of exits; default: the sweep's only one")
    parser.add_argument("--loss", default="consistency,metric", help="losses, separated by commas")
    parser.add_argument("--metric", help="of loss metric; default: the task's first")
    parser.add_argument("--tolerances", default="0.05,0.1")
    parser.add_argument("--level", type=float, default=0.05)
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.5)
    args = parser.parse_args()

    (task,) = collect.read([args.sweep], max_degenerate=1.0)
    lines = {name: points for name, points in task.series().items() if points[0].kind == "exits"}
    points = lines[args.series] if args.series else next(iter(lines.values()))
    points = points[::-1]  # the most conservative first
    hashes = [sample["doc_hash"] for sample in task.full.samples]
    rows = []
    candidates = [
        {"threshold": point.x, "compute_reduction": reduction(points, i, list(range(len(hashes))))}
        for i, point in enumerate(points)
    ]
    for loss in args.loss.split(","):
        kind = LossKind.find(loss, args.metric if loss == "metric" else None, task)
        losses: Floats = loss_matrix(kind, task, points)
        for candidate, mean in zip(candidates, losses.mean(axis=1), strict=True):
            candidate[f"{kind.measured_by.partition(',')[0]} lost"] = float(mean)
        for tolerance, (method, bound) in product(map(float, args.tolerances.split(",")), METHODS):
            found = []
            for seed in range(args.splits):
                split = split_documents(hashes, args.share, seed)
                known = losses[:, split.calibration][:, split.first]
                if bound is None:
                    selection = conformal_risk_control(known, tolerance)
                else:
                    selection = learn_then_test(
                        known, tolerance, args.level, bound, seed=seed, population=split.population
                    )
                chosen = selection.best([reduction(points, i, split.calibration) for i in range(len(points))])
                lost = 0.0 if chosen is None else float(losses[chosen, split.test].mean())
                found.append(
                    (
                        1.0 if chosen is None else points[chosen].x,
                        reduction(points, chosen, split.calibration),
                        reduction(points, chosen, split.test),
                        lost,
                    )
                )
            thresholds, expected, realised, test_loss = (np.asarray(column) for column in zip(*found, strict=True))
            counts = Counter(thresholds.tolist())
            rows.append(
                {
                    "loss": kind.measured_by.partition(",")[0],
                    "tolerance": tolerance,
                    "method": method,
                    "thresholds": ", ".join(f"{value:g}: {counts[value]}" for value in sorted(counts)),
                    "expected": float(expected.mean()),
                    "realised": float(realised.mean()),
                    "test loss": float(test_loss.mean()),
                    "largest": float(test_loss.max()),
                    "above": float((test_loss > tolerance).mean()),
                }
            )
    print(f"{task.title}, {len(hashes)} documents, {args.splits} splits, level {args.level:g}\n")
    print(tabulate(candidates, headers="keys", tablefmt="github", floatfmt=".4f"), end="\n\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(
        json.dumps(
            {"benchmark": "calibration", **settings, "candidates": candidates, "results": rows, **environment("cpu")}
        )
    )


if __name__ == "__main__":
    main()
