"""Families of Transformers, as far as they have to be known: names of modules, and layouts of K/V projections.

Everything else that a family may do differently is found by comparison with ``model.forward`` at load.
D hidden, H_kv K/V heads, P head dim, m tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError

#: (1, m, D) normalised hidden states, cos and sin (1, m, P) to K and V (1, H_kv, m, P).
Projector = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
ATTENTIONS = ("self_attn", "attention", "attn")
#: Rotary types whose angles depend on the longest row of a batch, which would make rows depend on another.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def find_layers(model: Any, depth: int, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """Returns the decoder that holds the list of ``depth`` blocks, and the list.

    The model's own word for its text decoder comes first, since a vision tower may be as deep. Lists of single layers
    (norms or embeddings, one per block) are passed over.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model) if isinstance(decoder, nn.Module) else (model,):
        for path, module in root.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and all(any(m.children()) for m in module):
                return root.get_submodule(path.rpartition(".")[0]), module
    raise UserError(f"{name} has no list of {depth} blocks; its architecture is not supported")


def child(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    """Returns the first of the submodules ``names`` that exists; UserError without any."""
    for name in names:
        submodule = getattr(module, name, None)
        if isinstance(submodule, nn.Module):
            return submodule
    raise UserError(f"found no {what} (looked for {', '.join(names)}); this architecture is not supported")


def linear_macs(module: nn.Module, name: str) -> int:
    """Returns the MACs per token of all linear layers in a module, quantised ones and adapters included.

    Vectors cost nothing, in whatever shape they are stored: norms, and what IA3 scales activations by.

    Raises:
        UserError: the module holds matrices outside linear layers, which cannot be counted (experts, say).
    """
    # Leaves only: a LoRA layer has sizes of its own and holds the layers that are counted.
    linears = {
        path: leaf
        for path, leaf in module.named_modules()
        if hasattr(leaf, "in_features") and hasattr(leaf, "out_features") and not any(leaf.children())
    }
    for path, parameter in module.named_parameters():
        is_matrix = parameter.ndim > 1 and parameter.numel() > max(parameter.shape)
        if is_matrix and path.rpartition(".")[0] not in linears:
            raise UserError(
                f"{name} has weights in its blocks that the cost model cannot count ({path}); "
                "this architecture is not supported"
            )
    return sum(int(leaf.in_features) * int(leaf.out_features) for leaf in linears.values())


def config_window(config: Any) -> int | None:
    """Returns the sliding window of families whose attention modules do not hold their own."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


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


def kv_modules(attn: nn.Module) -> list[nn.Module]:
    """Returns the modules that state recompute calls; a fused one makes queries as well, and all of it is counted."""
    names = ("k_proj", "v_proj") if _has(attn, "k_proj") else ("qkv_proj", "query_key_value")
    return [getattr(attn, name) for name in names if _has(attn, name)]


def _has(module: nn.Module, *names: str) -> bool:
    """Returns whether a module has all these submodules; blocks that share the K and V of others hold None instead."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def kv_projector(
    attn: Any, heads: int, kv_heads: int, head_dim: int, name: str
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns a function that makes K and V as this attention does.

    It takes normalised hidden states (1, m, D) and rotary cos, sin (1, m, P).

    The modules are called, their weights are not read: quantised layers, adapters and hooks keep working.

    Raises:
        UserError: the modules, the head dimension or the rotary function are not those of a known layout.
    """
    attention = type(attn).__name__

    def separate(hidden: Tensor) -> tuple[Tensor, Tensor]:
        key = attn.k_proj(hidden).unflatten(-1, (kv_heads, head_dim))
        if hasattr(attn, "k_norm"):
            key = attn.k_norm(key)
        return key, attn.v_proj(hidden).unflatten(-1, (kv_heads, head_dim))

    def joined(hidden: Tensor) -> tuple[Tensor, Tensor]:  # all q, then all k, then all v
        parts = attn.qkv_proj(hidden).split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
        return parts[1].unflatten(-1, (kv_heads, head_dim)), parts[2].unflatten(-1, (kv_heads, head_dim))

    def interleaved(hidden: Tensor) -> tuple[Tensor, Tensor]:  # q, k, v of each head side by side
        _, key, value = attn.query_key_value(hidden).unflatten(-1, (heads, 3 * head_dim)).chunk(3, dim=-1)
        return key, value

    if _has(attn, "k_proj", "v_proj"):
        split = separate
    elif _has(attn, "qkv_proj"):
        split = joined
    elif _has(attn, "query_key_value"):
        split = interleaved
    else:
        modules = ", ".join(part for part, _ in attn.named_children())
        raise UserError(
            f"{name}: how {attention} makes K and V is not known (its modules are {modules}); "
            "this architecture is not supported"
        )
    if head_dim == 0:
        raise UserError(f"{name}: {attention} does not say its head_dim; this architecture is not supported")
    rotate = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UserError(
            f"{name}: how {attention} applies rotary position embeddings is not known (its family has no function "
            "apply_rotary_pos_emb); this architecture is not supported"
        )

    def project(hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key, value = split(hidden)
        key, value = key.transpose(1, 2), value.transpose(1, 2)  # (1, H_kv, m, P)
        # The families' function rotates queries and keys together; there are no queries here.
        _, key = rotate(key[:, :0], key, cos, sin)
        return key, value

    return project
