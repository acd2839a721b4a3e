"""The options of ``prune-profile`` and ``exit-thresholds``. Imports no torch, so that help comes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.frozen.options import DOCUMENTS_HELP, FrozenOptions, check_at_least, frozen_option, option
from dynamax_lm_eval.types import AUTO, ClassifierKind, StateMode


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where it is written."""

    backbone: str = frozen_option("backbone")
    output: str = option("prune-profile.json", "file; a plot is written beside it")
    dataset: str = frozen_option("dataset")
    dataset_config: str | None = frozen_option("dataset_config")
    dataset_split: str = frozen_option("dataset_split")
    text_column: str = frozen_option("text_column")
    texts: int = option(128, "texts to average over")
    seq_len: int = frozen_option("seq_len", "tokens of each; the last one's states are compared")
    dtype: str = frozen_option("dtype")
    device: str = frozen_option("device")
    trust_remote_code: bool = frozen_option("trust_remote_code")
    overwrite: bool = option(False, "overwrite existing files")
    fit_adapters: str = option(
        "",
        "numbers of blocks, separated by commas: fits a read-out for models pruned by each number (the deepest blocks, "
        "and those of the least distance), and writes them beside --output, as .safetensors",
    )
    fit_tokens: int = option(30_000, "tokens of text for that fit; a fifth of its documents is measured on")
    fit_documents: int = option(100, DOCUMENTS_HELP)
    ridge: float = option(0.01, "penalty of that fit, in mean variances of a coordinate of the hidden state")

    def __post_init__(self) -> None:
        check_at_least(self, {"texts": 1, "fit_tokens": 2, "fit_documents": 1})
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UserError(f"--ridge must be a number of at least 0, got {self.ridge}")
        for name in ("fit_tokens", "fit_documents", "ridge"):
            if not self.counts and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name} has no effect without --fit_adapters; add it, or remove --{name}")
        FrozenOptions.of(self)  # checks the others

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of blocks of ``--fit_adapters``, rising."""
        items = [item.strip() for item in str(self.fit_adapters).split(",") if item.strip()]
        if not all(item.isdigit() and int(item) > 0 for item in items):
            raise UserError(
                f"--fit_adapters must be numbers of blocks separated by commas, from 1, got {self.fit_adapters!r}"
            )
        return tuple(sorted({int(item) for item in items}))

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """Where the profile, its plot and the adapters go."""
        output = Path(self.output).expanduser()
        return output, output.with_suffix(".png"), output.with_suffix(".safetensors")


@dataclass(frozen=True)
class SearchOptions:
    """What is recorded, and where the result is written."""

    backbone: str = frozen_option("backbone")
    output: str = option("exit-thresholds.json", "file of the result")
    exits: str | None = option(None, "folder or Hub id of exits; default: the backbone's")
    classifier: str | None = option(None, f"one of {', '.join(get_args(ClassifierKind))}; default: the exits' first")
    propose: str | None = option(
        None,
        "thresholds of a cascade, whose classifier proposes from this confidence on and whose read-out confirms: "
        "numbers separated by commas, of which the best is taken; default: the classifier decides alone",
    )
    state_mode: str = option(
        AUTO,
        "learned, recompute, copy or skip; decides what exits cost; auto: learned where the exits have maps of states",
    )
    dataset: str = frozen_option(
        "dataset",
        "a Hub id (streamed), a .txt, .jsonl(.gz) or .parquet file, a folder or pattern of such files; "
        "none that the exits were trained on, nor documents to calibrate on",
    )
    dataset_config: str | None = frozen_option("dataset_config")
    dataset_split: str = frozen_option("dataset_split")
    text_column: str = frozen_option("text_column")
    tokens: int = option(50_000, "tokens to record; half of their documents are searched, half measure")
    documents: int = option(100, DOCUMENTS_HELP)
    seq_len: int = frozen_option("seq_len")
    dtype: str = frozen_option("dtype")
    device: str = frozen_option("device")
    seed: int = option(0, "random seed for the split of documents")
    trust_remote_code: bool = frozen_option("trust_remote_code")
    overwrite: bool = option(False, "overwrite existing files")

    def __post_init__(self) -> None:
        check_at_least(self, {"tokens": 100, "documents": 4})
        for name, choices in (("state_mode", (AUTO, *get_args(StateMode))), ("classifier", get_args(ClassifierKind))):
            given = getattr(self, name)
            if given is not None and given not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, got {given!r}")
        _ = self.proposals
        FrozenOptions.of(self)  # checks the others

    @property
    def proposals(self) -> tuple[float, ...]:
        """The values of ``--propose``; none where the classifier decides alone."""
        if self.propose is None:
            return ()
        try:
            values = tuple(sorted({float(text) for text in self.propose.split(",")}))
        except ValueError:
            values = ()
        if not values or not all(0 <= value < 1 for value in values):
            raise UserError(f"--propose must be numbers in [0, 1), separated by commas, got {self.propose!r}")
        return values
