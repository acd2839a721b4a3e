"""Does a threshold that follows the context keep more of the full model's tokens at equal compute than a fixed one?

    python benchmarks/adaptive_thresholds.py --dataset texts.jsonl.gz --backbone smollm2-gguf --classifier calm

Confidences and agreement of all exits are recorded in one pass over text, as by `dynamax-lm-eval exit-thresholds`.
The threshold of a token is t - g (s - mean of s), where s is a running mean over the document's earlier tokens: of the
confidence at the first exit, or of 1 - the normalised entropy of the full model's distribution. The gain g is chosen on
half of the documents, for each reduction, and so is the signal; agreement is measured on the other half. g = 0 is the
fixed threshold. What is shifted is one threshold for all exits, or thresholds per exit. Standard errors are of the
difference, over documents. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import numpy as np
import torch
from environment import environment
from tabulate import tabulate

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.exits import lookup
from dynamax_lm_eval.exits.confidences.entropy import entropy_confidence
from dynamax_lm_eval.exits.resolve import policy_of_exits
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.measure.exit_thresholds import PRICES, REDUCTIONS, SHARED, record
from dynamax_lm_eval.measure.threshold_search import Recorded, agreement_at, best_path, exits_at

GAINS = (-0.6, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6)
DECAYS = (0.5, 0.8, 0.95)
DRAWS = 30


def running(values: np.ndarray, row: np.ndarray, decay: float) -> np.ndarray:
    """Returns the exponential mean over the earlier tokens of each document; one begins at the mean of all."""
    means, mean = np.empty_like(values), values.mean()
    last, state = -1, mean
    for i, (value, text) in enumerate(zip(values, row, strict=True)):
        if text != last:
            last, state = text, mean
        means[i] = state
        state = decay * state + (1 - decay) * value
    return means


def curve(
    recorded: Recorded, signal: np.ndarray, gain: float, weights: np.ndarray, base: np.ndarray
) -> list[tuple[float, float]]:
    """Returns (agreement, fraction) for thresholds (C, E) that the signal shifts, documents weighted."""
    points = []
    shift = gain * (signal - signal.mean())
    of_token = weights[recorded.document]
    total = of_token.sum()
    for thresholds in base:
        bounds = np.where(thresholds[:, None] < 1, np.clip(thresholds[:, None] - shift, 0.0, 0.999), 1.0)
        left = exits_at(recorded, bounds)
        right = recorded.agrees[left, np.arange(len(left))]
        points.append(
            (float((of_token * right).sum() / total), float((of_token * recorded.cost_of(left, bounds)).sum() / total))
        )
    return points


def entropies(frozen: FrozenPass, rows: list[list[int]]) -> np.ndarray:
    """Returns 1 - normalised entropy of the full model after every token but each row's first."""
    confidences = []
    with torch.no_grad():
        for row in rows:
            last = frozen.run([row]).last
            confidences.append(entropy_confidence(frozen.backbone.readout(last))[1:].cpu().numpy())
    return np.concatenate(confidences).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--classifier", default="calm")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=100, help="that the tokens are of, at least")
    parser.add_argument("--seq_len", type=int, default=256)
    args = parser.parse_args()

    reading = FrozenOptions(backbone=args.backbone, dataset=args.dataset, dtype="float32", seq_len=args.seq_len)
    loaded = load_backbone(reading)
    exits = lookup.find(args.backbone, loaded.identity.fingerprint)
    assert exits is not None, "the backbone has exits"
    text = held_out(text_documents(reading.source, loaded.tokenizer), args.tokens, args.seq_len, args.documents)
    backbone = loaded.engine.backbone
    frozen = FrozenPass(backbone, exits.config.exit_layers, exits.config.final_block, exits.config.top_k)
    policy = policy_of_exits(exits.config, args.classifier, 0.5, exit_scope="all")
    recorded = record(frozen, Engine(backbone, exits.load()), text, policy)

    sources = {"confidence": recorded.confidence[0], "entropy": entropies(frozen, text.rows)}
    texts = int(recorded.document.max()) + 1
    searched = np.arange(texts) % 2 == 0
    halves = searched.astype(float), (~searched).astype(float)
    bases = {
        "shared": np.repeat(np.asarray(SHARED)[:, None], len(recorded.confidence), 1),
        "per exit": np.asarray(best_path(recorded.of_documents(searched), PRICES)),
    }
    draws = np.random.default_rng(0).multinomial(texts, np.full(texts, 1 / texts), size=DRAWS)
    table: list[dict[str, Any]] = []
    for which, base in bases.items():
        by_reduction: dict[float, list[dict[str, Any]]] = {reduction: [] for reduction in REDUCTIONS}
        for name, decay in product(sources, DECAYS):
            signal = running(sources[name], recorded.document, decay)
            tried, held = ({g: curve(recorded, signal, g, half, base) for g in GAINS} for half in halves)
            for reduction in REDUCTIONS:
                at = {gain: agreement_at(points, 1 / reduction) for gain, points in tried.items()}
                best = max(at, key=lambda gain, at=at: -1 if np.isnan(at[gain]) else at[gain])
                fixed, ours = (agreement_at(held[gain], 1 / reduction) for gain in (0.0, best))
                setting = {"base": which, "reduction": reduction, "signal": name, "decay": decay, "gain": best}
                values = {"fixed": fixed, "adaptive": ours, "difference": ours - fixed}
                by_reduction[reduction].append({**setting, "searched": at[best] - at[0.0], **values})
        for reduction, lines in by_reduction.items():
            # The signal is chosen on the searched texts as well.
            entry = max(lines, key=lambda line: -1 if np.isnan(line["searched"]) else line["searched"])
            signal = running(sources[entry["signal"]], recorded.document, entry["decay"])
            differences = []
            for weights in draws:
                both = (
                    agreement_at(curve(recorded, signal, gain, weights * halves[1], base), 1 / reduction)
                    for gain in (0.0, entry["gain"])
                )
                differences.append(float(np.diff(list(both))[0]))
            table.append({**entry, "stderr": float(np.nanstd(differences, ddof=1))})
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".4f"))
    print(
        json.dumps(
            {
                "benchmark": "adaptive_thresholds",
                **vars(args),
                "documents": text.documents,
                "results": table,
                **environment("cpu"),
            }
        )
    )


if __name__ == "__main__":
    main()
