"""Models at the shapes of published ones, with random weights: for speed, which does not depend on what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import Mamba2Config, MistralConfig

#: Shapes by name: what makes the configuration of so many blocks.
SHAPES: dict[str, Callable[[int | None], Any]] = {
    # Mistral-7B-v0.3
    "mistral-7b": lambda blocks: MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks or 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rope_theta=1e6,
        sliding_window=None,
    ),
    # Mamba-Codestral-7B-v0.1
    "codestral-mamba-7b": lambda blocks: Mamba2Config(
        vocab_size=32768,
        hidden_size=4096,
        num_hidden_layers=blocks or 64,
        num_heads=128,
        head_dim=64,
        state_size=128,
        expand=2,
        n_groups=8,
        conv_kernel=4,
        tie_word_embeddings=False,
    ),
}


def random_model(shape: str, blocks: int | None, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Returns a model in eval mode; ``blocks``: of a shallower one, None for all."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape](blocks))
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
        else:  # norms, biases and the constants of a recurrence
            weight.data.fill_(0.0 if "bias" in name else 1.0)
    # Rotary frequencies are no parameters, and are made with the model.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=model.config)
            module.inv_freq = fresh.inv_freq.to(device)
            module.original_inv_freq = module.inv_freq
    return model.eval().requires_grad_(False)
