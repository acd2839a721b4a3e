"""Exits as drafts on the clock: policies with ``verify`` against the full model, on the documents of a task.

    python benchmarks/verified.py --backbone smollm2-gguf --tasks truthfulqa_gen_1shot --metadata data_dir=FOLDER \\
        --limit 40 --policies confidence=classifier,classifier=calm,threshold=0.6,vocab_subset=4096

Every policy is a list of model arguments. Documents are answered in blocks; each block by the full model and by every
policy, in alternating order, and texts are compared. Prints, for each policy: the median over blocks of the full
model's seconds over the policy's, drafts accepted, tokens per verification, weights read against the full model's,
and compute. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

from environment import environment

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.config import DynamaxArgs, parse_model_args
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.harness.pairs import json_or_pairs
from dynamax_lm_eval.harness.roofline import drafts
from dynamax_lm_eval.harness.tasks import task_manager
from dynamax_lm_eval.lm import DynamaxLM

FULL = "full model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--exits", help="folder of trained exits; unset: looked up")
    parser.add_argument("--tasks", default="trivia_demo")
    parser.add_argument("--metadata", default="", help="of the task, e.g. data_dir=FOLDER")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--policies", nargs="+", required=True, help="model arguments of each, without the backbone")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=4, help="of documents, each of which gives one ratio")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    exits = {} if args.exits is None else {"exits": args.exits}
    lm = DynamaxLM(
        backbone=args.backbone, threshold=0.5, dtype=args.dtype, batch_size=args.batch_size, device=args.device, **exits
    )
    cases: dict[str, DynamaxArgs] = {FULL: replace(lm.args, threshold=(1.0,))}
    for text in args.policies:
        given = {"backbone": args.backbone, **exits, "verify": "true", **json_or_pairs("--policies", text)}
        cases[text], _ = parse_model_args(given, [])
    manager = task_manager(None, json.dumps(json_or_pairs("--metadata", args.metadata), sort_keys=True))
    (task,) = manager.load([args.tasks])["tasks"].values()
    task.build_all_requests(limit=args.limit)
    requests = list(task.instances)
    size = -(-len(requests) // args.blocks)
    blocks = [requests[i : i + size] for i in range(0, len(requests), size)]

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    texts: dict[str, list[str]] = {name: [] for name in cases}
    records: dict[str, list[ComputeRecord]] = {name: [] for name in cases}
    for case in cases.values():  # a first run of each is not timed
        lm.use_policy(case)
        lm.generate_until(blocks[0][:1], disable_tqdm=True)
    for number, block in enumerate(blocks):
        for name in sorted(cases, reverse=bool(number % 2)):
            lm.use_policy(cases[name])
            lm.response_ledger.start_run()
            start = time.perf_counter()
            texts[name] += lm.generate_until(block, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)
            keys = request_keys(("generate_until", request.args) for request in block)
            found = [lm.response_ledger.find(key) for key in keys]
            records[name] += found
    table = []
    for name in cases:
        total = ComputeRecord.sum(records[name])
        ratios = [full / own for full, own in zip(seconds[FULL], seconds[name], strict=True)]
        row: dict[str, Any] = {
            "policy": name,
            "speedup": statistics.median(ratios),
            "ratios": ratios,
            "same_texts": sum(a == b for a, b in zip(texts[FULL], texts[name], strict=True)) / len(texts[FULL]),
            "acceptance": total.accepted_drafts / max(total.drafted_tokens, 1),
            "tokens_per_verification": total.generated_tokens / max(total.verifications, 1),
            "weights_read": total.weights_read / total.full_weights_read,
            "compute_reduction": total.compute_reduction,
            "by_exit": (drafts(total) or {}).get("by_exit"),
        }
        table.append(row)
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        print(" | ".join(cells), flush=True)
    about = {"benchmark": "verified", "backbone": args.backbone, "task": args.tasks, "documents": len(requests)}
    print(json.dumps(about | environment(args.device) | {"batch_size": args.batch_size, "rows": table}))


if __name__ == "__main__":
    main()
