"""Attention of ragged rows in one call of a GPU's kernel: no masks, no loop over rows, the cache as it stands.

Knows where the keys of a run of queries begin and how many there are; knows no blocks and no masks.

n queries, S runs of them, H heads, H_kv K/V heads, P head dim, C slots of the cache.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray, together_on_device

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256


class QueryRuns(NamedTuple):
    """Runs of queries at successive positions of a row, each of which attends to all keys up to its own position."""

    first_query: Tensor  # (S + 1,) int32, where runs begin and end
    first_key: Tensor  # (S + 1,) int32, the cache slots where their keys begin; the last counts for nothing
    num_keys: Tensor  # (S,) int32, those of the last query of a run
    longest: int  # most queries of a run
    most_keys: int  # no run has more
    window: tuple[int, int]  # keys to the left and to the right of a query's own; -1: all

    @classmethod
    def of(
        cls, starts: IntArray, positions: IntArray, window: int | None, device: torch.device, row_stride: int | None
    ) -> QueryRuns:
        """Returns the runs of some queries.

        Args:
            starts: (n,) first cache slot of each query's row; rows side by side, rising positions within one.
            positions: (n,) of the queries in their rows.
            window: keys that a query sees, its own among them; None: all up to its own.
            device: where they are needed.
            row_stride: bounds the keys of a row, where that is known.
        """
        # A token between two queries has left: what comes after it begins another run.
        begins = np.flatnonzero((np.diff(starts, prepend=-1) != 0) | (np.diff(positions, prepend=-2) != 1))
        ends = np.append(begins[1:], len(starts))
        low, num_keys = np.zeros_like(begins), positions[ends - 1] + 1
        longest = int((ends - begins).max())
        sides = (-1, -1) if longest == 1 else (-1, 0)
        if window is not None and longest == 1:
            low = np.maximum(0, num_keys - window)
        elif window is not None:
            sides = (window - 1, 0)
        keys = np.append(starts[begins] + low, 0)
        parts = [np.append(begins, len(starts)), keys, num_keys - low]
        first_query, first_key, used = together_on_device([part.astype(np.int32) for part in parts], device)
        return cls(first_query, first_key, used, longest, row_stride or int(num_keys.max()), sides)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Returns (n, H, P) for queries (n, H, P) and caches (C, H_kv, P); ``scaling``: None is P ** -0.5."""
        # One part per row: how many there are would depend on the other rows, and with it the order of sums.
        attended: Tensor = _kernel()(
            query,
            key,
            value,
            self.first_query,
            self.first_key,
            self.longest,
            self.most_keys,
            scale=scaling,
            window_size=self.window,
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=self.num_keys,
            num_splits=1,
        )
        return attended

    def attend_to_copies(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Does what :meth:`attend` does, for runs of one query and on any device: their keys are copied side by side.

        Runs have places for ``most_keys``; those without a key may lie anywhere and are masked.
        """
        numbers = torch.arange(self.most_keys, dtype=torch.int32, device=query.device)
        seen = numbers < self.num_keys.unsqueeze(1)  # (S, K)
        slots = (self.first_key[:-1].unsqueeze(1) + numbers).clamp_(max=len(key) - 1).flatten()
        k, v = (cache.index_select(0, slots).unflatten(0, seen.shape).transpose(1, 2) for cache in (key, value))
        # The heads that share K and V become the queries of one head.
        q = query.unflatten(1, (key.shape[1], -1))  # (S, H_kv, H / H_kv, P)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], scale=scaling).flatten(1, 2)


class SingleQueries:
    """What queries attend to that are alone in their rows, on tensors that are given: stands for an attention plan."""

    def __init__(self, runs: Mapping[int | None, QueryRuns]) -> None:
        """``runs``: by what is visible to them, a window or None."""
        self._runs = runs

    def attend(self, window: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Returns (1, n, H, P) for queries (1, H, n, P) and caches (C, H_kv, P)."""
        runs, query = self._runs[window], query[0].transpose(0, 1)
        attend = runs.attend if can_run(query, key, value) else runs.attend_to_copies
        return attend(query, key, value, scaling).unsqueeze(0)


def can_run(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether the kernel takes queries (.., P) and caches (C, H_kv, P) of these types and sizes."""
    if not query.dtype == key.dtype == value.dtype or query.shape[-1] != value.shape[-1]:
        return False
    return takes(query.device, query.dtype, query.shape[-1])


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether the kernel runs on a device and takes heads of this type and size."""
    if device.type != "cuda" or dtype not in _DTYPES or head_dim % 8 or head_dim > _LARGEST_HEAD:
        return False
    return is_available(device, dtype)


@functools.cache
def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether torch and the device have the kernel; it is tried once."""
    one = np.asarray([0])
    try:
        tensor = torch.zeros(1, 1, 8, device=device, dtype=dtype)
        QueryRuns.of(one, one, None, device, None).attend(tensor, tensor, tensor, None)
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        logger.info("rows attend one by one and under masks: there is no kernel for ragged rows here (%s)", reason)
        return False
    return True


def _kernel() -> Any:
    # Older releases of torch have no such module.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
