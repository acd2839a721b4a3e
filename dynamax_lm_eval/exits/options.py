"""The options of ``dynamax-lm-eval exits``."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamax_lm_eval.errors import UserError


@dataclass(frozen=True)
class ExitsOptions:
    """What to do with the exits on this machine; without any of it they are listed."""

    show: str | None = field(default=None, metadata={"help": "name or folder of exits: their whole configuration"})
    remove: str | None = field(default=None, metadata={"help": "name of exits in the cache: removes their folder"})

    def __post_init__(self) -> None:
        if self.show is not None and self.remove is not None:
            raise UserError("--show and --remove exclude each other; give one")
