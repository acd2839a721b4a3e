"""The optimisers of a training, and what of them a saved state needs beside their tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynamax_lm_eval.errors import UserError

#: What may be named as ``--optimizer``.
OPTIMIZERS = ("adamw", "schedulefree")
#: Numbers of a parameter group that change from step to step and decide what the next one does.
_COUNTERS = ("k", "weight_sum", "lr_max")


def check_optimizer(name: str) -> None:
    """Raises UserError where there is no such optimiser, or its package is not installed."""
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "schedulefree" and importlib.util.find_spec("schedulefree") is None:
        raise UserError("--optimizer schedulefree needs its package: pip install schedulefree")


def make_optimizer(
    name: str, groups: Sequence[Sequence[nn.Parameter]], rate: float, weight_decay: float, warmup_steps: int
) -> torch.optim.Optimizer:
    """Returns an optimiser of groups of parameters.

    Args:
        name: one of :data:`OPTIMIZERS`: AdamW, whose rate the training sets for every step, or AdamW without a schedule
            (Defazio et al. 2024, arXiv 2405.15682), which is right at any step, from the package ``schedulefree``.
        groups: clipped and stepped together.
        rate: peak of the learning rate.
        weight_decay: of either.
        warmup_steps: in which the rate of an optimiser without a schedule rises.
    """
    parameters: list[dict[str, Any]] = [{"params": list(group)} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    import schedulefree

    optimizer: torch.optim.Optimizer = schedulefree.AdamWScheduleFree(
        parameters, lr=rate, weight_decay=weight_decay, warmup_steps=warmup_steps
    )
    return optimizer


@contextmanager
def stepping(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lets an optimiser without a schedule step; outside, parameters are the averages that are evaluated and saved."""
    begin, end = (getattr(optimizer, name, None) for name in ("train", "eval"))
    if begin is not None:
        begin()
    try:
        yield
    finally:
        if end is not None:
            end()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns all that an optimiser remembers, as tensors by name."""
    tensors = {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    for number, group in enumerate(optimizer.param_groups):
        counted = [name for name in _COUNTERS if name in group]
        tensors |= {f"group{number}.{name}": torch.tensor(group[name], dtype=torch.float64) for name in counted}
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Lets an optimiser remember what :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    counters: list[tuple[int, str, float]] = []
    for name, tensor in tensors.items():
        place, _, key = name.partition(".")
        if place.startswith("group"):
            counters.append((int(place.removeprefix("group")), key, tensor.item()))
        else:
            state.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for number, key, value in counters:
        optimizer.param_groups[number][key] = int(value) if key == "k" else value
