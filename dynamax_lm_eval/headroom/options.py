"""The options of ``dynamax-lm-eval headroom``: what is measured, on which tokens, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from dynamax_lm_eval import values
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen.options import (
    DEFAULT_DATASET,
    DOCUMENTS_HELP,
    TextSource,
    check_at_least,
    frozen_option,
    option,
)
from dynamax_lm_eval.sweep.options import SweepOptions, parse_thresholds
from dynamax_lm_eval.types import ClassifierKind, StateMode

#: The value of ``--exits`` that leaves those of the backbone out.
NO_EXITS = "none"
#: Options that only act on ``--tasks``, and those that only act on ``--dataset``.
_OF_TASKS = ("limit", "num_fewshot", "include_path", "metadata", "apply_chat_template")
_OF_TEXT = ("dataset", "dataset_config", "dataset_split", "text_column", "tokens", "documents", "fit_tokens")


@dataclass(frozen=True)
class HeadroomOptions:
    """A model, the exits that it might have, and the tokens on which they are looked at."""

    backbone: str = frozen_option("backbone")
    output: str = option("headroom", "folder for headroom.json and headroom.png")
    tasks: str | None = option(
        None,
        "tasks of the harness, separated by commas: the tokens of the model's own greedy answers are measured, or "
        "those of the continuations that a task scores",
    )
    dataset: str | None = option(
        None,
        "in place of --tasks, text, every token of which is measured: a Hub id (streamed), a .txt, .jsonl(.gz) or "
        f".parquet file, a folder or pattern of such files; default: {DEFAULT_DATASET}",
    )
    exits: str | None = option(
        None,
        "trained exits to compare with: a folder or Hub id; default: the backbone's, where there are some; "
        f"{NO_EXITS}: without",
    )
    classifier: str | None = option(None, f"one of {', '.join(get_args(ClassifierKind))}; default: the exits' first")
    thresholds: str = option("0.5,0.7,0.8,0.9,0.95", "thresholds of the trained exits: each takes one more pass")
    exit_layers: str | None = option(
        None, "block counts (from 1) after which a token might exit, e.g. 16+20+24; default: all from L/2 to L-1"
    )
    fit_adapters: bool = option(
        False,
        "fit an affine read-out for each of these layers, on documents that are not measured (of --tasks: half of all)",
    )
    ridge: float = option(0.01, "of that fit: its penalty, in mean squares of a coordinate of the hidden state")
    state_mode: str = option(
        "recompute",
        "recompute, copy or skip: what an exited token leaves behind; with recompute, trained exits use the maps of "
        "states that they have",
    )
    limit: int | None = option(None, "documents of each task, drawn by --seed; default: all")
    num_fewshot: int | None = option(None, "examples in the prompt; default: the task's own")
    include_path: str | None = option(None, "folder with tasks of your own")
    metadata: str | None = option(None, "JSON, or name=value pairs separated by commas, for tasks that take some")
    apply_chat_template: bool = option(False, "wrap prompts in the tokenizer's chat template")
    dataset_config: str | None = frozen_option("dataset_config")
    dataset_split: str = frozen_option("dataset_split")
    text_column: str = frozen_option("text_column")
    tokens: int = option(20_000, "tokens of --dataset to measure")
    documents: int = option(100, DOCUMENTS_HELP)
    fit_tokens: int = option(20_000, "tokens of --dataset, of further documents, to fit adapters on")
    seq_len: int = frozen_option("seq_len", "longest row of text")
    batch_size: int = option(16, "sequences processed at once")
    dtype: str = option("auto", "of the backbone: float32, bfloat16, float16; auto: as its files say")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    revision: str | None = frozen_option("revision")
    trust_remote_code: bool = frozen_option("trust_remote_code")
    seed: int = option(0, "of the order of texts, the draw of documents and their few-shot examples")
    overwrite: bool = option(False, "write over existing files")

    def __post_init__(self) -> None:
        check_at_least(
            self, {"tokens": 100, "documents": 1, "fit_tokens": 100, "seq_len": 2, "batch_size": 1, "seed": 0}
        )
        modes = [mode for mode in get_args(StateMode) if mode != "learned"]
        for name, choices in (("state_mode", modes), ("classifier", get_args(ClassifierKind))):
            given = getattr(self, name)
            if given is not None and given not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {given!r}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num_fewshot must be at least 0, got {self.num_fewshot}")
        values.number(0)("--ridge", self.ridge)
        if not self.fit_adapters:
            self._check_unused(("ridge", "fit_tokens"), "--fit_adapters True")
        if self.exits == NO_EXITS:
            self._check_unused(("classifier", "thresholds"), "exits")
        if self.tasks is None:
            self._check_unused(_OF_TASKS, "--tasks")
        elif self.dataset is not None:
            raise UserError("--tasks and --dataset exclude each other: they name the tokens; give one")
        else:
            self._check_unused(_OF_TEXT, "--dataset")
        _ = self.exit_thresholds, self.layers_given
        _ = self.task_files

    def _check_unused(self, names: tuple[str, ...], needed: str) -> None:
        """Refuses options that were given (differ from their defaults) without what they act on."""
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name} has no effect without {needed}; add it, or remove --{name}")

    @property
    def exit_thresholds(self) -> list[tuple[float, ...]]:
        """The thresholds of exits at hand: each is one number, or one per exit."""
        return parse_thresholds(self.thresholds)

    @property
    def layers_given(self) -> tuple[int, ...] | None:
        """The layers of ``--exit_layers``."""
        if self.exit_layers is None:
            return None
        layers: tuple[int, ...] = values.layers("--exit_layers", self.exit_layers)
        return layers

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers after which a token of a model of ``num_layers`` blocks might leave, rising.

        Raises:
            UserError: a layer is no layer of the model, or there is none.
        """
        from dynamax_lm_eval.exits.resolve import resolve_exit_layers  # torch: not needed for help

        if self.layers_given is not None:
            return resolve_exit_layers(self.layers_given, num_layers)
        if num_layers < 2:
            raise UserError(f"--backbone {self.backbone!r} has {num_layers} block, so there is nowhere to leave")
        return tuple(range(max(1, num_layers // 2), num_layers))

    @property
    def source(self) -> TextSource:
        """The text of ``--dataset``."""
        dataset = DEFAULT_DATASET if self.dataset is None else self.dataset
        return TextSource(dataset, self.dataset_config, self.dataset_split, self.text_column, seed=self.seed)

    @property
    def task_files(self) -> SweepOptions | None:
        """The tasks as a sweep names them; None where text is measured."""
        if self.tasks is None:
            return None
        return SweepOptions(
            backbone=self.backbone,
            tasks=self.tasks,
            output=self.output,
            include_path=self.include_path,
            metadata=self.metadata,
        )

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Arguments that the model is loaded with, without its name and its exits."""
        given: dict[str, object] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        named = {"device": self.device, "revision": self.revision}
        return given | {name: value for name, value in named.items() if value is not None}
