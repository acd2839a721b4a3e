"""Which causal language models of the installed transformers run, and how: writes the table of ``docs/models.md``.

    python benchmarks/architecture_table.py --output docs/models.md

A random model of six small blocks for every decoder-only type that transformers maps to a causal language model, made
from its default configuration with small sizes. Each is loaded as a run loads it, its greedy texts are compared with
``model.generate`` (or, where that differs from the model's forward, with the forward), and every state mode is asked
for. What cannot be built small by these rules is listed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.generation import generate_all
from dynamax_lm_eval.engine.parity import check_policy, checked_engine
from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.loading import check_architecture

DEPTH, VOCAB, NEW_TOKENS = 6, 128, 12
#: Patterns of names in a configuration, and the small sizes that they get; the first that fits counts.
SIZES: list[tuple[str, Any]] = [
    (r"vocab_size(_per_layer_input)?|decoder_vocab_size", VOCAB),
    (r"(moe|shared|shared_expert|moe_shared_expert|expert_ffn|shared_experts)_?(intermediate|hidden)_size", 32),
    (r"(dense_)?intermediate_size(_mlp)?|ffn_(hidden_size|dim)|dim_ff|dff|decoder_ffn_dim|feed_forward_size", 96),
    (
        r"hidden_size|d_model|n_embd|embedding_(dim|size)|emb_dim|word_embed_proj_dim|lru_width|attention_hidden_size",
        64,
    ),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_blocks|num_decoder_layers", DEPTH),
    (r"(num|swa_num|linear_num)_(attention|value|query)?_?heads|n_heads?|attention_heads|decoder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads", 2),
    (
        r"(swa_|global_|linear_key_|linear_value_|attention_|index_|qk_nope_|v_)?head_dim|kv_channels|kv_lora_rank|d_kv",
        16,
    ),
    (r"q_lora_rank", 24),
    (r"qk_rope_head_dim|rotary_dim|mamba_(d_state|chunk_size|n_heads)|state_size|chunk_size|ssm_state_size", 8),
    (r"mamba_num_heads|mamba_headdim_count|hidden_size_per_layer_input|laurel_rank|d_rel", 8),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|index_n_heads|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers|mamba_n_groups", 1),
    (r"(attention_|sliding_)?(window|chunk)(_size)?|sliding_window|attention_(window|chunk)_size|index_topk", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r"initializer_range|init_std", 0.2),
    (r"query_pre_attn_scalar", 16),
]
#: Encoders, and decoders of something else than text alone, that no mapping tells apart.
OTHERS = {"bert-generation", "xlnet", "whisper", "musicgen", "musicgen_melody", "trocr", "moshi", "phi4_multimodal"}
#: What these rules get wrong.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3, "block_multiple_of": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "n_groups": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "hybrid_layer_ids": [1, 3, 5],
        **{"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"num_key_value_heads": 4, "adapter_rank": 4, "mamba_d_state": 8},
    },
    "zamba": {
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"n_mamba_heads": 2, "num_key_value_heads": 4},
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "minicpm3": {"dim_model_base": 32},
    "longcat_flash": {"head_dim": 8, "num_layers": 3, "num_hidden_layers": 6, "zero_expert_num": 2},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "head_dim": 8},
    **{name: {"head_dim": 8, "qk_head_dim": None} for name in ("axk1", "deepseek_v3", "youtu")},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
        **{"indexer_compress_ratio": 4, "hc_lowrank": 8, "hc_count": 2},
        "layer_types": ["linear_attention", "indexed_attention"] * 3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "hrm_text": {"num_layers_per_stack": 1},
    "xlstm": {"qk_dim_factor": 1.0},
    "cpmant": {"prompt_length": 4},
    "falcon": {"num_kv_heads": 4},
    "olmo_hybrid": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
}


@dataclass(frozen=True)
class Line:
    """What was found of one type."""

    model_type: str
    rung: str
    modes: tuple[str, ...]
    note: str


def is_decoder(model_type: str) -> bool:
    """Returns whether a type is a decoder-only language model, and no encoder or half of something."""
    if model_type.endswith("_assistant") or model_type in OTHERS:
        return False  # the former are draft heads of other models
    others = (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    seen_with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return not any(model_type in mapping for mapping in others) and model_type not in seen_with_images


def small_config(model_type: str) -> Any:
    """Returns the default configuration of a type with small sizes."""
    cls = CONFIG_MAPPING[model_type]
    default = cls().to_dict()
    changes: dict[str, Any] = {}
    for name, value in default.items():
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if size is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            changes[name] = size
        elif name.endswith("_token_id") and isinstance(value, int):
            changes[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, 5)
    kinds = default.get("layer_types")
    if isinstance(kinds, list) and kinds:
        distinct = sorted(set(kinds), reverse=True)
        changes["layer_types"] = [distinct[i % len(distinct)] for i in range(DEPTH)]
    if default.get("kv_lora_rank") is not None:
        changes["num_key_value_heads"] = 4
        if default.get("head_dim") == default.get("qk_rope_head_dim"):
            changes["head_dim"] = 8
    return cls(**(changes | SPECIAL.get(model_type, {})))


def small_model(model_type: str) -> Any:
    """Returns a random model of a type."""
    torch.manual_seed(0)
    config = small_config(model_type)
    with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > 3e7:
            raise ValueError(f"{size / 1e6:.0f} M parameters")
    model = transformers.AutoModelForCausalLM.from_config(small_config(model_type)).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all() or (parameter.ndim > 1 and float(parameter.abs().max()) == 0):
                parameter.normal_(0, 0.2, generator=generator)
            elif parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def texts_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    policy = ExitPolicy(engine.backbone.num_layers)
    requests = [GenerationRequest(prompt, NEW_TOKENS, policy, Sampler(), lambda _: False) for prompt in prompts]
    return [generation.tokens for generation in generate_all(engine, requests, len(prompts))]


@torch.no_grad()
def by_forward(model: Any, prompt: list[int]) -> list[int]:
    """Returns greedy tokens by whole forwards without a cache."""
    row = list(prompt)
    for _ in range(NEW_TOKENS):
        row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


def measured(model_type: str) -> Line:
    try:
        check_architecture(CONFIG_MAPPING[model_type]())
        model = small_model(model_type)
    except UserError as error:
        return Line(model_type, "refused", (), str(error).partition(";")[0])
    except Exception as error:
        return Line(model_type, "not tried", (), f"no small model could be built ({type(error).__name__})")
    try:
        depth = len(find_blocks(model, getattr(model.config, "num_hidden_layers", None), model_type))
        engine = checked_engine(model, ExitPolicy(depth), 256)
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in (5, 29, 13)]
        note, ours = "", texts_of(engine, prompts)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
        if ours != theirs:
            assert ours == [by_forward(model, prompt) for prompt in prompts], "other texts than transformers'"
            note = "its own `generate` differs from its forward; texts are the forward's"
    except UserError as error:
        return Line(model_type, "refused", (), str(error).partition(";")[0])
    modes = []
    for mode in ("recompute", "skip", "copy"):
        with contextlib.suppress(UserError):
            check_policy(engine, ExitPolicy(depth, (depth // 2,), (0.5,), state_mode=mode))  # type: ignore[arg-type]
            modes.append(mode)
    if "recompute" not in modes:  # another way may do
        exits = ExitPolicy(depth, (depth // 2,), (0.5,))
        with contextlib.suppress(UserError):
            rung = checked_engine(model, exits, 256).backbone.rung
            modes.insert(0, f"recompute (as {rung})")
    return Line(model_type, engine.backbone.rung, tuple(modes), note)


def page(lines: list[Line]) -> str:
    rungs = Counter(line.rung for line in lines)
    counts = ", ".join(f"{count} {rung}" for rung, count in rungs.most_common())
    rows = [
        f"| `{line.model_type}` | {line.rung} | {', '.join(line.modes) or 'none'} | {line.note} |" for line in lines
    ]
    version = transformers.__version__
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `benchmarks/architecture_table.py`; do not edit. Random models of six small blocks of every",
            f"decoder-only type of transformers {version}, {len(lines)} in all:",
            f"{counts}.",
            "",
            "Each was compared with its own forward at load, as every run does, and its greedy texts of three prompts",
            "in one batch with `model.generate`. [architecture.md](architecture.md) says what the ways to run and the",
            "state modes mean.",
            "",
            "| type | runs as | state modes with exits | note |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="types, separated by commas")
    parser.add_argument("--output", type=Path, help="the page; without one it is printed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    types = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if is_decoder(name)]
    lines = []
    for model_type in args.only.split(",") if args.only else sorted(types):
        with contextlib.redirect_stderr(io.StringIO()):
            lines.append(measured(model_type))
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text(page(lines))


if __name__ == "__main__":
    main()
