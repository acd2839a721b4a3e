"""How many rows run at once: as the user says, as memory allows, and more of them where rows wait at exits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from dynamax_lm_eval.backbones import Backbone
from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.engine.prefixes import ROOM_SHARE
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy

logger = logging.getLogger(__name__)

#: Share of free memory that is given to K and V; the rest is for activations and logits.
_MEMORY_SHARE = 0.5
#: Batches of rows in flight where nobody says how many: rows then seldom wait for long, even at several exits.
_BATCHES = 4


def check(args: DynamaxArgs, backbone: Backbone) -> None:
    """Raises UserError where rows are to wait at exits and the backbone cannot go on from there."""
    if args.rows_in_flight is not None and not backbone.resumes:
        raise UserError(
            f"rows_in_flight has no effect on {backbone.name}, whose blocks run as one ({backbone.rung}); remove it"
        )


def batch_rows(lm: Any, longest: int) -> int:
    """Returns ``batch_size``; for ``auto``, as many rows of ``longest`` tokens as memory holds states for."""
    if lm.batch_size != "auto":
        return int(lm.batch_size)
    rows = _rows_in_memory(lm, longest)
    rows = max(1, min(rows, lm.max_batch_size or rows))
    logger.info("batch_size=auto: %d rows of up to %d tokens in flight", rows, longest)
    lm.batch_sizes[0] = rows
    return rows


def rows_in_flight(lm: Any, policies: Iterable[ExitPolicy], batch: int, longest: int) -> int:
    """Returns how many rows of ``longest`` tokens have begun and not ended, for batches of so many.

    More than one batch, where tokens may exit: as many as the user says, else ``_BATCHES``, or what memory holds.
    """
    may_exit = any(policy.active_exits for policy in policies)
    if not lm.args.rebatch or not may_exit or batch == 1 or not lm.engine.backbone.resumes or lm.batch_size == "auto":
        return batch
    if lm.args.rows_in_flight is not None:
        return int(lm.args.rows_in_flight)
    if lm.is_tensor_parallel:
        return batch  # processes that compute together may find different amounts of memory
    return max(batch, min(batch * _BATCHES, _rows_in_memory(lm, longest)))


def _rows_in_memory(lm: Any, longest: int) -> int:
    """Returns how many rows of ``longest`` tokens the device holds that has the least memory for its blocks' states."""
    backbone = lm.engine.backbone
    per_row = backbone.row_bytes(longest) * (1 + ROOM_SHARE if lm.args.prefix_caching else 1)
    blocks = Counter(place.device for place in backbone.places)
    per_device = [_free_memory(device) / (per_row * count / backbone.num_layers) for device, count in blocks.items()]
    return int(_MEMORY_SHARE * min(per_device))


def _free_memory(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
