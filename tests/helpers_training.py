"""A small training: rows, options, and a trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from helpers import random_ids, tiny_model
from helpers_engine import EXITS
from reference import RECURRENT

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.training import command
from dynamax_lm_eval.training.batches import MicroBatches
from dynamax_lm_eval.training.options import RunOptions, TrainingOptions
from dynamax_lm_eval.training.trainer import Trainer

ROWS = [random_ids(length, 90 + i) for i, length in enumerate((9, 4, 11))]
STEPS = 6


def frozen(family: str = "llama", top_k: int = 1, final_block: bool = False) -> FrozenPass:
    return FrozenPass(make_backbone(tiny_model(family), max_length=256), EXITS, final_block, top_k)


def training_options(backbone: Path, texts: Path, **changes: Any) -> TrainingOptions:
    settings: dict[str, Any] = {
        "classifier": "calm,mamba",
        "max_tokens": STEPS * 128,
        "seq_len": 32,
        "batch_tokens": 128,
        "micro_batch_tokens": 64,
        "label_share": 0.5,
        "eval_tokens": 200,
        "calibrate_tokens": 128,
        "mamba_state": 4,
        "exit_layers": "2+3+4",
        "dtype": "float32",
        "learning_rate": 1e-2,
        **changes,
    }
    if not any(kind in settings["classifier"] for kind in RECURRENT):
        del settings["mamba_state"]
    if not settings.get("calibrate", True):
        del settings["calibrate_tokens"]
    return TrainingOptions(backbone=str(backbone), dataset=str(texts), **settings)


def train(backbone: Path, texts: Path, output: Path, resume: bool = False, **changes: Any) -> ExitCheckpoint:
    run = RunOptions(output=str(output), resume=resume, device="cpu", save_steps=2, log_steps=1)
    saved = command.train(training_options(backbone, texts, **changes), run)
    assert saved is not None
    return saved


def make_trainer(kinds: tuple[str, ...], **changes: Any) -> tuple[Trainer, Any]:
    options = training_options(Path("x"), Path("x"), classifier=",".join(kinds), clip=0.01, **changes)
    classifiers = ExitClassifiers(
        options.kinds, EXITS, 32, "silu", options.classifier_options, options.seed, options.adapter
    )

    def documents(epoch: int, first: int) -> Any:
        return itertools.islice((random_ids(40, i) for i in itertools.count()), first, None)

    return Trainer(frozen(), classifiers, options), MicroBatches(documents, 64, 32)
