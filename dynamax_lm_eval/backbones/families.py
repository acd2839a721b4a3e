"""Families of Transformers, as far as they have to be known: names of modules, sizes, and types of rotary embedding.

Everything else that a family may do differently is found by comparison with ``model.forward`` at load.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dynamax_lm_eval.errors import UserError

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
#: Rotary types whose angles depend on the longest row of a batch, which would make rows depend on another.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def child(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    """Returns the first of the submodules ``names`` that exists; UserError without any."""
    for name in names:
        submodule = getattr(module, name, None)
        if isinstance(submodule, nn.Module):
            return submodule
    raise UserError(f"found no {what} (looked for {', '.join(names)}); this architecture is not supported")


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer of some kind, whatever its weights are stored as.

    Leaves only: a LoRA layer has sizes of its own and holds the layers that are counted.
    """
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children())


def linear_macs(module: nn.Module, name: str) -> int:
    """Returns the MACs per token of all linear layers in a module, quantised ones and adapters included.

    Vectors cost nothing, in whatever shape they are stored: norms, and what IA3 scales activations by.

    Raises:
        UserError: the module holds matrices outside linear layers, which cannot be counted (experts, say).
    """
    linears = {path: leaf for path, leaf in module.named_modules() if is_linear(leaf)}
    for path, parameter in module.named_parameters():
        is_matrix = parameter.ndim > 1 and parameter.numel() > max(parameter.shape)
        if is_matrix and path.rpartition(".")[0] not in linears:
            raise UserError(
                f"{name} has weights in its blocks that the cost model cannot count ({path}); "
                "this architecture is not supported"
            )
    return sum(int(leaf.in_features) * int(leaf.out_features) for leaf in linears.values())


def check_rope(config: Any, max_length: int | None) -> None:
    """Raises UserError where rotary angles would depend on the longest row of a batch of up to ``max_length``."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        if kind not in _LENGTH_DEPENDENT_ROPE:
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if max_length is None or max_length > original:
            raise UserError(
                f"rope_type {kind!r} makes a row's result depend on the longest row of its batch above {original} "
                f"tokens; add max_length={original} to model_args"
            )
