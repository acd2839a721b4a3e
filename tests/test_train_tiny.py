"""The script that makes the tiny models: its losses at full depth and at exits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dynamax_lm_eval.backbones import MambaBackbone
from dynamax_lm_eval.models.blocks import find_blocks

ROWS = [[5, 9, 1400, 77, 3, 8], [4, 4, 2000]]


@pytest.fixture(scope="module")
def script() -> Any:
    file = Path(__file__).parents[1] / "examples" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hidden_after(model: Any, layer: int, row: list[int]) -> torch.Tensor:
    """The hidden states (T, D) of a row after some blocks, by transformers."""
    kept: list[Any] = []
    block = find_blocks(model, 12, "the model")[layer - 1]
    handle = block.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        model(torch.tensor([row]), use_cache=False)
    handle.remove()
    (output,) = kept
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden[0]


@pytest.mark.parametrize("architecture", ["llama", "mamba2"])
def test_losses_are_those_of_read_outs_by_norm_and_head(script: Any, architecture: str) -> None:
    model = script.make_model(architecture, seed=0)
    mamba = MambaBackbone(model) if architecture == "mamba2" else None
    with torch.no_grad():
        found = script.losses(model, mamba, ROWS, (6, 10))
        plain = script.losses(model, mamba, ROWS)
    norm = model.model.norm if mamba is None else model.backbone.norm_f
    for losses, layer in zip(found, (12, 6, 10), strict=True):
        expected = []
        for row in ROWS:
            with torch.no_grad():
                logits = model.lm_head(norm(hidden_after(model, layer, row)))[:-1]
            expected.append(F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none"))
        torch.testing.assert_close(losses, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert len(plain) == 1
    torch.testing.assert_close(plain[0], found[0])
