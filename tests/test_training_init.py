"""A training that goes on from other exits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engine import exits_config, varied_classifiers
from helpers_training import train
from test_adapters import exits_with

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint
from dynamax_lm_eval.exits.checkpoint import ExitCheckpoint
from dynamax_lm_eval.training.init import start_from


def saved(folder: Path, **changes: Any) -> ExitCheckpoint:
    config = exits_config(**changes)
    exits = exits_with(config.adapter) if config.adapter != "none" else varied_classifiers(config)
    return checkpoint.save(folder, config, exits)


def test_weights_are_those_of_the_other_exits_and_a_new_mlp_changes_nothing(tmp_path: Path) -> None:
    earlier = saved(tmp_path, adapter="affine")
    config = exits_config(adapter="swiglu:5", classifiers=("mamba", "calm"))
    classifiers = config.build(seed=9).requires_grad_(False)
    start_from(earlier, config, classifiers)
    known = earlier.load()
    for kind in ("mamba", "calm"):
        for name, tensor in known.by_kind[kind].state_dict().items():
            assert torch.equal(classifiers.by_kind[kind].state_dict()[name], tensor)
    hidden = torch.randn(5, 32)
    for layer in config.exit_layers:
        torch.testing.assert_close(classifiers.adapter(layer)(hidden), known.adapter(layer)(hidden))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layers": (2, 3)}, "exit_layers"),
        ({"top_k": 2}, "top_k"),
        ({"classifiers": ("mamba", "ffn")}, "there is no ffn there"),
        ({"adapter": "lowrank:3"}, "its adapters are affine, and --adapter is lowrank:3"),
        ({"adapter": "none"}, "its adapters are affine"),
    ],
)
def test_other_exits_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = exits_config(adapter="affine", classifiers=("calm", "mamba"))
    earlier = checkpoint.save(tmp_path, config, config.build())
    wanted = replace(config, **changes)
    with pytest.raises(UserError, match=message):
        start_from(earlier, wanted, wanted.build())


def test_exits_of_another_backbone_are_refused(tmp_path: Path) -> None:
    config = exits_config()
    earlier = checkpoint.save(tmp_path, config, config.build())
    other = replace(config, backbone=replace(config.backbone, fingerprint="f" * 32))
    with pytest.raises(UserError, match="were trained for other weights"):
        start_from(earlier, other, other.build())


def test_a_training_goes_on(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    first = train(model_folder, texts, tmp_path / "a", adapter="affine")
    again = train(model_folder, texts, tmp_path / "b", adapter="affine", init=str(first.path), learning_rate=1e-9)
    for name, tensor in first.load().state_dict().items():
        if ".out_proj." not in name:  # calibrated anew
            torch.testing.assert_close(again.load().state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
