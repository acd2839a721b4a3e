"""Versions and hardware, for the JSON line that ends every benchmark."""

from __future__ import annotations

import platform
from typing import Any

import lm_eval
import torch
import transformers

import dynamax_lm_eval


def environment(device: str) -> dict[str, Any]:
    """What a number was measured with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dynamax": dynamax_lm_eval.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
    }
