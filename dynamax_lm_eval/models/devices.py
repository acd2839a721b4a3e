"""The devices of this machine, and what a run asks for of them. Knows no models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.types import StateMode

logger = logging.getLogger(__name__)

#: Words for device maps that accelerate makes.
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def resolve_device(device: str | None) -> str:
    """Returns the device of a run: the one that was asked for, or the CPU for the harness's default without a GPU.

    The harness gives ``cuda:0`` where the user says nothing, and its ``hf`` takes the CPU where that does not exist.

    Raises:
        UserError: another device does not exist on this machine.
    """
    devices = _devices()
    if device in devices:
        return str(device)
    if device in (None, "cuda:0"):
        level = logging.INFO if device is None else logging.WARNING
        logger.log(level, "There is no CUDA device here, so this run uses the CPU; --device cpu says so")
        return "cpu"
    raise UserError(f"device={device!r} does not exist here; give one of {', '.join(devices)} (--device, device=)")


def check_device_map(device_map: str | Mapping[str, Any]) -> None:
    """Raises UserError where a map of modules names a device that does not exist on this machine."""
    if device_map in _STRATEGIES:
        return
    known = _devices()
    for device in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
        number = f"cuda:{device}" if isinstance(device, int) else str(device)
        if number not in known and not (number == "disk" and isinstance(device_map, Mapping)):
            raise UserError(f"device_map={device_map!r}: {device!r} does not exist here; there are {', '.join(known)}")


def check_tensor_parallel(config: Any, rung: str | None) -> None:
    """Raises UserError where a model cannot be run by several processes together.

    Args:
        config: of transformers.
        rung: how its blocks are run, as ``backbones.rungs`` names it; None: that is not known.
    """
    if rung != "fused":
        raise UserError(
            f"tp_plan is for models whose blocks are of Llama's kind (Llama, Mistral, Qwen2, Qwen3), and "
            f"{config.model_type!r} is none; spread it with parallelize=True"
        )
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes < 2:
        raise UserError(
            "tp_plan splits a model between processes, and there is one; start more: "
            "torchrun --nproc_per_node N -m dynamax_lm_eval run ..."
        )
    heads = int(config.get_text_config().num_key_value_heads)
    if heads % processes:
        raise UserError(f"tp_plan: {heads} K/V heads cannot be split between {processes} processes; start a divisor")


def _devices() -> list[str]:
    """Returns the names of the devices of this machine."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices += ["mps", "mps:0"]
    for kind in ("npu", "xpu", "hpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            devices += [f"{kind}:{i}" for i in range(module.device_count())]
    return devices


def check_state_mode(is_tensor_parallel: bool, state_mode: StateMode) -> None:
    """Raises UserError where states are learned and processes share the projections in whose place maps stand."""
    if is_tensor_parallel and state_mode == "learned":
        raise UserError("state_mode=learned is not possible with tp_plan; add state_mode=recompute")


def check_whole_head(is_tensor_parallel: bool, vocab_subset: int | None) -> None:
    """Raises UserError where rows of the LM head are to be read and processes share it."""
    if is_tensor_parallel and vocab_subset is not None:
        raise UserError("vocab_subset is not possible with tp_plan, which splits the LM head; leave one of them out")
