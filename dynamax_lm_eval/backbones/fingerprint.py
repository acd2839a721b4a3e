"""Short identities of a model: of its weights in memory, and of its configuration."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

_SAMPLES = 64


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, types and up to 64 evenly spaced values of every weight and buffer.

    It tells models apart that differ by training, merging or quantisation, in a fraction of a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            chosen = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous()
            digest.update(chosen.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(config: Any) -> str:
    """sha256 over a transformers configuration, without paths and versions: rope settings, windows and so on."""
    settings = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
