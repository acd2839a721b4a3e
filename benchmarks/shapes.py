"""Models at the shapes of published ones, with random weights: for speed, which does not depend on what they say."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import Mamba2Config, MistralConfig

#: What all models of a family have in common here.
_COMMON: dict[Any, dict[str, Any]] = {
    MistralConfig: {"sliding_window": None},
    Mamba2Config: {"expand": 2, "n_groups": 8, "conv_kernel": 4, "tie_word_embeddings": False},
}

#: Shapes by name: the family, the number of blocks, and the other sizes. The tiny ones are for trying benchmarks out.
SHAPES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    # Mistral-7B-v0.3
    "mistral-7b": (
        MistralConfig,
        32,
        {
            **{"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768},
            "rope_theta": 1e6,
        },
    ),
    # Mamba-Codestral-7B-v0.1
    "codestral-mamba-7b": (
        Mamba2Config,
        64,
        {"vocab_size": 32768, "hidden_size": 4096, "num_heads": 128, "head_dim": 64, "state_size": 128},
    ),
    "mistral-tiny": (
        MistralConfig,
        8,
        {
            **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 224},
            **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512},
        },
    ),
    "codestral-mamba-tiny": (
        Mamba2Config,
        8,
        {"vocab_size": 128, "hidden_size": 64, "num_heads": 16, "head_dim": 8, "state_size": 16},
    ),
}


def random_model(shape: str, blocks: int | None, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Returns a model in eval mode; ``blocks``: of a shallower one, None for all."""
    family, depth, sizes = SHAPES[shape]
    config = family(num_hidden_layers=blocks or depth, **_COMMON[family], **sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
        elif name.endswith("A_log"):  # heads that forget at different rates, as transformers begins with
            weight.data.copy_(torch.arange(1, len(weight) + 1).log())
        elif name.endswith("dt_bias"):  # steps of 0.001 to 0.1
            weight.data.uniform_(-6.9, -2.3)
        else:  # norms, biases and the constants of a recurrence
            weight.data.fill_(0.0 if "bias" in name else 1.0)
    # Rotary frequencies are no parameters, and are made with the model.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=model.config)
            module.inv_freq = fresh.inv_freq.to(device)
            module.original_inv_freq = module.inv_freq
    return model.eval().requires_grad_(False)
