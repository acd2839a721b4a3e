"""A backbone's configuration, read and judged before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynamax_lm_eval.backbones import aliases
from dynamax_lm_eval.config import UserError

#: Pure state-space models.
_RECURRENT = ("mamba", "mamba2", "falcon_mamba")


def is_recurrent(config: Any) -> bool:
    """Whether a configuration is that of a Mamba model."""
    return getattr(config, "model_type", None) in _RECURRENT


def copy_is_impossible(name: str) -> str:
    """Why ``state_mode=copy`` is refused for Mamba."""
    return (
        f"state_mode=copy is not possible on {name}: the states of Mamba blocks sum up the whole past, so there is "
        "nothing of a single token to copy; use recompute or skip"
    )


def load_config(source: str, backbone: str, options: Mapping[str, Any]) -> Any:
    """The backbone's configuration, before any weights.

    Raises:
        UserError: there is none to be had.
    """
    names = ("subfolder", "trust_remote_code", "gguf_file", "cache_dir", "token", "local_files_only")
    chosen = {name: options[name] for name in names if options.get(name)}
    try:
        return transformers.AutoConfig.from_pretrained(
            source, revision=str(options.get("revision") or "main"), **chosen
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone={backbone!r} is neither an alias ({', '.join(aliases.known())}), nor a folder with a model, "
            f"nor a model that could be had from the Hub: {' '.join(str(error).split())}"
        ) from error


def check_architecture(config: Any) -> None:
    """Raises UserError where a configuration is not that of a causal LM which can be run block by block."""
    model_type = getattr(config, "model_type", None)
    if config.is_encoder_decoder:
        raise UserError(
            f"{model_type!r} is an encoder-decoder (seq2seq) model; dynamax needs a decoder-only (causal) backbone"
        )
    if not is_recurrent(config) and any(name.startswith("mamba_") for name in vars(config)):
        raise UserError(
            f"{model_type!r} mixes attention and Mamba blocks; dynamax runs models of one kind of block: Transformers, "
            f"{', '.join(_RECURRENT)}"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "auto_map", None):
        raise UserError(f"{model_type!r} is not a causal language model of transformers")


def check_device(device: Any) -> None:
    """Raises UserError where a device, as the harness names it, does not exist on this machine."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found += ["mps", "mps:0"]
    for kind in ("npu", "xpu", "hpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [f"{kind}:{i}" for i in range(module.device_count())]
    if device not in found:
        raise UserError(f"device={device!r} does not exist here; give one of {', '.join(found)} (--device, device=)")


def check_token_ids(ids: Mapping[str, Any], vocabulary: int) -> None:
    """Raises UserError where an argument names a token by an id that a vocabulary of this size does not have."""
    for name, value in ids.items():
        if isinstance(value, int) and value >= vocabulary:
            raise UserError(f"{name}={value} is no token of this backbone, whose ids are 0 to {vocabulary - 1}")


def check_peft(adapter: str) -> None:
    """Raises UserError for adapters that add virtual tokens: positions and compute would not be what is counted."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise UserError(f"peft={adapter!r} needs the package peft; run: pip install peft") from None
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"peft={adapter!r} could not be read: {' '.join(str(error).split())}") from error
    if config.is_prompt_learning:
        raise UserError(
            f"peft={adapter!r} is {config.peft_type}, which adds virtual tokens; only LoRA-like adapters work"
        )
