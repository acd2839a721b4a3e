"""A short identity of weights in memory."""

from __future__ import annotations

import hashlib

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
