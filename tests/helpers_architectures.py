"""Tiny random models of every group of architectures that differ in what their blocks take, keep or compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from helpers import VOCAB

DEPTH = 6
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # Wide enough that confidences differ from token to token.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_MAMBA = {"mamba_d_state": 6, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
_GPT = {
    **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
_TWO_KINDS = ["sliding_attention", "full_attention"] * 3
_LATENT = {
    **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}

#: By group: the rung that a model of it runs on, and its configuration.
ARCHITECTURES: dict[str, tuple[str, Callable[[], Any]]] = {
    "attention or Mamba-2": (
        "mixed",
        lambda: hf.BambaConfig(attn_layer_indices=[1, 4], mamba_expand=2, mamba_d_conv=4, **_MAMBA, **_GQA),
    ),
    "attention and Mamba-2": (
        "mixed",
        lambda: hf.FalconH1Config(
            mamba_d_ssm=64, mamba_expand=2, head_dim=8, lm_head_multiplier=0.5, key_multiplier=0.4, **_MAMBA, **_GQA
        ),
    ),
    "attention, then Mamba-2": (
        "mixed",
        lambda: hf.Zamba2Config(
            **{**_SIZES, "num_key_value_heads": 4},
            **{"layers_block_type": ["linear_attention", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5]},
            **{"mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
            **{"adapter_rank": 4, "mamba_d_state": 6, "mamba_ngroups": 1, "chunk_size": 4, "num_mem_blocks": 1},
            # transformers' own step does not clamp, so with a limit its text would not be that of its forward.
            time_step_min=1e-9,
        ),
    ),
    "linear attention and experts": (
        "mixed",
        lambda: hf.Qwen3NextConfig(
            **{"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2, "head_dim": 8},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
            **{**_GQA, "initializer_range": 0.1},
        ),
    ),
    "experts": ("flat", lambda: hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_GQA)),
    "learned positions": ("flat", lambda: hf.GPT2Config(**_GPT)),
    "ALiBi": (
        "whole rows",
        lambda: hf.BloomConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            n_layer=DEPTH,
            n_head=4,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "soft-caps": (
        "flat",
        lambda: hf.Gemma2Config(
            head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **_GQA
        ),
    ),
    "inputs per block and shared K and V": (
        "flat",
        lambda: hf.Gemma3nTextConfig(
            **{"head_dim": 8, "sliding_window": 5, "layer_types": _TWO_KINDS, "num_kv_shared_layers": 2},
            **{"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
            **{"activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4},
            **_GQA,
        ),
    ),
    "latent attention": ("flat", lambda: hf.DeepseekV3Config(**_SIZES, **_LATENT)),
    "two attentions in a block": (
        "flat",
        lambda: hf.LongcatFlashConfig(
            **{**_SIZES, "num_hidden_layers": 2 * DEPTH, "num_layers": DEPTH, "ffn_hidden_size": 48, "head_dim": 4},
            **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
            **{"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 1},
        ),
    ),
    "sinks": (
        "flat",
        lambda: hf.GptOssConfig(
            **{"head_dim": 8, "sliding_window": 5, "layer_types": _TWO_KINDS, "num_local_experts": 4},
            **{"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            **_GQA,
        ),
    ),
    "norm after attention": ("flat", lambda: hf.Olmo2Config(**_GQA)),
    "local and global heads, positions counted": (
        "row modules",
        lambda: hf.GPTNeoConfig(
            **{"vocab_size": VOCAB, "hidden_size": 32, "num_layers": DEPTH, "num_heads": 4, "initializer_range": 0.2},
            **{"attention_types": [[["global", "local"], 3]], "window_size": 5, "max_position_embeddings": 256},
            **{"bos_token_id": 1, "eos_token_id": 2},
        ),
    ),
}


@functools.cache
def architecture(group: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a group; the same weights in every test."""
    torch.manual_seed(sorted(ARCHITECTURES).index(group))
    # Older releases of transformers choose an attention for Gemma 2 that leaves the soft-cap out.
    attention = {"attn_implementation": "eager"} if group == "soft-caps" else {}
    model = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[group][1](), **attention).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.2, generator=generator)
            # Norms, biases, sinks and decays: initial values of ones and zeros hide mistakes.
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.2, generator=generator)
    return model.to(dtype)
