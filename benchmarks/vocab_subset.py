"""Confidences made of a part of the vocabulary against those of all of it and trained ones, on held-out text.

    python benchmarks/vocab_subset.py --dataset held_out.jsonl.gz --backbone smollm2-gguf

The first half of each row is its prompt, and every token of the second is one decision at each exit, with the full
model's states (one pass through the text reads all logits; parts are picked from these). Exits are those of the
backbone in the package or in --exits, with their adapters. An exit is right where its best token is that of the full
model. Agreement at a compute_reduction: thresholds are searched, everything that exits cause is counted. Prints
Markdown tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from sklearn.metrics import roc_auc_score

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.compute.trace import Trace
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import exit_probability
from dynamax_lm_eval.exits.confidences.entropy import entropy_confidence
from dynamax_lm_eval.exits.confidences.softmax import softmax_margin
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.exits.vocabulary import row_vocabulary
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import held_out, text_documents

SCORES = {"softmax": softmax_margin, "entropy": entropy_confidence}
REDUCTIONS = (0.8, 1.0, 1.04, 1.06, 1.08, 1.1, 1.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="held-out text")
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--exits", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=4_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    args = parser.parse_args()
    options = FrozenOptions(backbone=args.backbone, dataset=args.dataset, dtype="float32", seq_len=args.seq_len)
    loaded = load_backbone(options)
    rows, *_ = held_out(text_documents(options.source, loaded.tokenizer), args.tokens, args.seq_len)
    rows = [row for row in rows if len(row) >= args.seq_len // 2 + 2]
    trained = (
        ExitCheckpoint.open(args.exits)
        if args.exits is not None
        else lookup.find(args.backbone, loaded.identity.fingerprint)
    )
    assert trained is not None, "there are exits"
    exits = trained.load()
    engine, layers = Engine(loaded.engine.backbone, exits), trained.config.exit_layers
    backbone, prompt_length = engine.backbone, args.seq_len // 2
    policy = ExitPolicy(
        backbone.num_layers, layers, (0.5,) * len(layers), confidence="softmax", adapter=trained.config.adapter
    )
    sizes: list[tuple[int | None, bool]] = [(None, True)]  # and whether the prompt counts
    sizes += [(size, with_prompt) for size in args.sizes for with_prompt in (True, False)]
    seen: dict[Any, list[Any]] = {}  # (confidence, size, with prompt), "right" or "inside" -> of each row
    frozen, lengths = FrozenPass(backbone, layers, False, 1), []
    for row in rows:
        batch = frozen.run([row])
        at = torch.arange(prompt_length, len(row))
        lengths.append(len(row))
        best = backbone.readout(batch.last[at]).argmax(-1)
        parts = {
            (size, prompt): torch.from_numpy(row_vocabulary(row[:prompt_length] if prompt else [0], size).ids)
            for size, prompt in sizes
            if size is not None
        }
        columns: dict[Any, list[Any]] = {}
        for layer in layers:
            adapter = exits.adapter(layer)
            hidden = batch.reads[layer][at]
            logits = backbone.readout(hidden if adapter is None else adapter(hidden))
            columns.setdefault("right", []).append((logits.argmax(-1) == best).numpy())
            for kind in exits.kinds:
                classified = batch.classified(exits.at(kind, layer), layer, at)
                columns.setdefault((kind, None, True), []).append(exit_probability(classified).numpy())
            for key in sizes:
                shown = logits if key[0] is None else logits[:, parts[key]]
                for name, score in SCORES.items():
                    columns.setdefault((name, *key), []).append(score(shown).numpy())
                if key[0] is not None:
                    inside = torch.isin(logits.argmax(-1), parts[key]).numpy()
                    columns.setdefault(("inside", *key), []).append(inside)
        for name, values in columns.items():
            seen.setdefault(name, []).append(np.stack(values))
    found = {name: np.concatenate(values, axis=1) for name, values in seen.items()}
    right = found["right"]
    unit = backbone.cost.mean_block_weights
    print(f"{right.shape[1]} tokens, exits after {layers}, adapter {trained.config.adapter}\n")
    print("| confidence | tokens looked at | best token among them | one evaluation, in blocks | AUROC at each exit |")
    print("| --- " * 5 + "|")
    table = []
    for name, size, with_prompt in [key for key in found if isinstance(key, tuple) and key[0] != "inside"]:
        looked = "all" if size is None else f"{size}, {'with' if with_prompt else 'without'} the prompt"
        inside = float(found["inside", size, with_prompt].mean()) if size is not None else 1.0
        auroc = [float(roc_auc_score(r, c)) for r, c in zip(right, found[name, size, with_prompt], strict=True)]
        cost = backbone.hidden_size * (size or backbone.vocab_size) / unit
        used = replace(policy, confidence=name, vocab_subset=size) if name in SCORES else policy
        if name not in SCORES:
            looked, cost = "-", exits.at(name, layers[0]).macs / unit
            used = policy_of_exits(trained.config, name, 0.5)
        print(f"| `{name}` | {looked} | {inside:.3f} | {cost:.2f} | {' '.join(f'{value:.3f}' for value in auroc)} |")
        table.append((name, looked, curve(engine, used, found[name, size, with_prompt], right, lengths, prompt_length)))
    reached_by: list[tuple[str, str, list[float]]] = []
    print("\n| confidence | tokens looked at | " + " | ".join(map(str, REDUCTIONS)) + " | largest |")
    print("| --- " * (3 + len(REDUCTIONS)) + "|")
    for name, looked, points in table:
        best = [max(agreement for reduction, agreement in points if reduction >= wanted) for wanted in REDUCTIONS]
        reached_by.append((name, looked, best))
        cells = [f"{value:.3f}" for value in best]
        print(f"| `{name}` | {looked} | {' | '.join(cells)} | {max(reduction for reduction, _ in points):.2f} |")
    about = {
        "benchmark": "vocab_subset",
        "backbone": args.backbone,
        "exits": trained.fingerprint(),
        "agreement": reached_by,
    }
    print(json.dumps(about | environment(str(backbone.device))))


def curve(
    engine: Engine, policy: ExitPolicy, confidences: Any, right: Any, lengths: list[int], prompt_length: int
) -> list[tuple[float, float]]:
    """(compute_reduction, agreement) by threshold, of tokens that leave at the first exit that is sure enough."""
    points = []
    for threshold in np.quantile(confidences, np.linspace(0, 1, 101)):
        leaves = np.vstack([confidences >= threshold, np.ones(confidences.shape[1], dtype=bool)])
        first = leaves.argmax(0)
        agrees = np.vstack([right, np.ones(right.shape[1], dtype=bool)])[first, np.arange(len(first))]
        left_at = np.asarray([*policy.exit_layers, policy.num_layers])[first]
        records, start = [], 0
        for length in lengths:
            count = length - prompt_length
            trace = Trace(prompt_length, length, count + 1, tuple(left_at[start : start + count].tolist()), True)
            records.append(engine.account(trace, policy))
            start += count
        points.append((ComputeRecord.sum(records).compute_reduction, float(agrees.mean())))
    return points


if __name__ == "__main__":
    main()
