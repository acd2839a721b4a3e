"""Transformer decoders of transformers, run block by block over flat ragged batches.

The blocks are the model's own, unmodified: an attention function registered with transformers reads the
caches (``attention``), and a cache object scatters what blocks write. Of the families only the names of
modules and the layout of the fused K/V projections are known here; whatever else a family does differently is found
by the comparison with ``model.forward`` at load.

N tokens of a flat batch, n in flight, m that left, D hidden, H_kv K/V heads, P head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import RowLayout, States, full_depth_layout
from dynamax_lm_eval.backbones.compare import is_close
from dynamax_lm_eval.backbones.decoder import DecoderBackbone
from dynamax_lm_eval.backbones.linear import linear
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.forward_pass import (
    ActiveTokens,
    RotaryEmbeddings,
    TransformerPass,
    _Scatter,
    _Step,
)
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.types import StateMode


@dataclass(frozen=True)
class _Block:
    """One block, and what is known of it."""

    module: nn.Module
    norm: nn.Module
    rotary_key: str | None  # layer type where the family has one rotary embedding per type
    kv_heads: int
    head_dim: int
    project: families.Projector
    cost: BlockCost


class TransformerBackbone(DecoderBackbone):
    """A causal Transformer decoder whose blocks attend through transformers' attention interface."""

    def __init__(self, model: Any, max_length: int | None = None) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            max_length: longest row that will be run; decides whether length-dependent rotary embeddings can be used.

        Raises:
            UserError: the architecture is not one that can be run block by block.
        """
        super().__init__(model, families.FINAL_NORMS)
        self._rotary = families.child(self._decoder, ("rotary_emb",), f"rotary position embeddings in {self.name}")
        self._rotary_per_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        families.check_rope(self.config, max_length)

        # The configuration object that the blocks look their attention function up in.
        attn: Any = families.child(self._layers[0], families.ATTENTIONS, f"attention in {self.name}")
        self._block_config: Any = attn.config
        parameters = inspect.signature(self._layers[0].forward).parameters
        self._cache_argument = "layer_past" if "layer_past" in parameters else "past_key_values"
        self.blocks = [self._describe(i, module) for i, module in enumerate(self._layers)]
        self.fused_blocks = [FusedLlamaBlock.of(block.module, block.head_dim) for block in self.blocks]
        self.cost = BackboneCost(
            tuple(block.cost for block in self.blocks),
            lm_head=self.hidden_size * self.vocab_size,
        )

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> AttentionStates:
        return AttentionStates(self.num_layers, capacity, prefix_capacity, row_stride)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> TransformerPass:
        assert isinstance(states, AttentionStates)
        return TransformerPass(self, states, layout, materialize_all)

    def readout(self, hidden: Tensor) -> Tensor:
        logits = linear(self._lm_head, self._final_norm(hidden)).contiguous()
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        if mode != "copy" or not exit_layers:
            return
        later = self.blocks[min(exit_layers) - 1 :]
        if len({(block.rotary_key, block.kv_heads, block.head_dim) for block in later}) > 1:
            kinds = sorted({str(block.rotary_key) for block in later})
            raise UserError(
                f"state_mode=copy is not possible on {self.name}: its blocks {min(exit_layers)}..{self.num_layers} "
                f"differ in rotary embedding or K/V shape ({', '.join(kinds)}), so the K and V of one mean nothing "
                "to another; use recompute or skip"
            )

    def row_bytes(self, num_tokens: int) -> int:
        per_token = sum(2 * block.kv_heads * block.head_dim for block in self.blocks)
        return per_token * num_tokens * torch.finfo(self.model.dtype).bits // 8

    @torch.no_grad()
    def observe(self, ids: Tensor) -> None:
        # Configurations carry windows that no block uses; what reaches the attention function decides.
        observed = []
        for block, step in enumerate(self._steps(ids), start=1):
            observed.append(replace(self.blocks[block - 1].cost, window=step.run.last_window))
        self.cost = replace(self.cost, blocks=tuple(observed))

    @torch.no_grad()
    def verify_recompute(self, ids: Tensor) -> None:
        positions = torch.arange(len(ids), device=self.device)
        for block, step in enumerate(self._steps(ids), start=1):
            rotary = self.position_embeddings(positions.unsqueeze(0), step.before)
            key, value = step.run.project(block, step.before, rotary)
            for name, cache, ours in (
                ("K", step.states.key_cache(block), key),
                ("V", step.states.value_cache(block), value),
            ):
                if not is_close(ours, cache[positions]):
                    raise UserError(
                        f"{self.name}: the {name} that state recompute projects in block {block} differs from what the "
                        f"block writes; use state_mode=skip or copy"
                    )

    def _steps(self, ids: Tensor) -> Iterator[_Step]:
        """Runs one row block by block, and yields after each."""
        states = self.new_states(len(ids))
        slot = states.allocate_row(len(ids))
        run = self.start_pass(states, full_depth_layout([slot], [len(ids)], self.num_layers))
        hidden = self.embed(ids)
        for block in range(1, self.num_layers + 1):
            before = hidden
            with self.running():
                hidden = run.run_block(block, np.arange(len(ids)), hidden)
                yield _Step(run, states, before)

    @contextmanager
    def running(self) -> Iterator[None]:
        config = self._block_config
        before = config._attn_implementation
        config._attn_implementation = attention.NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    def position_embeddings(self, positions: Tensor, like: Tensor) -> RotaryEmbeddings:
        """Returns (cos, sin) of shape (1, N, P) for positions (1, N), by rotary key."""
        if not self._rotary_per_type:
            return RotaryEmbeddings({None: self._rotary(like, positions)})
        keys = {block.rotary_key for block in self.blocks}
        return RotaryEmbeddings({key: self._rotary(like, positions, key) for key in keys})

    def call_block(self, block: int, hidden: Tensor, scatter: _Scatter, active: ActiveTokens) -> Tensor:
        """Runs block ``block`` (1-based) on (1, n, D), as its family wrote it."""
        described = self.blocks[block - 1]
        output: Any = described.module(
            hidden,
            attention_mask=None,
            position_ids=active.positions,
            position_embeddings=active.rotary[described.rotary_key],
            use_cache=True,
            plan=active.plan,
            **{self._cache_argument: scatter},
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _describe(self, index: int, module: nn.Module) -> _Block:
        where = f"block {index + 1} of {self.name}"
        attn: Any = families.child(module, families.ATTENTIONS, f"attention in {where}")
        norm = families.child(module, ("input_layernorm",), f"norm before attention in {where}")
        head_dim = int(getattr(attn, "head_dim", 0) or getattr(attn, "head_size", 0))
        heads = int(self.config.num_attention_heads)
        kv_heads = int(getattr(self.config, "num_key_value_heads", None) or heads)
        cost = BlockCost(
            weights=families.linear_macs(module, self.name),
            attention_width=heads * head_dim,
            window=attn.sliding_window if hasattr(attn, "sliding_window") else families.config_window(self.config),
            state_recompute=sum(families.linear_macs(part, self.name) for part in families.kv_modules(attn)),
        )
        return _Block(
            module=module,
            norm=norm,
            rotary_key=self.config.layer_types[index] if self._rotary_per_type else None,
            kv_heads=kv_heads,
            head_dim=head_dim,
            project=families.kv_projector(attn, heads, kv_heads, head_dim, self.name),
            cost=cost,
        )
