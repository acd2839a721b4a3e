"""Training throughput as a share of its limit: the frozen forward plus one LM-head read per exit.

    python benchmarks/training.py --dataset texts.jsonl.gz --backbone smollm2-gguf

Both read the LM head at the same positions. Steps of training and of the limit alternate, on the same micro-batches;
medians are compared. The last line is JSON with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from environment import environment

from dynamax_lm_eval.backbones.base import LOGITS_AT_ONCE
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import text_documents
from dynamax_lm_eval.training.batches import MicroBatches
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions
from dynamax_lm_eval.training.trainer import Trainer, labelled_positions


@torch.no_grad()
def limit(frozen: FrozenPass, rows: list[list[int]], count: int) -> None:
    """What no training can do without."""
    batch = frozen.run(rows)
    positions = labelled_positions(0, 0, batch.rows.num_tokens, count).to(frozen.backbone.device)
    at_once = max(1, LOGITS_AT_ONCE // frozen.backbone.vocab_size)
    for layer in frozen.exit_layers:
        for part in positions.split(at_once):
            frozen.backbone.readout(batch.reads[layer][part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--backbone", default="smollm2-gguf")
    parser.add_argument("--classifier", default="calm,ffn,mamba")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    options = TrainingOptions(
        backbone=args.backbone,
        dataset=args.dataset,
        classifier=args.classifier,
        batch_tokens=args.tokens,
        micro_batch_tokens=args.tokens,
        seq_len=args.seq_len,
    )
    backbone = load_backbone(options.reading(RunOptions(device=args.device)))
    layers = options.resolve_exit_layers(backbone.identity.num_layers)
    frozen = FrozenPass(backbone.engine.backbone, layers, options.final_block, options.top_k)
    classifiers = ExitClassifiers(
        options.kinds, layers, backbone.identity.hidden_size, backbone.activation, options.classifier_options
    ).to(frozen.backbone.device)
    trainer = Trainer(frozen, classifiers, options)
    documents = text_documents(options.source, backbone.tokenizer)
    batches = MicroBatches(documents, args.tokens, options.seq_len)
    seconds: dict[str, list[float]] = {"limit": [], "training": []}
    for repeat in range(args.repeats + 1):
        rows = next(batches)
        for name in sorted(seconds, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            if name == "limit":
                limit(frozen, rows, options.labels_per_micro_batch)
            else:
                trainer.step(repeat, iter([rows]))  # type: ignore[arg-type]
            if frozen.backbone.device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            if repeat:  # the first round warms up
                seconds[name].append(taken)
                print(f"{name}: {taken:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    setting = {
        "benchmark": "training",
        "backbone": args.backbone,
        "classifier": list(options.kinds),
        "tokens_per_step": args.tokens,
        "label_share": options.label_share,
        "backbone_dtype": backbone.dtype,
        "median_seconds": medians,
        "spread_seconds": {name: [min(values), max(values)] for name, values in seconds.items()},
        "tokens_per_second": args.tokens / medians["training"],
        "share_of_limit": medians["limit"] / medians["training"],
    }
    print(json.dumps(setting | environment(str(frozen.backbone.device))))


if __name__ == "__main__":
    main()
