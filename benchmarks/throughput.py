"""Exits off against ``--model hf``: the same requests, alternating order, medians, answers compared.

    python benchmarks/throughput.py --scenario triviaqa --data triviaqa_dev.jsonl.gz --limit 96 --batch-sizes 1 16
    python benchmarks/throughput.py --scenario truthfulqa --data truthfulqa_v0.csv.gz --limit 64 --batch-sizes 16
    python benchmarks/throughput.py --scenario choices --data triviaqa_dev.jsonl.gz --limit 64 --batch-sizes 16

triviaqa: two shots, the questions with the longest answers, stopped at a newline. truthfulqa: the harness's own
prompt of truthfulqa_gen, up to 256 tokens. choices: log-likelihoods of four answers after five shots. Peak memory is
that of a process of its own for each side. The last line is JSON with versions and hardware.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from environment import environment
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import apply_template
from question_task import read_questions, read_shots

from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.models import aliases


def triviaqa(args: argparse.Namespace) -> list[Instance]:
    """Two-shot prompts, up to ``max_gen_toks`` new tokens, stopped at a newline."""
    shots = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in read_shots())
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": args.max_gen_toks}
    questions = read_questions(args.data, args.limit, longest_answers=True)
    return [
        Instance("generate_until", {}, (f"{shots}Question: {row['question']}\nAnswer:", options), i, ("q", i, 1))
        for i, row in enumerate(questions)
    ]


def truthfulqa(args: argparse.Namespace) -> list[Instance]:
    """The prompts that the harness's task makes, up to 256 new tokens."""
    folder = Path(lm_eval.tasks.__file__).parent / "truthfulqa"
    lines = (folder / "truthfulqa_gen.yaml").read_text(encoding="utf-8").splitlines()
    # The file names functions; only its prompt is wanted.
    prompt = yaml.safe_load("\n".join(line for line in lines if "!function" not in line))["doc_to_text"]
    opener = gzip.open if args.data.suffix == ".gz" else open
    with opener(args.data, "rt", encoding="utf-8-sig", newline="") as file:
        questions = [row["Question"] for row in csv.DictReader(file)][: args.limit]
    options = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 256}
    return [
        Instance("generate_until", {}, (apply_template(prompt, {"question": question}), options), i, ("q", i, 1))
        for i, question in enumerate(questions)
    ]


def choices(args: argparse.Namespace) -> list[Instance]:
    """Four answers to each question, three of them those of other questions, after five shots."""
    rows = read_questions(args.data, args.limit + 5, longest_answers=False)
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:5])
    asked = rows[5:]
    return [
        Instance(
            "loglikelihood",
            {},
            (f"{shots}Question: {row['question']}\nAnswer:", f" {asked[(i + 7 * k) % len(asked)]['answer']}"),
            k,
            ("q", i, 1),
        )
        for i, row in enumerate(asked)
        for k in range(4)
    ]


SCENARIOS = {"triviaqa": triviaqa, "truthfulqa": truthfulqa, "choices": choices}


def timed(lm: Any, requests: list[Instance]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    answers = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    return time.perf_counter() - start, answers


def is_equal(ours: Any, theirs: Any) -> bool:
    """The same text; or the same judgement, with log-likelihoods equal but for rounding."""
    if isinstance(ours, str):
        return bool(ours == theirs)
    return bool(ours[1] == theirs[1] and abs(ours[0] - theirs[0]) < 1e-3)


def models_of(args: argparse.Namespace, folder: str, batch_size: int) -> dict[str, Callable[[], Any]]:
    options: dict[str, Any] = {"batch_size": batch_size, "device": args.device, "dtype": args.dtype}
    return {"hf": lambda: HFLM(folder, **options), "dynamax": lambda: DynamaxLM(folder, threshold=1, **options)}


def peak_memory(name: str, batch_size: int) -> int:
    """MiB of main memory that a process needs which answers all requests in one of the two ways."""
    command = [sys.executable, *sys.argv, f"--memory-of={name}", "--batch-sizes", str(batch_size)]
    return int(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, default="triviaqa")
    parser.add_argument("--data", type=Path, required=True, help="the scenario's file, .gz or not")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--max-gen-toks", type=int, default=48)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory-of", choices=("hf", "dynamax"), help=argparse.SUPPRESS)
    args = parser.parse_args()

    requests = SCENARIOS[args.scenario](args)
    folder = aliases.resolve_backbone(args.backbone)
    if args.memory_of:
        lm = models_of(args, folder, args.batch_sizes[0])[args.memory_of]()
        timed(lm, requests)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    rows = []
    for batch_size in args.batch_sizes:
        memory = {name: peak_memory(name, batch_size) for name in ("hf", "dynamax")}
        models = {name: make() for name, make in models_of(args, folder, batch_size).items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        answers: dict[str, list[Any]] = {}
        for lm in models.values():
            timed(lm, requests[:batch_size])
        for repeat in range(args.repeats):
            for name in sorted(models, reverse=bool(repeat % 2)):
                taken, answers[name] = timed(models[name], requests)
                seconds[name].append(taken)
                print(f"batch {batch_size} {name}: {taken:.1f} s", flush=True)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        equal = sum(map(is_equal, answers["dynamax"], answers["hf"]))
        rows.append(
            {
                "batch_size": batch_size,
                "seconds": seconds,
                "median_seconds": medians,
                "speed_up": medians["hf"] / medians["dynamax"],
                "equal_answers": equal,
                "answers": len(requests),
                "peak_mib": memory,
            }
        )
        print(
            f"batch {batch_size}: {rows[-1]['speed_up']:.2f} times as fast, {equal}/{len(requests)} equal", flush=True
        )
    setting = {
        "benchmark": "throughput",
        "scenario": args.scenario,
        "backbone": args.backbone,
        "max_gen_toks": args.max_gen_toks,
        "dtype": args.dtype,
    }
    print(json.dumps(setting | environment(args.device) | {"rows": rows}))


if __name__ == "__main__":
    main()
