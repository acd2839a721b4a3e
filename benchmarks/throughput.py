"""Generation with exits off against ``--model hf``: the same requests, alternating order, medians, texts compared.

    python benchmarks/throughput.py --data triviaqa_dev.jsonl.gz --backbone smollm2-gguf --limit 96 --batch-sizes 16

The last line is JSON with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from environment import environment
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from question_task import read_questions, read_shots

from dynamax_lm_eval.backbones import aliases
from dynamax_lm_eval.lm import DynamaxLM


def requests_for(args: argparse.Namespace) -> list[Instance]:
    """Two-shot prompts, up to ``max_gen_toks`` new tokens, stopped at a newline."""
    shots = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in read_shots())
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": args.max_gen_toks}
    questions = read_questions(args.data, args.limit, longest_answers=True)
    return [
        Instance("generate_until", {}, (f"{shots}Question: {row['question']}\nAnswer:", options), i, ("q", i, 1))
        for i, row in enumerate(questions)
    ]


def timed(lm: Any, requests: list[Instance]) -> tuple[float, list[str]]:
    start = time.perf_counter()
    texts = lm.generate_until(requests, disable_tqdm=True)
    return time.perf_counter() - start, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines (.gz) with question and aliases")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--max-gen-toks", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    requests = requests_for(args)
    folder = aliases.resolve(args.backbone)
    rows = []
    for batch_size in args.batch_sizes:
        options: dict[str, Any] = {"batch_size": batch_size, "device": args.device}
        models = {"hf": HFLM(folder, **options), "dynamax": DynamaxLM(folder, threshold=1, **options)}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        texts: dict[str, list[str]] = {}
        for lm in models.values():
            timed(lm, requests[:batch_size])
        for repeat in range(args.repeats):
            for name in sorted(models, reverse=bool(repeat % 2)):
                taken, texts[name] = timed(models[name], requests)
                seconds[name].append(taken)
                print(f"batch {batch_size} {name}: {taken:.1f} s", flush=True)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        equal = sum(a == b for a, b in zip(texts["hf"], texts["dynamax"], strict=True))
        rows.append(
            {
                "batch_size": batch_size,
                "seconds": seconds,
                "median_seconds": medians,
                "speed_up": medians["hf"] / medians["dynamax"],
                "equal_texts": equal,
                "texts": len(requests),
            }
        )
    setting = {
        "benchmark": "throughput",
        "backbone": args.backbone,
        "max_gen_toks": args.max_gen_toks,
        "dtype": str(models["dynamax"].model.dtype),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(setting | environment(args.device) | {"rows": rows}))


if __name__ == "__main__":
    main()
