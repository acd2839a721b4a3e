"""Decoders whose blocks are of the Llama kind, in the fewest operations.

Blocks run in their fused form, or, where somebody has hooked their modules, as their family wrote them. Other
Transformers are run by :mod:`dynamax_lm_eval.backbones.replay`.

N tokens of a flat batch, n in flight, m that left, D hidden, P head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.base import RowLayout, States
from dynamax_lm_eval.backbones.decoder import DecoderBackbone
from dynamax_lm_eval.backbones.linear import is_changed
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock, normed_by
from dynamax_lm_eval.backbones.transformer.fused_pass import FusedPass, RotaryEmbeddings, RotaryTable
from dynamax_lm_eval.backbones.transformer.kv_cache import AttentionStates
from dynamax_lm_eval.compute.cost import BackboneCost, BlockCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.placement import moved
from dynamax_lm_eval.types import StateMode

#: Rotary embeddings that a table has at least, so that rows seldom outgrow it: 3 MiB for heads of 128 channels.
_POSITIONS = 4096


class TransformerBackbone(DecoderBackbone):
    """A causal Transformer decoder of Llama's kind: Llama, Mistral, Qwen2, Qwen3."""

    rung = "fused"
    resumes = True
    takes_back = True

    def __init__(self, model: Any, max_length: int | None = None) -> None:
        """
        Args:
            model: a causal LM of transformers, in eval mode; may be wrapped by PEFT.
            max_length: longest row that will be run; decides whether length-dependent rotary embeddings can be used.

        Raises:
            UserError: its blocks are of another kind.
        """
        super().__init__(model, families.FINAL_NORMS)
        self._rotary = families.child(self._decoder, ("rotary_emb",), f"rotary position embeddings in {self.name}")
        families.check_rope(self.config, max_length)
        attn: Any = families.child(self._layers[0], ("self_attn",), f"attention in {self.name}")
        # The configuration object that the blocks look their attention function up in.
        self._block_config: Any = attn.config
        parameters = inspect.signature(self._layers[0].forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self.fused_blocks = FusedLlamaBlock.of_all(self._layers, self.name)
        if self.device.type == "cuda":
            # Weights that were stacked have left memory behind, in pieces too small for others of their kind.
            torch.cuda.empty_cache()
        self._norms_as_blocks = type(self._final_norm) is type(self._layers[0].input_layernorm)
        self._rotary_tables: dict[tuple[torch.device, torch.dtype], RotaryTable] = {}
        self.cost = BackboneCost(
            tuple(self._cost(module, fused) for module, fused in zip(self._layers, self.fused_blocks, strict=True)),
            lm_head=self.hidden_size * self.vocab_size,
        )

    @staticmethod
    def fits(model: Any) -> bool:
        """Returns whether the blocks of a model are of this kind."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
        try:
            blocks = find_blocks(inner, depth, type(inner).__name__)
        except UserError:
            return False
        return all(FusedLlamaBlock.of(block) is not None for block in blocks)

    def new_states(self, capacity: int, prefix_capacity: int = 0, row_stride: int | None = None) -> AttentionStates:
        return AttentionStates(self.num_layers, capacity, prefix_capacity, row_stride)

    def start_pass(self, states: States, layout: RowLayout, materialize_all: bool = False) -> FusedPass:
        assert isinstance(states, AttentionStates)
        return FusedPass(self, states, layout, materialize_all)

    def readout(self, hidden: Tensor) -> Tensor:
        return self.by_head(self._normed(hidden))

    def readout_of(self, hidden: Tensor, first: int, others: Tensor) -> Tensor:
        return self.by_head_rows(self._normed(hidden), first, others)

    def _normed(self, hidden: Tensor) -> Tensor:
        norm: Any = self._final_norm
        fused = hidden.device.type == "cuda" and self._norms_as_blocks and not is_changed(vars(norm))
        normed: Tensor = normed_by(norm, hidden) if fused else norm(hidden)
        return normed

    def check_state_mode(self, mode: StateMode, exit_layers: tuple[int, ...]) -> None:
        pass  # all blocks are alike, so every mode can be had

    def row_bytes(self, num_tokens: int) -> int:
        per_token = sum(int(part.out_features) for fused in self.fused_blocks for part in fused.kv_projections)
        return per_token * num_tokens * torch.finfo(self.model.dtype).bits // 8

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
        """Returns the rotary embeddings at positions (1, n), in the dtype and on the device of ``like``."""
        cos, sin = self._rotary(like, positions)
        return RotaryEmbeddings(moved(cos, like.device), moved(sin, like.device))

    def turning(self, distances: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sine (t, 1, P) that turn K by distances (t,) in tokens, in float32 on the device of ``like``.

        The sine as :func:`signed_rotary` makes it. Embeddings that scale attention too have done so already in K.
        """
        angles = self.position_embeddings(distances.unsqueeze(0), like.float())
        scale = getattr(self._rotary, "attention_scaling", 1.0)
        cos, signed = (part[0].float() / scale for part in angles.signed)
        return cos, signed

    def rotary_table(self, length: int, like: Tensor) -> RotaryTable | None:
        """Returns the rotary embeddings of ``length`` positions and more; None on a CPU, which makes them as fast."""
        if like.device.type != "cuda" or is_changed(vars(self._rotary)):
            return None
        table = self._rotary_tables.get((like.device, like.dtype))
        if table is None or len(table) < length:
            positions = torch.arange(max(_POSITIONS, 2 * length), device=like.device)
            table = RotaryTable(self.position_embeddings(positions.unsqueeze(0), like))
            self._rotary_tables[like.device, like.dtype] = table
        return table

    def call_block(
        self,
        block: int,
        hidden: Tensor,
        cache: Any,
        rotary: RotaryEmbeddings,
        positions: Tensor | None,
        plan: attention.AttentionPlan | None,
    ) -> Tensor:
        """Runs block ``block`` (1-based) on (1, n, D), as its family wrote it."""
        output: Any = self._layers[block - 1](
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotary.angles,
            use_cache=True,
            plan=plan,
            **{self._cache_argument: cache},
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _cost(self, module: Any, fused: FusedLlamaBlock) -> BlockCost:
        return BlockCost(
            weights=families.linear_macs(module, self.name),
            per_position=2 * fused.heads * fused.head_dim,
            window=fused.window,
            state_recompute=sum(families.linear_macs(part, self.name) for part in fused.kv_projections),
        )
