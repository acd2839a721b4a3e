"""What generations cost beside MACs: weights that they read, and the least time that a known device would need.

Where few rows decode at a time, reading weights decides the clock (Williams, Waterman, Patterson 2009, "Roofline"). All
is counted as if each request ran alone, token by token, so that it does not depend on batches.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.types import RooflineDevice


class Device(NamedTuple):
    """The limits of a device, as its maker's data sheet has them."""

    bytes_per_second: float
    #: Dense, in bfloat16 with float32 sums.
    flops_per_second: float


#: From NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, L40S, and RTX 4090.
DEVICES: dict[RooflineDevice, Device] = {
    "a100": Device(2.039e12, 312e12),
    "h100": Device(3.35e12, 989e12),
    "h200": Device(4.8e12, 989e12),
    "l40s": Device(0.864e12, 362e12),
    "rtx4090": Device(1.008e12, 165e12),
}


def bytes_per_weight(model: nn.Module) -> float:
    """Returns the mean number of bytes that a parameter takes; those of quantised layers hold several weights each."""
    sizes = [(parameter.numel() * parameter.element_size(), _weights(parameter)) for parameter in model.parameters()]
    return sum(size for size, _ in sizes) / max(sum(count for _, count in sizes), 1)


def _weights(parameter: torch.Tensor) -> int:
    """Returns how many weights a parameter stands for."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two in a byte
    shape = getattr(state, "shape", None)
    return int(torch.Size(shape).numel()) if shape is not None else parameter.numel()


def weights(total: ComputeRecord, size: float) -> dict[str, Any] | None:
    """Returns the bytes of weights per generated token, and the full model's; None without generations.

    Args:
        total: of the generations.
        size: bytes per weight.
    """
    if not total.generated_tokens:
        return None
    per_token = size / total.generated_tokens
    return {
        "bytes_per_generated_token": total.weights_read * per_token,
        "bytes_per_generated_token_full": total.full_weights_read * per_token,
        "reduction": total.full_weights_read / total.weights_read,
    }


def roofline(total: ComputeRecord, size: float, name: RooflineDevice | None) -> dict[str, Any] | None:
    """Returns the least seconds that a device needs for generations, one after the other, and for the full model's.

    None where no device is named or nothing was generated. Scores, which are made in one pass, are left out.
    """
    if name is None or not total.generated_tokens:
        return None
    device = DEVICES[name]

    def seconds(read: int, macs: int) -> float:
        return max(read * size / device.bytes_per_second, 2 * macs / device.flops_per_second)

    return {
        "device": name,
        "bytes_per_second": device.bytes_per_second,
        "flops_per_second": device.flops_per_second,
        "seconds": seconds(total.weights_read, total.total_macs),
        "seconds_full": seconds(total.full_weights_read, total.full_total_macs),
    }


def drafts(total: ComputeRecord) -> dict[str, Any] | None:
    """Returns what became of exits that were drafts; None where there were none."""
    drafted, right = (
        Counter(layer for response in responses for layer in response)
        for responses in (total.drafts, total.right_drafts)
    )
    if not drafted:
        return None
    return {
        "drafted": total.drafted_tokens,
        "accepted": total.accepted_drafts,
        "draft_acceptance": total.accepted_drafts / total.drafted_tokens,
        "by_exit": {
            str(layer): {"drafted": count, "accepted": right[layer]} for layer, count in sorted(drafted.items())
        },
        "verifications": total.verifications,
        # The full model's own token behind the drafts is one as well.
        "accepted_length": 1 + total.accepted_drafts / total.verifications,
    }
