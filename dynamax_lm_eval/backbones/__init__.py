"""Backbones: causal language models that run block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, RowLayout, States
from dynamax_lm_eval.backbones.mamba.backbone import MambaBackbone
from dynamax_lm_eval.backbones.replay.backbone import ReplayBackbone
from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone
from dynamax_lm_eval.backbones.whole_rows import WholeRowBackbone
from dynamax_lm_eval.models.loading import is_recurrent
from dynamax_lm_eval.types import MambaKernels

__all__ = [
    "SLOW_RUNGS",
    "Backbone",
    "ForwardPass",
    "MambaBackbone",
    "ReplayBackbone",
    "RowLayout",
    "States",
    "TransformerBackbone",
    "WholeRowBackbone",
    "make_backbone",
    "rungs",
]


#: Ways to run a model that are right and slow, with what to tell the user.
SLOW_RUNGS = {
    "row modules": "with its attention one row after the other, which is slow for many rows",
    "whole rows": "without a cache: every token costs as much as its whole row. Nothing faster equals its own forward",
}


def rungs(
    model: Any, max_length: int | None = None, mamba_kernels: MambaKernels = "auto"
) -> dict[str, Callable[[], Backbone]]:
    """Returns the ways in which a loaded causal LM of transformers may be run, by name, the fastest first.

    Each makes a backbone, or raises an error where the model is not of its kind.
    """
    fast: dict[str, Callable[[], Backbone]] = {}
    if is_recurrent(model.config):
        fast["mamba"] = lambda: MambaBackbone(model, mamba_kernels)
    elif TransformerBackbone.fits(model):
        fast["fused"] = lambda: TransformerBackbone(model, max_length)
    return fast | {
        "flat": lambda: ReplayBackbone(model, max_length, mamba_kernels),
        "row modules": lambda: ReplayBackbone(model, max_length, mamba_kernels, attention_by_row=True),
        "whole rows": lambda: WholeRowBackbone(model),
    }


def make_backbone(model: Any, max_length: int | None = None, mamba_kernels: MambaKernels = "auto") -> Backbone:
    """Returns the backbone that a loaded causal LM of transformers is by its structure, unchecked.

    Args:
        model: in eval mode.
        max_length: longest row that will be run.
        mamba_kernels: see :class:`MambaBackbone`.

    Raises:
        UserError: the architecture is not one that can be run block by block.
    """
    make = next(iter(rungs(model, max_length, mamba_kernels).values()))
    return make()
