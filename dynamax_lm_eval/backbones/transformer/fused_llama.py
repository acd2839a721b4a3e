"""Blocks of the Llama kind in fewer operations than their family's own code takes.

While few tokens are in flight, the host spends as long on launching operations as the device on computing them.
Norms, rotary embedding and plain linear layers are computed here; quantised layers and adapters are called as they
are. Whether the result is that of the family is checked at load, as for every backbone.

n tokens in flight, D hidden, H heads, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.learned import MappedProject
from dynamax_lm_eval.backbones.linear import StackedLinear, add_product, is_changed, is_plain, linear
from dynamax_lm_eval.backbones.transformer.attention import AttentionPlan, ragged_attention
from dynamax_lm_eval.backbones.transformer.varlen import SingleQueries
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
        self._stacked_projections = StackedLinear(self._projections)
        self._head_norms = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else None
        self._output = attn.o_proj
        self.heads = int(attn.o_proj.in_features) // head_dim  # H
        self._gate, self._up, self._down = module.mlp.gate_proj, module.mlp.up_proj, module.mlp.down_proj
        self._stacked_gate = StackedLinear((self._gate, self._up))
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

    @property
    def is_plain(self) -> bool:
        """Whether nobody has hooked, adapted or quantised any part of the block."""
        linears = (*self._projections, self._output, self._gate, self._up, self._down)
        norms = map(vars, self._head_norms or ())
        return self.may_replace and all(map(is_plain, linears)) and not any(map(is_changed, norms))

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """Returns K and V of no tokens, (0, H_kv, P) each, as the block would write them outside of autocast."""
        key, value = (self._by_head(part.weight.new_empty(0, part.out_features)) for part in self.kv_projections)
        return key, value

    def states(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mapped: MappedProject | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns K and V (m, H_kv, P) that the block would write for (1, m, D) at such angles as it is called with.

        ``mapped``: what stands in place of the projections to them.
        """
        normed = self.state_inputs(hidden)
        if mapped is None:
            key, value = (self._by_head(part) for part in self._keys_and_values(normed))
        else:
            key, value = self._by_head(mapped(normed, self.project_states)).chunk(2, dim=2)
        if self._head_norms is not None:
            key = _head_normed(self._head_norms[1], key)
        return _rotated(key, cos, sin)[0], value[0]

    def state_inputs(self, hidden: Tensor) -> Tensor:
        """Returns what the projections to K and V are given, (1, m, D), for hidden states (1, m, D)."""
        return normed_by(self._norms[0], hidden)

    def project_states(self, inputs: Tensor) -> Tensor:
        """Returns what they make of inputs (.., D): all heads of K and after them of V, before norms and rotation."""
        return torch.cat(list(self._keys_and_values(inputs)), dim=-1)

    def _keys_and_values(self, normed: Tensor) -> Sequence[Tensor]:
        if self._stacked_projections.is_stacked:
            both = self._stacked_projections.last(sum(part.out_features for part in self.kv_projections), normed)
            return both.chunk(2, dim=-1)
        return [linear(project, normed) for project in self.kv_projections]

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        write: Write,
        plan: AttentionPlan | SingleQueries,
        left: Tensor | None = None,
    ) -> Tensor:
        """Returns the block's output (1, n, D) for its input and angles as of :func:`signed_rotary`.

        Args:
            hidden: (1, n, D).
            cos, sin: (1, n + m, 1, P).
            write: stores K and V of all n + m.
            plan: what the n attend to.
            left: (1, m, D) hidden states of tokens that left, of which the block makes K and V as well.
        """
        normed = normed_by(self._norms[0], hidden if left is None else torch.cat((hidden, left), dim=1))
        query_key, value = self._projected(normed)
        heads = query_key.shape[2] - value.shape[2]  # those of this process, where several share a block
        rotated = _rotated(query_key, cos, sin)
        keys, values = write(rotated[0, :, heads:], value[0])
        query = rotated[:, : hidden.shape[1], :heads].transpose(1, 2)
        attended, _ = ragged_attention(self._attention, query, keys, values, None, self._scaling, self.window, plan)
        hidden = hidden + linear(self._output, attended.flatten(2))
        normed = normed_by(self._norms[1], hidden)
        if self._stacked_gate.is_stacked:
            gate, up = self._stacked_gate(normed).chunk(2, dim=-1)
        else:
            gate, up = linear(self._gate, normed), linear(self._up, normed)
        return add_product(hidden, self._down, self._activation(gate).mul_(up))

    def _projected(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Q and K side by side, (1, n, H + H_kv, P), and V (1, n, H_kv, P), before the rotary embedding."""
        if self._stacked_projections.is_stacked:
            all_heads = self._by_head(self._stacked_projections(normed))
            kv_heads = (all_heads.shape[2] - self.heads) // 2
            query_key, value = all_heads.split([self.heads + kv_heads, kv_heads], dim=2)
            if self._head_norms is None:
                return query_key, value
            query, key = query_key.split([self.heads, kv_heads], dim=2)
        else:
            query, key, value = (self._by_head(linear(project, normed)) for project in self._projections)
        if self._head_norms is not None:
            query, key = _head_normed(self._head_norms[0], query), _head_normed(self._head_norms[1], key)
        return torch.cat((query, key), dim=2), value

    def _by_head(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads


def signed_rotary(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (1, n, P) as :class:`FusedLlamaBlock` takes them, (1, n, 1, P): the sign is with the sine."""
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos.unsqueeze(2), signed.unsqueeze(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x cos + (-x2, x1) sin for halves x1, x2 of the last dimension; rounded where the families round."""
    return (x * cos).add_(torch.roll(x, x.shape[-1] // 2, -1) * sin)


def _head_normed(norm: Any, x: Tensor) -> Tensor:
    """Returns Q or K (1, n, heads, P) normalised by a module that somebody may have hooked."""
    if x.device.type == "cuda" and not is_changed(vars(norm)):
        return normed_by(norm, x)
    normed: Tensor = norm(x)
    return normed


def normed_by(norm: Any, hidden: Tensor) -> Tensor:
    """Returns hidden states (.., D) normalised by a module of such a family, which nobody has hooked."""
    weight = norm.weight
    if hidden.device.type == "cuda" and hidden.dtype == weight.dtype:
        # One operation, which rounds once where the family's own code rounds twice.
        return F.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32:
        # Narrower types are rounded between the family's steps; its own code does that right.
        normed: Tensor = norm(hidden)
        return normed
    scale = hidden.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * scale).mul_(weight)
