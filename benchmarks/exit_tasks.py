"""Trained exits on generation tasks: kinds, adapters and thresholds against softmax, pruning and the full model.

    python benchmarks/exit_tasks.py --exits FOLDER --triviaqa triviaqa_dev.jsonl.gz --truthfulqa FOLDER_WITH_CSV

Consistency is ROUGE-L (F, 0 to 1) of a text with the full model's text for the same question, averaged. Every
policy runs through the harness's own simple_evaluate; results are kept after each in --output, and policies found
there are not run again. Prints a Markdown table per task; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from environment import environment
from lm_eval.tasks import TaskManager
from question_task import NAME, question_task
from rouge_score.rouge_scorer import RougeScorer

import dynamax_lm_eval
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.lm import DynamaxLM

TRUTHFULQA = "truthfulqa_gen_1shot"
METRICS = {NAME: "exact_match,none", TRUTHFULQA: "rougeL_acc,none"}
COLUMNS = (
    "policy",
    "metric",
    "stderr",
    "consistency",
    "compute_reduction",
    "vs full",
    "mean exit layer",
    "mean tokens",
    "limit hit",
)
_ROUGE = RougeScorer(["rougeL"])


def policies(args: argparse.Namespace, folder: str | None) -> dict[str, DynamaxArgs]:
    """By label; without a folder those that need no trained exits, the full model first."""
    full = DynamaxArgs(backbone=args.backbone, threshold=(1.0,), exits=folder)
    if folder is None:
        grid = {"full model": full}
        grid |= {f"pruning {count}": replace(full, prune_layers=count) for count in args.prune}
        return grid | {f"softmax {t:g}": replace(full, confidence="softmax", threshold=(t,)) for t in args.softmax}
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    grid = {}
    for kind, threshold, *scope in (point.split(":") for point in args.points):
        if kind in config["classifiers"]:
            label = ", ".join([kind, f"adapter {config.get('adapter', 'none')}", threshold, *scope])
            point = replace(full, classifier=kind, threshold=(float(threshold),))
            grid[label] = replace(point, exit_scope=scope[0]) if scope else point
    return grid


def evaluate(lm: DynamaxLM, policy: DynamaxArgs, task: Any, name: str, manager: TaskManager, limit: int) -> Any:
    """One row and the texts."""
    lm.use_policy(policy)
    results = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, bootstrap_iters=0, limit=limit, log_samples=True
    )
    assert results is not None
    compute = results["compute"]["by_task"][name]
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    metric = METRICS[name].partition(",")[0]
    values = np.asarray([sample[metric] for sample in samples], dtype=float)
    return {
        "metric": results["results"][name][METRICS[name]],
        "stderr": float(values.std(ddof=1) / np.sqrt(len(values))),
        "compute_reduction": compute["compute_reduction"],
        "mean exit layer": compute["mean_exit_layer"],
        "mean tokens": compute["mean_generated_tokens"],
        "limit hit": compute["token_limit_share"],
        "macs": compute["macs"]["total"],
        "texts": [sample["filtered_resps"][0] for sample in samples],
    }


def consistency(texts: list[str], reference: list[str]) -> float:
    """Mean ROUGE-L F of texts with reference texts; 1 where both hold no word."""
    scores = [
        _ROUGE.score(b, a)["rougeL"].fmeasure if any(map(str.isalnum, a + b)) else 1.0
        for a, b in zip(texts, reference, strict=True)
    ]
    return float(np.mean(scores))


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how it stands to the full model's on the same task, which is the first."""
    for row in rows:
        full = next(other for other in rows if other["task"] == row["task"])
        row["vs full"] = full["macs"] / row["macs"]
        row["consistency"] = consistency(row["texts"], full["texts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exits", nargs="*", default=[], help="folders of trained exits")
    parser.add_argument("--triviaqa", type=Path, help="JSON Lines (.gz) with question and aliases")
    parser.add_argument("--truthfulqa", type=Path, help="folder with the published CSV")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--questions", type=int, default=300, help="of TriviaQA")
    parser.add_argument("--documents", type=int, default=400, help="of TruthfulQA")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--points",
        nargs="*",
        default=[f"{kind}:{threshold}" for kind in ("mamba", "ffn", "calm") for threshold in (0.7, 0.9, 0.97)],
        help="kind:threshold[:exit_scope], for every folder of exits that has the kind: mamba:0.9, calm:0.8:all",
    )
    parser.add_argument("--softmax", type=float, nargs="*", default=[0.8, 0.95])
    parser.add_argument("--prune", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("exit_tasks.jsonl"))
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    tasks: dict[str, tuple[Any, int]] = {}
    if args.triviaqa is not None:
        tasks[NAME] = question_task(args.triviaqa, args.questions, 32), args.questions
    if args.truthfulqa is not None:
        tasks[TRUTHFULQA] = TRUTHFULQA, args.documents
    manager = TaskManager(
        include_path=str(dynamax_lm_eval.tasks_dir()),
        include_defaults=False,
        metadata={"data_dir": str(args.truthfulqa)},
    )
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for folder in [None, *args.exits]:
        lm = DynamaxLM(args.backbone, exits=folder, threshold=1, batch_size=args.batch_size, device=args.device)
        for label, policy in policies(args, folder).items():
            for name, (task, limit) in tasks.items():
                if any((row["task"], row["policy"]) == (name, label) for row in rows):
                    continue
                row = {"task": name, "policy": label, **evaluate(lm, policy, task, name, manager, limit)}
                rows.append(row)
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                compare(rows)
                print(json.dumps({key: row[key] for key in ("task", *COLUMNS)}), flush=True)

    compare(rows)
    for name in tasks:
        print(f"\n{name}: {METRICS[name]}\n\n| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
        for row in rows:
            if row["task"] == name:
                cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS]
                print("| " + " | ".join(cells) + " |")
    setting = {"benchmark": "exit_tasks", "backbone": args.backbone, "batch_size": args.batch_size}
    kept = [{key: row[key] for key in ("task", *COLUMNS)} for row in rows]
    print(json.dumps(setting | environment(args.device) | {"rows": kept}))


if __name__ == "__main__":
    main()
