"""Frozen causal language models seen block by block, with the states their blocks keep."""

from dynamax_lm_eval.backbones.base import Backbone, ForwardPass, RowLayout, States
from dynamax_lm_eval.backbones.transformer import TransformerBackbone

__all__ = ["Backbone", "ForwardPass", "RowLayout", "States", "TransformerBackbone"]
