"""Training-free confidences, state modes and pruning side by side on questions from a local file.

    python benchmarks/policies.py --data triviaqa_dev.jsonl.gz --backbone smollm2-gguf --limit 200

The backbone is loaded once; every policy runs through the harness's own simple_evaluate. Results are kept
after each policy in --output, and policies found there are not run again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import lm_eval
from environment import environment
from lm_eval.tasks import TaskManager
from question_task import NAME, question_task

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.lm import DynamaxLM

STATE_MODES = ("recompute", "copy", "skip")
COLUMNS = (
    "policy",
    "exact match",
    "compute_reduction",
    "total",
    "paper",
    "vs full",
    "mean exit layer",
    "mean tokens",
    "limit hit",
    "seconds",
)


def policies(args: argparse.Namespace) -> list[DynamaxArgs]:
    """The full model first: the others are compared with it."""
    full = DynamaxArgs(backbone=args.backbone, threshold=(1.0,))
    grid = [full]
    grid += [replace(full, prune_layers=count) for count in args.prune]
    thresholds = {"softmax": args.softmax, "state": args.state}
    for confidence, mode in product(thresholds, STATE_MODES):
        for threshold in thresholds[confidence]:
            grid.append(replace(full, confidence=confidence, state_mode=mode, threshold=(threshold,)))
    return grid


def label(args: DynamaxArgs) -> str:
    if args.prune_layers:
        return f"pruning {args.prune_layers}"
    if args.threshold == (1.0,):
        return "full model"
    return f"{args.confidence} {args.threshold[0]:g}, {args.state_mode}"


def evaluate(lm: DynamaxLM, args: DynamaxArgs, task: dict[str, Any], manager: TaskManager) -> dict[str, Any]:
    lm.use_policy(args)
    results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert results is not None
    compute = results["compute"]["by_task"][NAME]
    return {
        "policy": label(args),
        "exact match": results["results"][NAME]["exact_match,none"],
        "compute_reduction": compute["compute_reduction"],
        "total": compute["compute_reduction_total"],
        "paper": compute["compute_reduction_paper"],
        "mean exit layer": compute["mean_exit_layer"],
        "mean tokens": compute["mean_generated_tokens"],
        "limit hit": compute["token_limit_share"],
        "seconds": results["compute"]["overall"]["seconds_total"],
        "macs": compute["macs"]["total"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines (.gz) with question and aliases")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-gen-toks", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--softmax", type=float, nargs="*", default=[0.6, 0.8, 0.9])
    parser.add_argument("--state", type=float, nargs="*", default=[0.95, 0.97, 0.98, 0.99, 0.995])
    parser.add_argument("--prune", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, default=Path("policies.jsonl"))
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    task = question_task(args.data, args.limit, args.max_gen_toks)
    done = {}
    if args.output.is_file():
        done = {row["policy"]: row for row in map(json.loads, args.output.read_text().splitlines())}
    lm = DynamaxLM(args.backbone, threshold=1, batch_size=args.batch_size, device=args.device)
    manager = TaskManager(include_defaults=False)
    rows = []
    for policy in policies(args):
        row = done.get(label(policy)) or evaluate(lm, policy, task, manager)
        if label(policy) not in done:
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        row["vs full"] = rows[0]["macs"] / row["macs"]
        print(json.dumps(row), flush=True)

    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- " * len(COLUMNS) + "|")
    for row in rows:
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        print("| " + " | ".join(cells) + " |")
    setting = {
        "benchmark": "policies",
        "backbone": args.backbone,
        "questions": args.limit,
        "batch_size": args.batch_size,
        "dtype": str(lm.model.dtype),
    }
    print(json.dumps(setting | environment(args.device) | {"rows": rows}))


if __name__ == "__main__":
    main()
