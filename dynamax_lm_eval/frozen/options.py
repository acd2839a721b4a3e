"""The options for reading text with a frozen model, which training and every measurement on text share.

A command has options of its own too, in its own order of importance. It takes those of this module by
:func:`frozen_option`, and :meth:`FrozenOptions.of` collects their values. Knows names and values; opens nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamax_lm_eval.errors import UserError

DEFAULT_DATASET, DEFAULT_DATASET_CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
TEMPLATES = ("none", "instruct")
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: The seed of the order in which documents are held out, whatever the seed of the training.
HELD_OUT_SEED = 0
#: The help of the option that sets ``num_documents``.
DOCUMENTS_HELP = (
    "documents to spread the tokens over, as those of one document are alike and errors are computed over documents: "
    "each gives at most one row, or its share of the tokens if that is more; 1: whole documents"
)


def option(default: Any, text: str) -> Any:
    """Returns the field of an option of the command line: its default and its line of ``--help``."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TextSource:
    """Where documents are read, and the order in which they come."""

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    #: Documents among which the next one is drawn; 0 keeps their order.
    shuffle_buffer: int = 10_000
    seed: int = 0
    #: How many documents there are, of those in the source's own order; None: all.
    documents: int | None = None
    #: What each text is put into: ``none``, or ``instruct``, a user's turn in the tokenizer's chat template.
    template: str = "none"


@dataclass(frozen=True)
class FrozenOptions:
    """A frozen model, how it is loaded, and the text that it reads."""

    backbone: str = field(metadata={"help": "alias (smollm2-gguf, mistral, ...), Hub id, or folder"})
    dataset: str = option(
        DEFAULT_DATASET, "a Hub id (streamed), a .txt, .jsonl(.gz) or .parquet file, a folder or pattern of such files"
    )
    dataset_config: str | None = option(
        None, f"configuration of a Hub data set ({DEFAULT_DATASET_CONFIG} for the default one)"
    )
    dataset_split: str = option("train", "split of a Hub data set")
    text_column: str = option("text", "column that holds the text")
    seq_len: int = option(256, "longest row")
    dtype: str = option(
        "auto", "data type of the backbone: float32, bfloat16, float16; auto: bfloat16 where the hardware has it"
    )
    device: str = option("auto", "cpu, or auto: a GPU where there is one")
    revision: str | None = option(None, "revision of a backbone from the Hub")
    trust_remote_code: bool = option(False, "let the backbone's repository run its own code")
    template: str = option(
        "none", "what each text is put into: none, or instruct, a user's turn in the tokenizer's chat template"
    )
    peft: str | None = option(None, "folder of a PEFT adapter that the backbone is loaded with")

    def __post_init__(self) -> None:
        check_at_least(self, {"seq_len": 2})
        check_dtype(self.dtype)
        check_device(self.device)

    @classmethod
    def of(cls, *commands: Any) -> FrozenOptions:
        """Returns the values that the options of a command have under these names.

        Raises:
            UserError: a value cannot be honoured.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        return cls(**{name: getattr(own, name) for own in commands for name in names if hasattr(own, name)})

    @property
    def source(self) -> TextSource:
        """The text, in the usual order."""
        return TextSource(self.dataset, self.dataset_config, self.dataset_split, self.text_column)


def frozen_option(name: str, text: str | None = None, default: Any = None) -> Any:
    """Returns the field ``name`` of :class:`FrozenOptions` for the options of a command.

    Args:
        name: of the option.
        text: the line of ``--help`` where the command says more; None: as it is there.
        default: where the command has another; None: as it is there.
    """
    shared = FrozenOptions.__dataclass_fields__[name]
    return option(shared.default if default is None else default, text or shared.metadata["help"])


def check_at_least(options: object, minimums: Mapping[str, int]) -> None:
    """Refuses options that are below the least value by their name, with a UserError."""
    for name, minimum in minimums.items():
        if getattr(options, name) < minimum:
            raise UserError(f"--{name} must be at least {minimum}, got {getattr(options, name)}")


def check_dtype(dtype: str) -> None:
    """Refuses a data type that no backbone is loaded in, with a UserError."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")


def check_device(device: str) -> None:
    """Refuses the name of a single device, with a UserError that says how one is chosen."""
    if device not in ("auto", "cpu"):
        raise UserError(f"--device must be auto or cpu, got {device!r}; choose a GPU with CUDA_VISIBLE_DEVICES")
