"""Tiny random models of every tested family, and texts for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCAB = 97
LAYERS = 6
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide enough that confidences differ from token to token.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_GQA = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GEMMA_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2
#: Sliding windows are shorter than the prompts of the tests.
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_SIZES),
    "mistral": lambda: hf.MistralConfig(sliding_window=5, **_SIZES),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(head_dim=16, **_SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(
        head_dim=16, sliding_window=5, layer_types=_GEMMA_TYPES, query_pre_attn_scalar=16, **_SIZES
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_NO_GQA),
    "phi3": lambda: hf.Phi3Config(sliding_window=7, **_SIZES),
}
TRANSFORMERS = tuple(_CONFIGS)
_MAMBA_SIZES = {
    **{key: value for key, value in _SIZES.items() if "heads" not in key and not key.startswith(("inter", "max"))},
    "state_size": 6,
    "expand": 2,
}
#: Groups share B and C; chunks are shorter than the prompts of the tests, and some prompts than the convolution.
_CONFIGS |= {
    "mamba2": lambda: hf.Mamba2Config(num_heads=8, head_dim=8, n_groups=2, chunk_size=4, **_MAMBA_SIZES),
    "mamba": lambda: hf.MambaConfig(**_MAMBA_SIZES),
    "falcon_mamba": lambda: hf.FalconMambaConfig(**_MAMBA_SIZES),
}
MAMBAS = ("mamba2", "mamba")
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str, num_layers: int = LAYERS) -> Any:
    """The configuration of a family's model, of any depth; blocks are of one kind where it is another."""
    config = _CONFIGS[family]()
    if num_layers != LAYERS:
        config.num_hidden_layers = num_layers
        if "layer_types" in vars(config) and config.layer_types:
            config.layer_types = config.layer_types[:1] * num_layers
    return config


@functools.cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family; the same weights in every test."""
    torch.manual_seed(FAMILIES.index(family))
    model = hf.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    if "mamba" in family:
        # Their own initialisation remembers next to nothing and gives all heads the same skip connection.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif name.endswith("in_proj.weight"):
                parameter.data *= 2
    return model.to(dtype)


def random_ids(length: int, seed: int) -> list[int]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


TASKS = Path(__file__).parent / "tasks"
TEXT = (
    "The quick brown fox jumps over the lazy dog. A stitch in time saves nine, and nobody knows where the time goes. "
    "Question: what is the capital of France? Answer: Paris is the capital of France, on the river Seine.\n"
    "Question: who wrote Hamlet? Answer: William Shakespeare wrote Hamlet and many other plays.\n"
)


def train_tokenizer(vocab_size: int = VOCAB) -> hf.PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_model(family: str, folder: Path) -> Path:
    """A tiny model with its tokenizer, as a user would have it."""
    tiny_model(family).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def launcher(processes: int) -> list[str]:
    """Arguments of Python before those of a command that several processes run; the launcher finds a free port."""
    return ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={processes}"]
