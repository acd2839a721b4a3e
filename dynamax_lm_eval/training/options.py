"""The options of ``dynamax-lm-eval train``: names, defaults, help texts, and what must hold between them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from dynamax_lm_eval import values
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.frozen.options import (
    DOCUMENTS_HELP,
    HELD_OUT_SEED,
    FrozenOptions,
    TextSource,
    check_at_least,
    check_device,
    frozen_option,
    option,
)
from dynamax_lm_eval.types import ClassifierKind

#: ``--dataset self``: text that the backbone itself generates.
SELF_DATASET = "self"
#: What may be named as ``--classifier``.
_KINDS = ", ".join(get_args(ClassifierKind))
SAVE_DTYPES = ("float32", "bfloat16")


#: ``self:SHARE+TEXT``.
_MIXTURE = re.compile(rf"{SELF_DATASET}:([^+]*)\+(.+)", re.DOTALL)


def mixture(dataset: str) -> tuple[float, str]:
    """Returns the share that the backbone generates, and where the rest is read.

    Raises:
        UserError: the share is none.
    """
    found = _MIXTURE.fullmatch(dataset)
    if found is None:
        return 0.0, dataset
    share = values.number(0, 1, above=True)("--dataset: the share of self", found[1])
    if share == 1:
        raise UserError(f"--dataset {dataset}: nothing is left for {found[2]!r}; give --dataset {SELF_DATASET}")
    return share, found[2]


def _size(name: str) -> Any:
    """Returns the option for a size of the classifiers."""
    size = ClassifierOptions.__dataclass_fields__[name]
    return option(size.default, size.metadata["help"])


@dataclass(frozen=True)
class RunOptions:
    """How to run a training; none of these changes what is trained."""

    output: str | None = option(None, "folder for the exits; default: where evaluations look for them")
    resume: bool = option(False, "resume from the last checkpoint in the output folder")
    overwrite: bool = option(False, "overwrite existing exits or training state")
    device: str = frozen_option("device")
    revision: str | None = frozen_option("revision")
    trust_remote_code: bool = frozen_option("trust_remote_code")
    save_steps: int = option(200, "optimiser steps between saved states")
    log_steps: int = option(40, "optimiser steps between lines of training.jsonl")
    report_to: str = option("none", "trackers, separated by commas: wandb, trackio, tensorboard, ... (accelerate's)")
    save_dtype: str = option(
        "float32",
        "data type of the saved exits: float32 or bfloat16 (half the size), which the held-out numbers are of",
    )
    card_note: str | None = option(None, "a line for the model card, such as a credit for the text")
    card_license: str | None = option(
        None, "licence of the exits for the model card, as the Hub writes it (apache-2.0)"
    )
    push_to_hub: str | None = option(None, "Hub repository (user/name) to upload the finished exits to")
    private: bool = option(False, "make that repository private if it does not exist yet")

    def __post_init__(self) -> None:
        check_at_least(self, {"save_steps": 1, "log_steps": 1})
        check_device(self.device)
        if self.save_dtype not in SAVE_DTYPES:
            raise UserError(f"--save_dtype must be one of {', '.join(SAVE_DTYPES)}, got {self.save_dtype!r}")
        if self.private and self.push_to_hub is None:
            raise UserError("--private has no effect without --push_to_hub; remove it")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one")


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides what is trained; the same options give the same exits."""

    backbone: str = frozen_option(
        "backbone", "alias (smollm2-gguf, mistral, ...), Hub id, or folder of the frozen model"
    )
    preset: str | None = option(
        None,
        "thesis: trains as earlier public code of the paper's authors does (docs/text_and_code.md); decides what is "
        "left at its default",
    )
    classifier: str = option("calm,mamba,ffn", f"kinds to train in one pass, separated by commas: {_KINDS}")
    dataset: str = frozen_option(
        "dataset",
        "text to train on: a Hub id (streamed), a .txt, .jsonl(.gz) or .parquet file, a folder or pattern of such "
        "files, 'self' for text that the backbone generates, or a mixture, self:0.5+TEXT, half of whose tokens it does",
    )
    dataset_config: str | None = frozen_option("dataset_config")
    dataset_split: str = frozen_option("dataset_split")
    text_column: str = frozen_option("text_column")
    shuffle_buffer: int = option(
        TextSource.shuffle_buffer, "documents among which the next one is drawn; 0 keeps their order"
    )
    max_documents: int | None = option(
        None, "read the first documents of the text alone, over and over until max_tokens; default: all"
    )
    template: str = frozen_option("template")
    prompts: str | None = option(
        None,
        "tasks of the harness, separated by commas: what the backbone generates are its greedy answers to their "
        "training documents, in the task's own form",
    )
    prompts_documents: str | None = option(
        None,
        "first:last documents that a task is evaluated on, in place of training documents where it has none; evaluate "
        "on others: result files count the documents that exits were trained on",
    )
    prompts_include_path: str | None = option(None, "folder with tasks of your own, for --prompts")
    prompts_metadata: str | None = option(
        None, "JSON, or name=value pairs separated by commas, for tasks of --prompts that take some"
    )
    self_tokens: int = option(100_000, "tokens that the backbone generates for a mixture or for --prompts")
    seed: int = option(0, "random seed for initial weights, the order of documents and the labelled positions")

    exit_layers: str | None = option(
        None,
        "block counts (from 1) after which a token may exit, e.g. 16+20+24+28; default: floor(L/2 + i*L/8), i = 0..3",
    )
    init: str | None = option(
        None,
        "exits to start from, a folder or Hub id: of the same backbone, exit layers and sizes, with at least these "
        "kinds and the same adapters (affine ones may get an MLP by swiglu:W); state maps are fitted again",
    )
    final_block: bool = option(False, "run the last block after an exit (the paper's set-up)")
    adapter: str = option(
        "none",
        "read-out adapters: none, affine (a matrix of hidden size squared per exit), lowrank:R, or swiglu:W (affine "
        "and a gated MLP of W channels); trained by KL to the full model's distribution, used for labels and for the "
        "tokens of exits",
    )
    adapter_first: float = option(
        0.0, "share of the steps in which the adapters are trained alone, then frozen; 0: all together"
    )
    states: str = option(
        "none",
        "maps that predict the states of an exited token in the blocks it skipped: none (they are recomputed), "
        "linear (in place of the blocks' own projections, at their cost) or lowrank:R (added to them); fitted by least "
        "squares before anything else is trained, and used by state_mode=learned",
    )
    states_tokens: int = option(65_536, "tokens that the maps are fitted to, from the beginning of the text")
    simulate_exits: bool = option(
        False,
        "let tokens exit, at thresholds drawn for each row, in half of the text after the first steps, so that exits "
        "are trained on the states that earlier exits leave behind",
    )
    lora: int | None = option(
        None,
        "rank of LoRA on the linear layers of the blocks, trained before the exits so that early read-outs agree "
        "sooner with the model as it was; it is kept in OUTPUT/lora, for peft= beside exits=",
    )
    lora_tokens: int = option(500_000, "tokens that --lora is trained on, from the beginning of the text")
    lora_learning_rate: float = option(2e-4, "peak of its learning rate")
    lora_keep: float = option(1.0, "weight of its KL divergence at full depth, beside that of the exits, which is 1")
    label: str = option(
        "exit_in_full",
        "an exit is right if its best token is among the k best of the full model (exit_in_full), or if the full "
        "model's best token is among the exit's k best (full_in_exit)",
    )
    top_k: int = option(1, "k of the label")
    label_final_block: bool = option(
        True, "with --final_block, labels are made of read-outs behind the last block; false: of the exit's own state"
    )
    exit_weights: str = option(
        "decreasing", "weights of the exits' losses from the first to the last: decreasing, increasing or equal"
    )
    normalize: bool = _size("normalize")
    mamba_state: int = _size("mamba_state")
    mamba_expand: float = _size("mamba_expand")
    mamba_kernel: int = _size("mamba_kernel")
    ffn_expand: float = _size("ffn_expand")
    hybrid_expand: float = _size("hybrid_expand")

    max_tokens: int = option(2_000_000, "tokens to train on")
    seq_len: int = frozen_option("seq_len", "longest row; longer documents are cut into several", 512)
    batch_tokens: int = option(1024, "tokens of an optimiser step, over all processes")
    micro_batch_tokens: int = option(1024, "tokens that go through the backbone at once; a divisor of batch_tokens")
    label_share: float = option(0.25, "share of positions, drawn at random, that are labelled: labels read the LM head")
    optimizer: str = option("adamw", "adamw, or schedulefree (AdamW without a schedule, from the package of that name)")
    learning_rate: float = option(1e-3, "peak of the learning rate")
    warmup_share: float = option(
        0.05, "share of the steps in which the learning rate rises; with adamw a cosine to 0 follows"
    )
    weight_decay: float = option(0.01, "the optimiser's weight decay")
    clip: float = option(1.0, "largest gradient norm of each kind's parameters")
    dtype: str = frozen_option("dtype")

    calibrate: bool = option(
        True,
        "fit a scale and a shift of each exit's log-odds on held-out text, and fold them into its weights",
    )
    calibrate_tokens: int = option(20_000, "tokens for --calibrate, in whole micro-batches of --dataset")
    eval_dataset: str | None = option(
        None,
        "held-out text, given as --dataset; default: some of --dataset are held out, the same ones whatever the seed",
    )
    eval_config: str | None = option(None, "configuration of a held-out Hub data set")
    eval_split: str = option("train", "split of a held-out Hub data set")
    eval_tokens: int = option(50_000, "tokens to evaluate on at the end")
    eval_documents: int = option(100, DOCUMENTS_HELP)
    curve_tokens: int = option(
        5_000, "held-out tokens that are run at every threshold, for the curve: the beginnings of 40 documents"
    )

    def __post_init__(self) -> None:
        from dynamax_lm_eval.training import option_rules  # torch: not needed for help

        self._apply_preset(option_rules.PRESETS)
        option_rules.check(self)

    def _apply_preset(self, presets: Mapping[str, Mapping[str, Any]]) -> None:
        if self.preset is None:
            return
        if self.preset not in presets:
            raise UserError(f"--preset must be {' or '.join(presets)}, got {self.preset!r}")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name, value in presets[self.preset].items():
            if getattr(self, name) == defaults[name]:
                object.__setattr__(self, name, value)

    @property
    def self_share(self) -> float:
        """The share of the tokens that the backbone generates itself."""
        return 1.0 if self.dataset == SELF_DATASET else mixture(self.dataset)[0]

    @property
    def writes_answers(self) -> bool:
        """Whether what the backbone generates is written down before it is trained on."""
        return self.prompts is not None or 0 < self.self_share < 1

    @property
    def source(self) -> TextSource:
        """The text to train on, or that part of it which the backbone does not generate."""
        return TextSource(
            mixture(self.dataset)[1],
            self.dataset_config,
            self.dataset_split,
            self.text_column,
            self.shuffle_buffer,
            self.seed,
            self.max_documents,
            self.template,
        )

    @property
    def eval_source(self) -> TextSource | None:
        """The held-out text, where it is given."""
        if self.eval_dataset is None:
            return None
        return replace(
            self.source,
            dataset=self.eval_dataset,
            config=self.eval_config,
            split=self.eval_split,
            documents=None,
            seed=HELD_OUT_SEED,
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds to train, in the order in which an evaluation prefers them."""
        from dynamax_lm_eval.exits.classifiers import CLASSIFIERS

        requested = [kind.strip() for kind in self.classifier.split(",")]
        for kind in requested:
            if kind not in CLASSIFIERS:
                raise UserError(f"--classifier must name some of {_KINDS}, got {kind!r}")
        return tuple(kind for kind in CLASSIFIERS if kind in requested)

    @property
    def classifier_options(self) -> ClassifierOptions:
        names = (item.name for item in dataclasses.fields(ClassifierOptions))
        return ClassifierOptions(**{name: getattr(self, name) for name in names})

    @property
    def steps(self) -> int:
        """The number of optimiser steps; the last one may go past ``max_tokens``."""
        return -(-self.max_tokens // self.batch_tokens)

    @property
    def lora_steps(self) -> int:
        """The number of optimiser steps of the LoRA; the last one may go past ``lora_tokens``."""
        return -(-self.lora_tokens // self.batch_tokens)

    @property
    def adapter_steps(self) -> int:
        """The number of first steps, in which only adapters are trained."""
        return round(self.adapter_first * self.steps)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of a step, over all processes."""
        return self.batch_tokens // self.micro_batch_tokens

    @property
    def states_micro_batches(self) -> int:
        """The number of micro-batches that state maps are fitted to."""
        return -(-self.states_tokens // self.micro_batch_tokens)

    @property
    def calibrate_micro_batches(self) -> int:
        """The number of micro-batches that exits are calibrated on."""
        return -(-self.calibrate_tokens // self.micro_batch_tokens) if self.calibrate else 0

    @property
    def labels_per_micro_batch(self) -> int:
        return max(1, round(self.label_share * self.micro_batch_tokens))

    def reading(self, run: RunOptions) -> FrozenOptions:
        """Returns how the backbone is loaded."""
        return FrozenOptions.of(self, run)

    def resolve_exit_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the exits for a backbone of ``num_layers`` blocks."""
        from dynamax_lm_eval.exits.resolve import resolve_exit_layers

        requested = None if self.exit_layers is None else values.layers("exit_layers", self.exit_layers)
        return resolve_exit_layers(requested, num_layers, self.final_block)

    def to_json(self) -> dict[str, Any]:
        """Returns all options by their names, as checkpoints and states of a training store them."""
        return dataclasses.asdict(self)
