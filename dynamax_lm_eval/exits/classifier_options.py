"""The sizes of exit classifiers that the user may choose. Imports no torch, so that help comes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dynamax_lm_eval.errors import UserError


def _size(default: Any, least: int | None, text: str) -> Any:
    """A size with its smallest value, None where any number above 0 will do, and the help text of ``train``."""
    return field(default=default, metadata={"least": least, "help": text})


@dataclass(frozen=True)
class ClassifierOptions:
    """What the user may choose; sizes decide what an evaluation costs."""

    mamba_state: int = _size(16, 1, "SSM state of the mamba and hybrid classifiers")
    # Wider ones detect a little better and cost more than that gains (docs/search.md).
    mamba_expand: float = _size(0.25, None, "inner width of the mamba and hybrid classifiers' mixer, in hidden sizes")
    mamba_kernel: int = _size(4, 2, "tokens that the convolution of that mixer sees")
    ffn_expand: float = _size(4.0, None, "hidden width of the ffn classifier, in hidden sizes")
    hybrid_expand: float = _size(0.25, None, "hidden width of the hybrid classifier, in hidden sizes")
    normalize: bool = field(default=True, metadata={"help": "normalise the hidden states before the classifiers"})

    def __post_init__(self) -> None:
        for name, size in self.__dataclass_fields__.items():
            value, least = getattr(self, name), size.metadata.get("least")
            if name == "normalize":
                if not isinstance(value, bool):
                    raise UserError(f"{name} must be true or false, got {value!r}")
                continue
            if least is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
            if least is None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a finite number above 0, got {value}")
