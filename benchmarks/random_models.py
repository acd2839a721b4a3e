"""Models of published sizes with random weights, made where they run; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

#: Published sizes, by name; the tiny ones have the same proportions.
_MISTRAL = {
    **{"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
}
_CODESTRAL = {
    **{"vocab_size": 32768, "hidden_size": 4096, "num_heads": 128, "head_dim": 64, "n_groups": 8, "state_size": 128},
    **{"expand": 2, "conv_kernel": 4, "tie_word_embeddings": False},
}
_TINY_MISTRAL = {
    **_MISTRAL,
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512},
}
_TINY_MAMBA = {**_CODESTRAL, "vocab_size": 128, "hidden_size": 64, "num_heads": 16, "head_dim": 8, "state_size": 16}
SHAPES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "mistral": (transformers.MistralConfig, _MISTRAL, 32),
    "codestral": (transformers.Mamba2Config, _CODESTRAL, 64),
    "tiny-mistral": (transformers.MistralConfig, _TINY_MISTRAL, 8),
    "tiny-codestral": (transformers.Mamba2Config, _TINY_MAMBA, 8),
}


def random_model(shape: str, device: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A model of a shape with random weights, made where they stay."""
    make, sizes, blocks = SHAPES[shape]
    config = make(**{"num_hidden_layers": blocks, **sizes, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            parameter.copy_(torch.arange(1, len(parameter) + 1).log())
        elif last == "dt_bias":
            parameter.uniform_(-6.9, -2.3, generator=generator)  # steps of 0.001 to 0.1
        elif parameter.ndim == 1 and last != "bias":
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    for module in list(model.modules()):
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            fresh = type(module)(config=config).to(device)
            module._buffers.update(fresh._buffers)
    model.generation_config.eos_token_id = None  # texts are as long as they are asked to be
    return model
