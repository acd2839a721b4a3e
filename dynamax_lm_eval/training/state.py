"""What a training needs to go on after a kill: weights, optimiser, place in the data. Safetensors and JSON.

A state is a folder that appears as a whole and replaces the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dynamax_lm_eval.config import UserError, changed_settings

_PREFIX = "state-"


@dataclass(frozen=True)
class Progress:
    """Where a training stands after ``step`` optimiser steps."""

    step: int
    data: dict[str, int]  # training.data.Position
    options: dict[str, Any]  # what the weights depend on
    seconds: float


def save(folder: Path, progress: Progress, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the state of a training into ``folder``, then removes older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_PREFIX}{progress.step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_tensors(module.state_dict()), partial / "weights.safetensors")
    save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
    (partial / "progress.json").write_text(json.dumps(progress.__dict__), encoding="utf-8")
    final = folder / f"{_PREFIX}{progress.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _states(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest state in ``folder``; None without any."""
    found = _states(folder)
    if not found:
        return None
    data = json.loads((found[-1] / "progress.json").read_text(encoding="utf-8"))
    return found[-1], Progress(**data)


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights and the optimiser back to where they were."""
    module.load_state_dict(load_file(path / "weights.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_same(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where a training would go on with other options than it began with."""
    if changed := changed_settings(stored, now):
        raise UserError(
            f"--resume: this training began with other options: {changed}; give the same ones, or start anew with "
            "--overwrite"
        )


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return _tensors({f"{index}.{key}": value for index, values in state.items() for key, value in values.items()})
