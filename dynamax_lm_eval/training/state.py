"""What a training needs to go on after a kill: weights, optimiser, place in the data. Safetensors and JSON.

A state is a folder that appears as a whole. The one before it is kept, and used where the newest is damaged.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dynamax_lm_eval.errors import FaultError, UserError, changed_settings
from dynamax_lm_eval.files import JsonFormat, file_checksum, sync, write_tensors
from dynamax_lm_eval.frozen.options import HELD_OUT_SEED
from dynamax_lm_eval.training.optimizers import optimizer_tensors, restore_optimizer

logger = logging.getLogger(__name__)

_PREFIX = "state-"
#: What the backbone wrote to be trained on lies beside the states.
POOL_NAME = "answers.jsonl"
PROGRESS_NAME = "progress.json"
#: The states of a LoRA lie in a folder of their own beside those of the exits.
LORA_NAME = "lora"
#: States that are kept.
_KEPT = 2
_FILES = (_WEIGHTS, _OPTIMIZER) = ("weights.safetensors", "optimizer.safetensors")
#: The format of the file that says where a state stands and which checksums its other files have.
PROGRESS = JsonFormat(
    name="dynamax-training-state",
    version=1,
    what="a state of a training",
    remedy="start again with --overwrite",
)


@dataclass(frozen=True)
class Progress:
    """Where a training stands after ``step`` optimiser steps."""

    step: int
    data: dict[str, int]  # training.batches.Position
    options: dict[str, Any]  # what the weights depend on
    seconds: float


def save(folder: Path, progress: Progress, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the state of a training into ``folder``, on disk before this returns, then removes older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_PREFIX}{progress.step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_tensors(partial / _WEIGHTS, _tensors(module.state_dict()))
    write_tensors(partial / _OPTIMIZER, _tensors(optimizer_tensors(optimizer)))
    checksums = {name: file_checksum(partial / name) for name in _FILES}
    PROGRESS.write(partial / PROGRESS_NAME, {**progress.__dict__, "checksums": checksums})
    sync(partial)
    final = folder / f"{_PREFIX}{progress.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(folder)
    for old in _states(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def is_begun(folder: Path) -> bool:
    """Returns whether ``folder`` holds a state, whole or damaged."""
    return bool(_states(folder) or _states(folder / LORA_NAME)) or (folder / POOL_NAME).exists()


def latest(folder: Path) -> tuple[Path, Progress] | None:
    """Returns the newest whole state in ``folder``, with a warning where a newer one is damaged; None without any.

    Raises:
        UserError: all states are damaged.
    """
    damaged: UserError | None = None
    for path in reversed(_states(folder)):
        try:
            progress = _read(path)
        except UserError as error:
            logger.warning("Not going on from the newest state: %s", str(error).removesuffix(f"; {PROGRESS.remedy}"))
            damaged = damaged or error
        else:
            return path, progress
    if damaged is not None:
        raise FaultError(f"--resume: {damaged}") from damaged
    return None


def _read(path: Path) -> Progress:
    """Returns what a state says; raises UserError where its files are not those that were written."""
    data = PROGRESS.read(path / PROGRESS_NAME)
    try:
        for name, expected in data.pop("checksums").items():
            if file_checksum(path / name) != expected:
                raise FaultError(f"{path / name} is damaged; {PROGRESS.remedy}")
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); {PROGRESS.remedy}") from error
    return Progress(**{item.name: data[item.name] for item in fields(Progress)})


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights and the optimiser back to where they were."""
    # States of releases without confirmers go on: these are fitted after the last step.
    unfitted = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("confirmers.")}
    module.load_state_dict({**unfitted, **load_file(path / _WEIGHTS)})
    restore_optimizer(optimizer, load_file(path / _OPTIMIZER))


def check_same(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses, with a UserError, to resume a training with different options."""
    if "eval_documents" not in stored:
        # Earlier releases held out the first documents whole, in the order of the training.
        stored = {**stored, "eval_documents": 1}
        if stored.get("seed", HELD_OUT_SEED) != HELD_OUT_SEED and stored.get("eval_dataset") is None:
            raise UserError(
                "--resume: this training began with a release that held out other documents, which would be trained "
                "on now; finish it with that release, or start again with --overwrite"
            )
    if changed := changed_settings(stored, now):
        raise UserError(
            f"--resume: this training began with other options: {changed}; give the same ones, or start again with "
            "--overwrite"
        )


def _states(folder: Path) -> list[Path]:
    names = re.compile(rf"{_PREFIX}\d{{8,}}")
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if names.fullmatch(path.name) and path.is_dir())


def _tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
