"""What must hold between the options of a training, and the values that a preset stands for."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import check_adapter
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS, ClassifierOptions
from dynamax_lm_eval.exits.state_maps import check_state_maps
from dynamax_lm_eval.frozen.options import HELD_OUT_SEED, TEMPLATES, check_at_least, check_dtype
from dynamax_lm_eval.training.optimizers import check_optimizer
from dynamax_lm_eval.training.options import SELF_DATASET, TrainingOptions
from dynamax_lm_eval.types import LabelKind

#: How the losses of exits are weighted.
EXIT_WEIGHTS = ("decreasing", "increasing", "equal")
#: ``--preset thesis``: how earlier public code of the paper's authors trains (docs/text_and_code.md). There each of 900
#: documents, of about 1,000 tokens, is a step; here a step is 1,024 tokens of as many documents.
PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {
        **{"classifier": "calm", "normalize": False, "final_block": True, "label_final_block": False},
        **{"label": "full_in_exit", "top_k": 15, "label_share": 1.0, "exit_weights": "increasing"},
        **{"optimizer": "schedulefree", "learning_rate": 2.5e-4, "weight_decay": 0.0, "warmup_share": 0.0},
        **{"template": "instruct", "max_documents": 1000, "max_tokens": 900 * 1024, "seq_len": 1024},
        **{"batch_tokens": 1024, "micro_batch_tokens": 1024, "calibrate": False},
    }
}


def check(options: TrainingOptions) -> None:
    """Raises UserError where an option cannot be honoured, or contradicts another."""
    _check_numbers(options)
    _check_text(options)
    _check_exits(options)
    _check_recipe(options)
    _check_lora(options)
    check_dtype(options.dtype)


def _check_numbers(options: TrainingOptions) -> None:
    counts = {"max_tokens": 1, "seq_len": 2, "batch_tokens": 2, "micro_batch_tokens": 2, "top_k": 1, "self_tokens": 1}
    counts |= {"shuffle_buffer": 0, "eval_tokens": 2, "curve_tokens": 3, "weight_decay": 0, "seed": 0}
    check_at_least(options, {**counts, "states_tokens": 1, "calibrate_tokens": 1, "eval_documents": 1})
    if options.max_documents is not None:
        check_at_least(options, {"max_documents": 1})
    for name in ("label_share", "learning_rate", "clip"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} must be above 0, got {getattr(options, name)}")
    if options.label_share > 1:
        raise UserError(f"--label_share must be at most 1, got {options.label_share}")
    if not 0 <= options.warmup_share < 1:
        raise UserError(f"--warmup_share must be in [0, 1), got {options.warmup_share}")
    if options.seq_len > options.micro_batch_tokens:
        raise UserError(
            f"--seq_len={options.seq_len} must be at most --micro_batch_tokens={options.micro_batch_tokens}, the "
            "tokens that go through the backbone at once; raise that, and --batch_tokens to a multiple of it"
        )
    if options.batch_tokens % options.micro_batch_tokens:
        raise UserError(
            f"--batch_tokens={options.batch_tokens} must be a multiple of "
            f"--micro_batch_tokens={options.micro_batch_tokens}; give both"
        )


def _check_text(options: TrainingOptions) -> None:
    if options.eval_source == dataclasses.replace(options.source, seed=HELD_OUT_SEED):
        raise UserError("--eval_dataset is the text that is trained on; leave it out to hold some of that text out")
    about = ("prompts_documents", "prompts_include_path", "prompts_metadata")
    if options.prompts is None and (given := [name for name in about if getattr(options, name) is not None]):
        raise UserError(f"--{given[0]} has no effect without --prompts; add it, or remove --{given[0]}")
    if options.prompts is not None and options.self_share == 0:
        raise UserError("--prompts has no effect without --dataset self or self:SHARE+TEXT; change --dataset")
    if not options.writes_answers and _is_given(options, "self_tokens"):
        raise UserError("--self_tokens has no effect without --prompts or a mixture self:SHARE+TEXT; remove it")
    if options.dataset == SELF_DATASET:
        if options.dataset_config is not None or options.dataset_split != "train":
            raise UserError(
                f"--dataset_config and --dataset_split have no effect with --dataset {SELF_DATASET}; remove them"
            )
        for name in ("template", "max_documents"):
            if _is_given(options, name):
                raise UserError(f"--{name} has no effect with --dataset {SELF_DATASET}; remove it")
    if options.eval_dataset is None and (options.eval_config is not None or options.eval_split != "train"):
        raise UserError("--eval_config and --eval_split have no effect without --eval_dataset; remove them")
    if not options.calibrate and _is_given(options, "calibrate_tokens"):
        raise UserError("--calibrate_tokens has no effect with --calibrate false; remove one of them")


def _check_exits(options: TrainingOptions) -> None:
    check_adapter(options.adapter)
    check_state_maps(options.states)
    if options.simulate_exits and options.final_block:
        raise UserError("--simulate_exits and --final_block exclude each other; give one")
    if options.states == "none" and _is_given(options, "states_tokens"):
        raise UserError("--states_tokens has no effect without --states; add it, or remove --states_tokens")
    if options.adapter != "none" and options.final_block:
        raise UserError("--adapter and --final_block exclude each other: both correct the read-out; give one")
    if not 0 <= options.adapter_first < 1 or (options.adapter_first and options.adapter == "none"):
        raise UserError(f"--adapter_first must be in [0, 1) and needs an --adapter, got {options.adapter_first}")
    kinds, sizes = options.kinds, dataclasses.asdict(options.classifier_options)
    for name, default in dataclasses.asdict(ClassifierOptions()).items():
        users = [kind for kind, classifier in CLASSIFIERS.items() if name in classifier.sizes]
        if users and sizes[name] != default and not set(users).intersection(kinds):
            raise UserError(
                f"--{name} has no effect on --classifier {options.classifier}; add {' or '.join(users)}, or remove it"
            )


def _is_given(options: TrainingOptions, name: str) -> bool:
    """Returns whether an option is not at its default."""
    return bool(getattr(options, name) != type(options).__dataclass_fields__[name].default)


def _check_recipe(options: TrainingOptions) -> None:
    """Labels, weights of exits, and the optimiser."""
    for name, choices in {"label": get_args(LabelKind), "exit_weights": EXIT_WEIGHTS, "template": TEMPLATES}.items():
        if getattr(options, name) not in choices:
            raise UserError(f"--{name} must be one of {', '.join(choices)}, got {getattr(options, name)!r}")
    check_optimizer(options.optimizer)
    if not options.label_final_block and not options.final_block:
        raise UserError("--label_final_block false has no effect without --final_block; add it, or leave it out")
    if options.optimizer == "schedulefree" and options.adapter_first:
        raise UserError("--optimizer schedulefree and --adapter_first exclude each other; give one")


def _check_lora(options: TrainingOptions) -> None:
    about = ("lora_tokens", "lora_learning_rate", "lora_keep")
    if options.lora is None:
        if given := [name for name in about if _is_given(options, name)]:
            raise UserError(f"--{given[0]} has no effect without --lora; add it, or remove --{given[0]}")
        return
    check_at_least(options, {"lora": 1, "lora_tokens": 1, "lora_keep": 0})
    if not options.lora_learning_rate > 0:
        raise UserError(f"--lora_learning_rate must be above 0, got {options.lora_learning_rate}")
    if options.final_block:
        raise UserError(
            "--lora and --final_block exclude each other: LoRA is trained for the exits' own read-outs; give one"
        )
    if options.dataset == SELF_DATASET and options.prompts is None:
        raise UserError(
            "--lora cannot be trained on text that its backbone goes on writing; give --dataset self:SHARE+TEXT, "
            "--prompts or a text"
        )
