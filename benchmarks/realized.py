"""Savings on the clock against counted savings: decoding at fixed exit rates and at real thresholds, and scoring.

    python benchmarks/realized.py --backbone smollm2-gguf --exits FOLDER --batch-sizes 1 16
    python benchmarks/realized.py --shape mistral-7b --blocks 8 --dtype bfloat16 --layers 4 --work decoding

Decoding: rows of equal prompts' length generate a fixed number of tokens; the time of the prompts alone is taken off.
Counted is the decode reduction with the LM head: MACs of the full model's generated tokens over those of the
policy's, one LM-head read per token on both sides. Realised is the ratio of the times for the same number of tokens.
Random exits leave after one layer at a fixed rate and cost nothing; trained ones run at thresholds.
With ``--rows`` there are so many requests, of which ``--rows-in-flight`` times the batch size are in flight at once
where tokens exit; the full model has a batch in flight.
Scoring: rows of random tokens, all of which may exit. Alternating order, medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from forced_exits import RandomExit, forced, threshold_for
from shapes import SHAPES, random_model

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions


class Case:
    """One policy with the engine that runs it."""

    def __init__(self, name: str, engine: Engine, policy: ExitPolicy) -> None:
        self.name = name
        self.engine = engine
        self.policy = policy
        self.traces: list[Trace] = []
        self.seconds: list[float] = []

    def decode(self, prompts: list[list[int]], new_tokens: int, batch_size: int, in_flight: int) -> float:
        """Seconds for the tokens after the first."""
        spent = []
        for length in (1, new_tokens):
            requests = [GenerationRequest(p, length, self.policy, Sampler(), lambda _: False) for p in prompts]
            start = time.perf_counter()
            generations = generate_all(
                self.engine, requests, batch_size, in_flight if self.policy.active_exits else None
            )
            spent.append(time.perf_counter() - start)
        self.traces = [generation.trace for generation in generations]
        return spent[1] - spent[0]

    def score(self, prompts: list[list[int]], batch_size: int) -> float:
        """Seconds for predicting every token."""
        policy = replace(self.policy, exit_scope="all")
        requests = [ScoringRequest(p[:-1], 1, [[token] for token in p[1:]], policy) for p in prompts]
        start = time.perf_counter()
        self.traces = [scoring.trace for scoring in score_all(self.engine, requests, batch_size)]
        return time.perf_counter() - start

    def macs(self) -> int:
        """Of the eligible tokens and one LM-head read for each, everything that exits cause included."""
        record = ComputeRecord.sum(self.engine.account(trace, self.policy) for trace in self.traces)
        return record.spent_macs + record.eligible_tokens * self.engine.backbone.cost.lm_head


def random_exits(engine: Engine, layer: int, rate: float) -> tuple[Engine, ExitPolicy]:
    """Leaves after ``layer`` at a rate."""
    policy = ExitPolicy(
        engine.backbone.num_layers, (layer,), (threshold_for(rate),), confidence="classifier", classifier="calm"
    )
    return forced(engine.backbone, {layer: RandomExit(layer)}), policy


def compare(cases: list[Case], run: Callable[[Case], float], repeats: int) -> list[dict[str, Any]]:
    """Counted and realised factors against the first case."""
    for case in cases:
        case.seconds = []
        run(case)
    for repeat in range(repeats):
        for case in sorted(cases, key=lambda c: c.name, reverse=bool(repeat % 2)):
            case.seconds.append(run(case))
    full = cases[0]
    rows = []
    for case in cases:
        counted = full.macs() / case.macs()
        realised = statistics.median(full.seconds) / statistics.median(case.seconds)
        rows.append(
            {
                "case": case.name,
                "counted": counted,
                "realised": realised,
                "share": realised / counted,
                "seconds": case.seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape in place of a backbone")
    parser.add_argument("--blocks", type=int, help="of the shape; unset: all")
    parser.add_argument("--work", nargs="+", choices=("decoding", "scoring"), default=["decoding", "scoring"])
    parser.add_argument("--exits", type=Path, help="folder of trained exits")
    parser.add_argument("--classifiers", nargs="*", default=["mamba", "calm"])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.6, 0.8])
    parser.add_argument("--layers", type=int, nargs="*", default=[15, 22], help="of random exits")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.9], help="of random exits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rows", type=int, default=0, help="requests; at least the batch size, and two")
    parser.add_argument("--rows-in-flight", type=int, default=1, help="batches of rows in flight where tokens exit")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--score-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    if args.shape and args.exits is not None:
        parser.error("--exits were trained for a backbone, and --shape has random weights; give one of them")
    if args.shape:
        model = random_model(args.shape, args.blocks, getattr(torch, args.dtype), args.device)
        engine = Engine(make_backbone(model, max_length=512))
    else:
        device = "cpu" if args.device == "cpu" else "auto"
        options = FrozenOptions(backbone=args.backbone, dtype=args.dtype, seq_len=512, device=device)
        loaded = load_backbone(options)
        engine = loaded.engine
    depth = engine.backbone.num_layers
    cases = [Case("full model", engine, ExitPolicy(depth))]
    for layer in args.layers:
        cases += [Case(f"random {layer}, {rate:g}", *random_exits(engine, layer, rate)) for rate in args.rates]
    if args.exits is not None:
        trained = ExitCheckpoint.open(args.exits)
        trained.check_fingerprint(loaded.identity.fingerprint)
        classifying = Engine(engine.backbone, trained.load(engine.backbone.device))
        for kind in args.classifiers:
            for threshold in args.thresholds:
                policy = policy_of_exits(trained.config, kind, threshold)
                cases.append(Case(f"{kind} {threshold:g}", classifying, policy))

    generator = torch.Generator().manual_seed(0)
    table = []
    for batch_size in args.batch_sizes:
        shape = (max(2, batch_size, args.rows), max(args.prompt_tokens, args.score_tokens))
        ids = torch.randint(3, engine.backbone.vocab_size, shape, generator=generator).tolist()
        prompts = [row[: args.prompt_tokens] for row in ids]
        texts = [row[: args.score_tokens] for row in ids]
        in_flight = batch_size * args.rows_in_flight
        works: dict[str, Callable[[Case], float]] = {
            "decoding": lambda case, p=prompts, b=batch_size, f=in_flight: case.decode(p, args.new_tokens, b, f),
            "scoring": lambda case, t=texts, b=batch_size: case.score(t, b),
        }
        for name in args.work:
            run = works[name]
            for row in compare(cases, run, args.repeats):
                table.append({"work": name, "batch_size": batch_size, **row})
                print(
                    f"| {name} | {batch_size} | {row['case']} | {row['counted']:.3f} | {row['realised']:.3f} | "
                    f"{row['share']:.3f} |",
                    flush=True,
                )
    about = {"benchmark": "realized", "backbone": args.shape or args.backbone, "blocks": depth, "dtype": args.dtype}
    about |= {"rows": args.rows, "rows_in_flight": args.rows_in_flight}
    print(json.dumps(about | environment(args.device) | {"rows": table}))


if __name__ == "__main__":
    main()
