"""Modules that run for a while with other functions in place of their own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(pairs: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Runs modules with other functions in place of their own; None: that of their class."""
    before = [vars(module).get("forward") for module, _ in pairs]
    for module, forward in pairs:
        _set_forward(module, forward)
    try:
        yield
    finally:
        for (module, _), own in zip(pairs, before, strict=True):
            _set_forward(module, own)


def _set_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
