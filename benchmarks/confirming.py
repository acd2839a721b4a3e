"""How well an exit can be known to be right: by a classifier, by its read-out, by both; and what that is worth.

    python benchmarks/confirming.py --answers samples_task.jsonl --backbone smollm2-gguf
    python benchmarks/confirming.py --dataset held_out.jsonl.gz --backbone tiny-llama

--answers names a samples file of the full model's run (lm_eval --log_samples): every token of an answer but the first
is one decision at each exit, with the full model's states. With --dataset every token of a text but a row's first is
one. Half of the documents fit what is fitted and choose thresholds, per exit or one for all; agreement with the full
model at equal compute_reduction, and AUROC, are measured on the other half. A read of the LM head that gives no token
is charged at what it costs this model and, beside that, at another share of its blocks (--read; by default that of
Mistral 7B, where it costs 0.6 of 32 blocks).

Rules: classifiers; one after a slope and a bias per exit that are fitted to these documents; the probability of the
read-out's best token, read at every exit; a logistic regression of both and of the two best tokens' margin, which
reads at every exit; and cascades, where a classifier proposes and one of these two confirms. Prints Markdown tables;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from answers import answers
from environment import environment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.measure.exit_thresholds import (
    best_cascade,
    cascade_of,
    compared,
    exit_costs,
    refusal_costs,
    searched_half,
)
from dynamax_lm_eval.measure.threshold_search import Recorded

PROPOSALS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_EDGE = 1e-6


def logit(probability: Any) -> Any:
    clipped = np.clip(probability, _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def fitted(features: Any, right: Any, fit: Any) -> Any:
    """Returns the probability (E, N) of "right" at each exit, of features (F, E, N), by a regression on some tokens."""
    made = []
    for at_exit, labels in zip(np.moveaxis(features, 1, 0), right, strict=True):  # (F, N), (N,)
        mean, spread = at_exit[:, fit].mean(1), at_exit[:, fit].std(1) + _EDGE
        scaled = ((at_exit.T - mean) / spread)[:, :]
        model = LogisticRegression(C=10.0, max_iter=1000).fit(scaled[fit], labels[fit])
        made.append(model.predict_proba(scaled)[:, 1])
    return np.stack(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--answers", type=Path, help="samples file of the full model's run")
    source.add_argument("--dataset", help="held-out text")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--exits", type=Path, help="default: those of the package")
    parser.add_argument("--classifier", default="calm", help="that proposes")
    parser.add_argument("--read", type=float, default=0.6 / 32, help="share of all blocks that a read costs")
    parser.add_argument("--tokens", type=int, default=25_600, help="of text")
    parser.add_argument("--documents", type=int, default=100, help="of text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of the halves")
    args = parser.parse_args()
    options = FrozenOptions(backbone=args.backbone, dataset=args.dataset or "", dtype="float32", seq_len=args.seq_len)
    loaded = load_backbone(options)
    trained = (
        ExitCheckpoint.open(args.exits)
        if args.exits is not None
        else lookup.find(args.backbone, loaded.identity.fingerprint)
    )
    assert trained is not None, "there are exits"
    if args.answers is not None:
        rows, prompts = answers(args.answers, loaded.tokenizer)
        documents = np.arange(len(rows))
    else:
        text = held_out(text_documents(options.source, loaded.tokenizer), args.tokens, args.seq_len, args.documents)
        rows, prompts, documents = text.rows, [1] * len(text.rows), np.asarray(text.document)
    config, backbone = trained.config, loaded.engine.backbone
    exits = trained.load(backbone.device)
    frozen = FrozenPass(backbone, config.exit_layers, config.final_block, 1)
    seen = observe(frozen, exits, rows, 2048, two_best=True)
    assert seen.two_best is not None
    places = np.concatenate([np.arange(len(row)) for row in rows])
    # The last token of an answer is read out, too, but what follows it is not in the file.
    decides = places >= np.repeat(prompts, seen.lengths)
    engine, length = Engine(backbone, exits), int(np.median(seen.lengths))
    document = np.unique(documents[seen.row[decides]], return_inverse=True)[1]
    agrees = seen.agrees_or_stays[:, decides].astype(np.float64)
    right, (first, second) = agrees[:-1], seen.two_best[:, :, decides]

    def base(kind: str) -> Recorded:
        policy = policy_of_exits(config, kind, 0.5, state_mode="learned" if config.states else "recompute")
        cost, evaluation = exit_costs(engine, replace(policy, exit_scope="all"), length)
        return Recorded(seen.confidences[kind][:, decides], agrees, cost, evaluation, document)

    classifier = base(args.classifier)
    half = searched_half(classifier, args.seed)
    fit = half[document]
    free = replace(classifier, evaluation=np.zeros_like(classifier.evaluation))
    surest = logit(first)
    own = [logit(classifier.confidence), surest, first - second]
    both = fitted(np.stack(own), right, fit)
    scaled = fitted(np.stack(own[:1]), right, fit)
    policy = policy_of_exits(config, args.classifier, 0.5, exit_scope="all")
    prices = {
        "its own": refusal_costs(engine, policy, length),
        f"{args.read:.3f} of all blocks": np.full(len(right), args.read),
    }
    print(f"{int(decides.sum())} tokens of {document.max() + 1} documents, half of them measured on\n")
    print("| confidence | AUROC at exits " + ", ".join(map(str, config.exit_layers)) + " |\n| --- | --- |")
    scores = {
        **{kind: seen.confidences[kind][:, decides] for kind in config.classifiers},
        "read-out": first,
        f"{args.classifier} and read-out": both,
    }
    aurocs = {
        name: [float(roc_auc_score(labels[~fit], score[~fit])) for labels, score in zip(right, values, strict=True)]
        for name, values in scores.items()
    }
    for name, values in aurocs.items():
        print(f"| {name} | {', '.join(f'{value:.3f}' for value in values)} |")
    print("\n| a read costs | rule | thresholds | " + " | ".join(f"{r:g}" for r in (1.05, 1.1, 1.15, 1.2, 1.3)) + " |")
    print("| --- " * 8 + "|")
    table = []
    for price, reads in prices.items():
        everywhere = np.ones_like(first) * reads[:, None]
        rules: dict[str, Recorded | dict[float, Recorded]] = {}
        if price == "its own":
            rules |= {kind: base(kind) for kind in config.classifiers}
            rules[f"{args.classifier}, slope and bias"] = replace(classifier, confidence=scaled)
        rules["read-out"] = replace(free, confidence=first, refused=everywhere)
        rules[f"cascade of {args.classifier}"] = {p: cascade_of(classifier, first, reads, p) for p in PROPOSALS}
        by_both = {p: cascade_of(classifier, both, reads, p) for p in PROPOSALS}
        rules[f"cascade of {args.classifier}, confirmed by both"] = by_both
        rules[f"{args.classifier} and read-out"] = replace(classifier, confidence=both, refused=everywhere)
        for name, recorded in rules.items():
            if isinstance(recorded, dict):
                found = best_cascade(recorded, args.seed)
                name = f"{name}, propose {found['propose']:g}"
            else:
                found = compared(recorded, args.seed)
            for kind in ("per_exit", "shared"):
                reached = {gain["compute_reduction"]: gain[kind] for gain in found["gains"]}
                cells = [f"{reached[r]:.3f}" if r in reached else "-" for r in (1.05, 1.1, 1.15, 1.2, 1.3)]
                print(f"| {price} | {name} | {kind.replace('_', ' ')} | {' | '.join(cells)} |", flush=True)
                table.append({"read": price, "rule": name, "thresholds": kind, "agreement": reached})
    about = {"benchmark": "confirming", "backbone": args.backbone, "exits": trained.fingerprint(), "auroc": aurocs}
    about |= {"tokens": int(decides.sum()), "documents": int(document.max() + 1), "rules": table}
    print(json.dumps(about | environment(str(backbone.device))))


if __name__ == "__main__":
    main()
