"""Blocks of the Llama kind in fewer operations than their family's own code takes.

While few tokens are in flight, the host spends as long on launching operations as the device on computing them.
Norms, rotary embedding and plain linear layers are computed here; quantised layers and adapters are called as they
are. Whether the result is that of the family is checked at load, as for every backbone.

n tokens in flight, D hidden, H heads, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dynamax_lm_eval.backbones.linear import is_changed, linear
from dynamax_lm_eval.backbones.transformer.attention import AttentionPlan, ragged_attention
from dynamax_lm_eval.errors import UserError

#: Families whose blocks are these, and whether attention windows are the configuration's (else the module's, if any).
_FAMILIES = {"Llama": False, "Mistral": True, "Qwen2": False, "Qwen3": False}

#: Stores K and V (n, H_kv, P) of the tokens in flight and returns the caches (C, H_kv, P) that now hold them.
Write = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class FusedLlamaBlock:
    """A block that computes what one of such a family computes."""

    def __init__(self, module: Any, head_dim: int, window: int | None) -> None:
        attn = module.self_attn
        self._attention = attn
        self.head_dim = head_dim
        self.window = window
        self._scaling = attn.scaling
        self._norms = (module.input_layernorm, module.post_attention_layernorm)
        self._projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        self._head_norms = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else None
        self._output = attn.o_proj
        self._gate, self._up, self._down = module.mlp.gate_proj, module.mlp.up_proj, module.mlp.down_proj
        self._activation = module.mlp.act_fn
        self._bypassed = [vars(part) for part in (module, attn, module.mlp, *self._norms)]

    @classmethod
    def of_all(cls, modules: Iterable[Any], name: str) -> list[FusedLlamaBlock]:
        """Returns the fused forms of all blocks of the model of this name; UserError where one is of another kind."""
        fused = [cls.of(module) for module in modules]
        known = [block for block in fused if block is not None]
        if len(known) < len(fused):
            raise UserError(f"{name}: its blocks are not all of the kind of Llama's")
        return known

    @property
    def heads(self) -> int:
        """H."""
        return int(self._output.in_features) // self.head_dim

    @property
    def kv_projections(self) -> tuple[Any, Any]:
        """The modules that make K and V."""
        return self._projections[1], self._projections[2]

    @classmethod
    def of(cls, module: Any) -> FusedLlamaBlock | None:
        """Returns the fused form of a block of transformers; None where its family is not known to be of the kind."""
        family = type(module).__name__.removesuffix("DecoderLayer")
        if family not in _FAMILIES or not type(module).__module__.startswith("transformers.models."):
            return None
        attn = module.self_attn
        parts = {"self_attn": "Attention", "mlp": "MLP"}
        parts |= {"input_layernorm": "RMSNorm", "post_attention_layernorm": "RMSNorm"}
        if any(type(getattr(module, name)).__name__ != family + kind for name, kind in parts.items()):
            return None
        window = getattr(attn.config, "sliding_window", None) if _FAMILIES[family] else None
        return cls(module, int(attn.head_dim), getattr(attn, "sliding_window", window))

    @property
    def may_replace(self) -> bool:
        """Whether nobody has hooked or replaced the modules that this block does not call."""
        return not any(is_changed(part) for part in self._bypassed)

    def states(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns K and V (m, H_kv, P) that the block would write for (1, m, D) at such angles as it is called with."""
        normed = _normed(self._norms[0], hidden)
        key, value = (linear(project, normed).unflatten(-1, (-1, self.head_dim)) for project in self._projections[1:])
        if self._head_norms is not None:
            key = self._head_norms[1](key)
        return _rotated(key, cos, sin)[0], value[0]

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, write: Write, plan: AttentionPlan) -> Tensor:
        """Returns the block's output (1, n, D) for its input and angles (1, n, 1, P) as of :func:`signed_rotary`."""
        normed = _normed(self._norms[0], hidden)
        query, key, value = (
            linear(project, normed).unflatten(-1, (-1, self.head_dim)) for project in self._projections
        )  # (1, n, heads, P)
        if self._head_norms is not None:
            query, key = self._head_norms[0](query), self._head_norms[1](key)
        heads = query.shape[2]
        rotated = _rotated(torch.cat((query, key), dim=2), cos, sin)
        keys, values = write(rotated[0, :, heads:], value[0])
        query = rotated[:, :, :heads].transpose(1, 2)
        attended, _ = ragged_attention(self._attention, query, keys, values, None, self._scaling, self.window, plan)
        hidden = hidden + linear(self._output, attended.flatten(2))
        normed = _normed(self._norms[1], hidden)
        gated = self._activation(linear(self._gate, normed)).mul_(linear(self._up, normed))
        return hidden + linear(self._down, gated)


def signed_rotary(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (1, n, P) as :class:`FusedLlamaBlock` takes them, (1, n, 1, P): the sign is with the sine."""
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos.unsqueeze(2), signed.unsqueeze(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x cos + (-x2, x1) sin for halves x1, x2 of the last dimension; rounded where the families round."""
    return (x * cos).add_(torch.roll(x, x.shape[-1] // 2, -1) * sin)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    weight = norm.weight
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32:
        # Narrower types are rounded between the family's steps; its own code does that right.
        normed: Tensor = norm(hidden)
        return normed
    scale = hidden.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * scale).mul_(weight)
