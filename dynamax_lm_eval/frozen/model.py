"""Loads a frozen backbone to read text with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import checked_engine, engine_without_weights
from dynamax_lm_eval.exits.checkpoint import BackboneIdentity
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.frozen.text import check_template
from dynamax_lm_eval.models import aliases, loading
from dynamax_lm_eval.models.blocks import find_blocks
from dynamax_lm_eval.models.fingerprint import adapter_fingerprint, files_fingerprints, model_fingerprints


@dataclass(frozen=True)
class FrozenBackbone:
    """The frozen model, its tokenizer, and what a checkpoint says of it."""

    engine: Engine
    tokenizer: Any
    identity: BackboneIdentity
    activation: str
    dtype: str
    #: Fingerprints that earlier versions made of its weights.
    former: tuple[str, ...] = ()


def read_config(options: FrozenOptions) -> Any:
    """Returns the backbone's configuration, before any weights are read.

    Raises:
        UserError: it cannot be had, or its architecture cannot be run block by block.
    """
    config = loading.load_config(aliases.resolve_backbone(options.backbone), options.backbone, _load_options(options))
    loading.check_architecture(config)
    return config


def read_structure(options: FrozenOptions, config: Any) -> Any:
    """Returns the backbone of a configuration without weights; None where it cannot be built."""
    return loading.model_without_weights(config, _load_options(options))


def _load_options(options: FrozenOptions) -> dict[str, Any]:
    """Returns arguments of transformers' ``from_pretrained``."""
    return {"revision": options.revision or "main", "trust_remote_code": options.trust_remote_code}


def load_backbone(options: FrozenOptions, device: torch.device | None = None) -> FrozenBackbone:
    """Loads the backbone that ``options`` name, and compares the layer loop with its forward.

    Args:
        options: the model, its longest row, and how it is loaded.
        device: where it is put; None: where ``options.device`` says.

    Raises:
        UserError: it cannot be had, or cannot be run block by block.
    """
    if device is None:
        device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    config, source = read_config(options), aliases.resolve_backbone(options.backbone)
    dtype = _dtype(options.dtype, device)
    shared = _load_options(options)
    engine_without_weights(read_structure(options, config), options.seq_len)
    name = f"--backbone {options.backbone!r}"
    with loading.naming(f"the tokenizer of {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
    check_template(options.template, tokenizer)
    models = loading.CompleteModels(loading.auto_class(config), lambda _: name)
    model = models.from_pretrained(source, dtype=dtype, **shared)
    fingerprints = files_fingerprints(source, shared)
    if options.peft is not None:
        model = _adapted(model, options.peft)
        fingerprints = fingerprints and fingerprints.with_adapter(adapter_fingerprint(options.peft))
    model = model.to(device).eval().requires_grad_(False)
    # Rows are cut by --seq_len; the tokenizer's own limit is none of this run's.
    tokenizer.model_max_length = int(1e30)
    text = config.get_text_config()
    depth = len(find_blocks(model, int(text.num_hidden_layers), type(model).__name__))
    engine = checked_engine(model, ExitPolicy(depth), options.seq_len)
    fingerprints = fingerprints or model_fingerprints(model)
    return FrozenBackbone(
        engine=engine,
        tokenizer=tokenizer,
        identity=BackboneIdentity(
            id=aliases.HUB_ALIASES.get(options.backbone, options.backbone),
            revision=options.revision or "main",
            model_type=config.model_type,
            hidden_size=engine.backbone.hidden_size,
            num_layers=depth,
            fingerprint=fingerprints.current,
        ),
        activation=str(getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu"),
        dtype=str(dtype).removeprefix("torch."),
        former=fingerprints.former,
    )


def _adapted(model: Any, adapter: str) -> Any:
    """Returns a model under the PEFT adapter in a folder, as an evaluation with ``peft=`` has it."""
    from peft import PeftModel

    loading.check_peft(adapter)
    with loading.naming(f"peft={adapter!r}"):
        adapted = PeftModel.from_pretrained(model, adapter)
        loading.check_adapter_weights(adapted, adapter, "main")
    return adapted


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the data type of this name; ``auto`` means bfloat16 where the hardware computes with it, else float32."""
    if name != "auto":
        named: torch.dtype = getattr(torch, name)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported else torch.float32
