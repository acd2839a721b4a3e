"""Gives trained exits confirmers, for confidence=cascade, and changes nothing else of them.

    python examples/add_confirmers.py --backbone smollm2-gguf --exits EXITS --dataset BOOKS --held-out OTHER_BOOKS

`dynamax-lm-eval train` fits confirmers where it calibrates; this is for exits that were trained before it did, or for
other text. EXITS, a folder, is written over: its weights, its configuration, and in evaluation.json and README.md what
confirmers know on the held-out text.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from dynamax_lm_eval.exits.checkpoint import CARD_NAME, ExitCheckpoint, save
from dynamax_lm_eval.files import write_text
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.observe import observe
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.text import held_out, text_documents
from dynamax_lm_eval.training import confirming
from dynamax_lm_eval.training.card import confirmers

SEQ_LEN = 256
_AT_ONCE = 2048
_BEFORE = "What a threshold does to"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--exits", type=Path, required=True, help="folder of trained exits")
    parser.add_argument("--dataset", required=True, help="text to fit to")
    parser.add_argument("--held-out", required=True, help="text for AUROC")
    parser.add_argument("--tokens", type=int, default=40_000, help="of each")
    parser.add_argument("--documents", type=int, default=150, help="that these are of, at least")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    trained = ExitCheckpoint.open(args.exits)
    options = FrozenOptions(backbone=args.backbone, dataset=args.dataset, dtype=args.dtype, seq_len=SEQ_LEN)
    loaded = load_backbone(options)
    trained.check_fingerprint(loaded.identity.fingerprint, former=loaded.former)
    config = replace(trained.config, confirms=True)
    config.check()
    exits = config.build().requires_grad_(False).eval()
    exits.load_state_dict({**exits.state_dict(), **trained.load().state_dict()})
    stored = torch.bfloat16 if all(_is_narrow(tensor) for tensor in exits.state_dict().values()) else torch.float32
    exits.to(loaded.engine.backbone.device)
    frozen = FrozenPass(
        loaded.engine.backbone,
        config.exit_layers,
        config.final_block,
        config.top_k,
        config.label,
        config.label_final_block,
    )
    sources = [options.source, replace(options, dataset=args.held_out).source]
    fit, test = (
        held_out(text_documents(source, loaded.tokenizer), args.tokens, SEQ_LEN, args.documents) for source in sources
    )
    seen = observe(frozen, exits, fit.rows, _AT_ONCE, two_best=True)
    assert seen.two_best is not None
    tokens = seen.may_exit
    for i, layer in enumerate(config.exit_layers):
        two_best = torch.from_numpy(seen.two_best[:, i, tokens].T.copy())
        for kind in exits.kinds:
            log_odds = torch.from_numpy(seen.confidences[kind][i, tokens]).logit()
            confirming.fit_confirmer(exits.confirmer(kind, layer), log_odds, two_best, seen.within_k[i, tokens])
    for parameter in exits.parameters():
        parameter.copy_(parameter.to(stored))
    measured = confirming.report(observe(frozen, exits, test.rows, _AT_ONCE, two_best=True), exits)
    count = sum(len(row) for row in test.rows)
    lines = "\n".join(confirmers(config, measured, f"{count:,} tokens of {test.documents} held-out documents"))
    evaluation = json.loads((args.exits / "evaluation.json").read_text(encoding="utf-8")) | {"confirmers": measured}
    card = (args.exits / CARD_NAME).read_text(encoding="utf-8")
    if _BEFORE in card:
        before, after = card.split(_BEFORE, 1)
        before = before.split("\nWith `confidence=cascade`", 1)[0].rstrip("\n") + "\n"
        card = f"{before}{lines}\n\n{_BEFORE}{after}"
    else:
        card = f"{card.rstrip()}\n{lines}\n"
    save(args.exits, config, exits, {"evaluation.json": json.dumps(evaluation, indent=1) + "\n"}, stored)
    write_text(args.exits / CARD_NAME, card)
    print(lines)


def _is_narrow(tensor: torch.Tensor) -> bool:
    """Returns whether nothing of a tensor is lost in bfloat16."""
    return bool((tensor == tensor.to(torch.bfloat16).float()).all())


if __name__ == "__main__":
    main()
