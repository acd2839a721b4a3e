"""Backbones: causal language models that run block by block."""

from __future__ import annotations

from typing import Any

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, RowLayout, States
from dynamax_lm_eval.backbones.mamba.backbone import MambaBackbone
from dynamax_lm_eval.backbones.transformer.backbone import TransformerBackbone
from dynamax_lm_eval.models.loading import is_recurrent
from dynamax_lm_eval.types import MambaKernels

__all__ = [
    "Backbone",
    "ForwardPass",
    "MambaBackbone",
    "RowLayout",
    "States",
    "TransformerBackbone",
    "make_backbone",
]


def make_backbone(model: Any, max_length: int | None = None, mamba_kernels: MambaKernels = "auto") -> Backbone:
    """Returns the backbone that a loaded causal LM of transformers is.

    Args:
        model: in eval mode.
        max_length: longest row that will be run.
        mamba_kernels: see :class:`MambaBackbone`.

    Raises:
        UserError: the architecture is not one that can be run block by block.
    """
    if is_recurrent(model.config):
        return MambaBackbone(model, mamba_kernels)
    return TransformerBackbone(model, max_length)
