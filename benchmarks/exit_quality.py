"""What exits do to held-out text at equal compute: trained classifiers, random exits of the same rate, pruning.

    python benchmarks/exit_quality.py --exits FOLDER --dataset held_out.jsonl.gz --backbone smollm2-gguf

Every token of the text is predicted once, through the engine, with the states that early tokens leave behind;
all tokens but a row's first may exit. Agreement is the share of tokens whose most probable next token is that
of the full model, with its standard error over documents; bits per byte are those of the text; compute_reduction
counts everything that exits cause. Continuations: the first tokens of the rows are prompts, and greedy
continuations are compared with the full model's, as the share of their tokens before the first that differs. Random
exits leave each layer at the rate of the trained ones and cost no classifier. Confidences of other kinds than the
trained classifiers stand beside them with --confidences calm softmax cascade:calm; a cascade's thresholds are those of
its read-out. --answers takes the model's own answers in place of text, whose prompts run at full depth. --read counts a
read of the LM head as a share of all blocks; 0.01875 is that of Mistral 7B (0.6 of 32). Prints a Markdown table; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from answers import answers
from environment import environment
from forced_exits import RandomExit, forced, threshold_for

from dynamax_lm_eval.compute.accounting import ComputeRecord, ratio_stderr
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.requests import GenerationRequest, ScoringRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.engine.scoring import score_all
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint, ExitConfig
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import default_confirm, policy_of_exits
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.types import ConfidenceName


def run(engine: Engine, policy: ExitPolicy, rows: list[list[int]], prompts: list[int], batch: int) -> dict[str, Any]:
    """Most probable next tokens and compute of all rows under a policy."""
    requests = [
        ScoringRequest(row[:-1], prompt, [[token] for token in row[prompt:]], policy)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    scorings = score_all(engine, requests, batch)
    record = ComputeRecord.sum(engine.account(scoring.trace, policy) for scoring in scorings)
    log_probs = sum(line[0] for scoring in scorings for line in scoring.log_probs)
    return {
        "bits": -log_probs / math.log(2),
        "greedy": np.concatenate([np.asarray(scoring.greedy_tokens) for scoring in scorings]),
        "layers": np.concatenate([np.asarray(scoring.trace.exit_layers) for scoring in scorings]),
        "compute_reduction": record.compute_reduction,
    }


def continue_rows(
    engine: Engine, policy: ExitPolicy, rows: list[list[int]], args: argparse.Namespace
) -> list[list[int]]:
    """Greedy continuations of the rows' beginnings, whose own tokens run at full depth."""
    policy = replace(policy, exit_scope="generated")
    prompts = [row[: args.prompt_tokens] for row in rows if len(row) >= args.prompt_tokens][: args.continuations]
    requests = [GenerationRequest(prompt, args.new_tokens, policy, Sampler(), lambda _: False) for prompt in prompts]
    return [generation.tokens for generation in generate_all(engine, requests, args.batch_size)]


def common_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean share of tokens before the first that differs."""
    shares = [
        next((i for i, (a, b) in enumerate(zip(mine, full, strict=True)) if a != b), len(full)) / len(full)
        for mine, full in zip(ours, theirs, strict=True)
    ]
    return float(np.mean(shares)) if shares else math.nan


def by_document(agreement: Any, document: Any) -> float | None:
    """Standard error over documents of the share of tokens that agree; tokens of one document are alike."""
    _, cluster = np.unique(document, return_inverse=True)
    sums = np.bincount(cluster, weights=agreement), np.bincount(cluster)
    return ratio_stderr([list(zip(*(side.tolist() for side in sums), strict=True))])


def policies(trained: ExitConfig, args: argparse.Namespace) -> Iterator[tuple[str, str, ExitPolicy]]:
    """(confidence, setting, policy) of every point, one threshold at all exits."""
    for name in args.confidences or trained.classifiers:
        confidence, _, proposer = name.partition(":")
        for mode in args.state_modes:
            for propose in args.propose if proposer else [None]:
                for threshold in args.thresholds:
                    scope = "all" if args.answers is None else "generated"
                    policy = policy_of_exits(
                        trained, proposer or confidence, threshold, state_mode=mode, exit_scope=scope
                    )
                    setting = f"{mode}, threshold {threshold}"
                    if proposer:
                        confirm = args.confirm or default_confirm(trained)
                        policy = replace(policy, confidence="cascade", propose=propose, confirm=confirm)
                        setting += f", propose {propose}"
                    elif confidence not in trained.classifiers:
                        policy = replace(policy, confidence=cast(ConfidenceName, confidence), classifier=None)
                    yield name, setting, policy


def exit_rates(layers: Any, exits: tuple[int, ...]) -> list[float]:
    """Share of the tokens that reach an exit and leave there."""
    return [float((layers == layer).sum() / max(1, (layers >= layer).sum())) for layer in exits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exits", type=Path, required=True, help="folder of trained exits")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="held-out text")
    source.add_argument("--answers", type=Path, help="samples file of the full model's run")
    parser.add_argument("--limit", type=int, default=200, help="answers, drawn at random")
    parser.add_argument("--read", type=float, help="what a read of the LM head costs; default: what it costs here")
    parser.add_argument("--confirm", choices=("fitted", "read_out"), help="of cascades; default: fitted, if there")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=100, help="that the tokens are of, at least")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--confidences", nargs="+", help="default: the kinds of the exits, beside random exits")
    parser.add_argument("--propose", type=float, nargs="+", default=[0.5], help="of cascades")
    parser.add_argument("--prune", type=int, nargs="*", default=[1, 2, 3, 4, 6])
    parser.add_argument("--state-modes", nargs="+", default=["recompute"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--continuations", type=int, default=0, help="rows to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()

    options = FrozenOptions(backbone=args.backbone, dataset=args.dataset or "", dtype=args.dtype, seq_len=args.seq_len)
    backbone = load_backbone(options)
    if args.answers is not None:
        rows, prompts = answers(args.answers, backbone.tokenizer, args.limit)
        document = list(range(len(rows)))
    else:
        documents = text_documents(options.source, backbone.tokenizer)
        text = held_out(documents, args.tokens, args.seq_len, args.documents, ("--tokens", "--documents"))
        rows, document, prompts = text.rows, text.document, [1] * len(text.rows)
    of_token = np.repeat(document, [len(row) - prompt for row, prompt in zip(rows, prompts, strict=True)])
    trained = ExitCheckpoint.open(args.exits)
    trained.check_fingerprint(backbone.identity.fingerprint)
    classifiers = trained.load(backbone.engine.backbone.device)
    exits, depth = trained.config.exit_layers, backbone.identity.num_layers
    engine = Engine(backbone.engine.backbone, classifiers)
    if args.read is not None:
        cost = engine.backbone.cost
        blocks = round(cost.mean_block_weights * depth)
        engine.backbone.cost = replace(cost, lm_head=round(args.read * blocks))
    full = run(engine, ExitPolicy(depth), rows, prompts, args.batch_size)
    continued = continue_rows(engine, ExitPolicy(depth), rows, args)
    num_bytes = sum(
        len(backbone.tokenizer.decode(row[prompt:]).encode()) for row, prompt in zip(rows, prompts, strict=True)
    )

    table: list[dict[str, Any]] = []

    def add(family: str, setting: str, measured: dict[str, Any], policy: ExitPolicy | None = None) -> None:
        agreement = measured["greedy"] == full["greedy"]
        point = {
            "family": family,
            "setting": setting,
            "compute_reduction": measured["compute_reduction"],
            "bits_per_byte": measured["bits"] / num_bytes,
            "agreement": float(agreement.mean()),
            "agreement_stderr": by_document(agreement, of_token),
            "mean_exit_layer": float(measured["layers"].mean()),
            "continuation_agreement": (
                common_share(continue_rows(engine, policy, rows, args), continued) if policy is not None else math.nan
            ),
        }
        table.append(point)
        print(
            f"| {family} | {setting} | {point['compute_reduction']:.3f} | {point['agreement']:.3f} ± "
            f"{math.nan if point['agreement_stderr'] is None else point['agreement_stderr']:.3f} | "
            f"{point['bits_per_byte']:.3f} | {point['mean_exit_layer']:.1f} | {point['continuation_agreement']:.3f} |",
            flush=True,
        )

    print(
        "| exits | setting | compute_reduction | agreement | bits per byte | mean exit layer | continuations |\n"
        + "| --- " * 7
        + "|"
    )
    add("full model", "", full)
    for name, setting, policy in policies(trained.config, args):
        learned = run(engine, policy, rows, prompts, args.batch_size)
        add(name, setting, learned, policy)
        if args.confidences is None:
            rates = exit_rates(learned["layers"], exits)
            drawn = replace(policy, classifier="calm", thresholds=tuple(map(threshold_for, rates)))
            add(f"random at the rate of {name}", setting, run_random(engine, drawn, rows, prompts, args))
    for count in args.prune:
        policy = ExitPolicy(depth, pruned_blocks=frozenset(range(depth - count, depth)), exit_scope="all")
        add("pruning", str(count), run(engine, policy, rows, prompts, args.batch_size), policy)
    about = {
        "benchmark": "exit_quality",
        "backbone": args.backbone,
        "exits": trained.fingerprint(),
        "dtype": args.dtype,
    }
    about |= {"tokens": len(full["greedy"]), "documents": len(set(document)), "bytes": num_bytes, "read": args.read}
    print(json.dumps(about | environment(str(engine.backbone.device)) | {"points": table}))


def run_random(
    engine: Engine, policy: ExitPolicy, rows: list[list[int]], prompts: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Random exits under the name of a stateless kind."""
    assert engine.classifiers is not None
    exits = {layer: RandomExit(layer) for layer in policy.exit_layers}
    # The same read-outs: only who leaves is left to chance.
    return run(forced(engine.backbone, exits, engine.classifiers), policy, rows, prompts, args.batch_size)


if __name__ == "__main__":
    main()
