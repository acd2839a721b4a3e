"""Is a compute budget held, and does the batch size change nothing?

    python benchmarks/budget.py --backbone smollm2-gguf --task triviaqa_long --metadata data_dir=DATA --limit 300

Runs the task at each target with each strategy and batch size. Answers, exit layers and thresholds at the second batch
size are compared with those at the first. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import lm_eval
from environment import environment
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.tasks import TaskManager
from tabulate import tabulate

import dynamax_lm_eval
from dynamax_lm_eval.lm import DynamaxLM


def run(args: argparse.Namespace, target: float, strategy: str, batch_size: int) -> dict[str, Any]:
    lm = DynamaxLM(
        args.backbone,
        target_reduction=target,
        budget=strategy,
        batch_size=batch_size,
        device="cpu",
        **key_val_to_dict(args.model_args),
    )
    metadata = key_val_to_dict(args.metadata)
    manager = TaskManager(include_path=str(dynamax_lm_eval.tasks_dir()), metadata=metadata)
    results = lm_eval.simple_evaluate(
        lm, tasks=[args.task], task_manager=manager, limit=args.limit, metadata=metadata, bootstrap_iters=0
    )
    assert results is not None
    samples = [(sample["resps"], sample["exit_layers"]) for sample in results["samples"][args.task]]
    trajectory = results["config"]["dynamax"]["budget"]["trajectory"][args.task]
    return {
        "reached": trajectory[-1]["compute_reduction_so_far"],
        "thresholds": [block["threshold"] for block in trajectory],
        "seconds": results["compute"]["overall"]["seconds_total"],
        "told": (samples, trajectory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--task", default="triviaqa_long")
    parser.add_argument("--metadata", default="")
    parser.add_argument("--model_args", default="dtype=float32,classifier=calm")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--targets", default="1.1,1.2,1.3")
    parser.add_argument("--strategies", default="online,two_pass")
    parser.add_argument("--batch_sizes", default="1,16")
    args = parser.parse_args()

    rows = []
    for strategy, target in product(args.strategies.split(","), map(float, args.targets.split(","))):
        found = {size: run(args, target, strategy, size) for size in map(int, args.batch_sizes.split(","))}
        first = next(iter(found.values()))
        rows.append(
            {
                "strategy": strategy,
                "target": target,
                "reached": first["reached"],
                "off by": first["reached"] / target - 1,
                "thresholds": " ".join(f"{threshold:.3f}" for threshold in first["thresholds"]),
                "same at all batch sizes": all(other["told"] == first["told"] for other in found.values()),
                "seconds": "/".join(f"{other['seconds']:.0f}" for other in found.values()),
            }
        )
        print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))
    print(json.dumps({"benchmark": "budget", **vars(args), "results": rows, **environment("cpu")}))


if __name__ == "__main__":
    main()
