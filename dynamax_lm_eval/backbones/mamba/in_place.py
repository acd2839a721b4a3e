"""The recurrence of Mamba-2 for a few tokens per row, row by row, in the memory where the rows' states lie.

For states that are large: those of 16 rows of a 7B block are 64 MiB, more than its weights, so what counts on a CPU is
how often they are gone through. Any number of tokens of a row costs as much as one, and the state of one row stays in
the cache. Knows tensors; knows no modules, engines or policies.

T tokens of R rows, n tokens of one row, H heads, P head dim, G groups, N SSM state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.rows import CHUNK, RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape

#: Elements of a row's state from which on it pays to start operations for each row apart.
_LARGE = 2**16


def pays(shape: MixerShape, rows: RaggedRows, inputs: Tensor) -> bool:
    """Returns whether :func:`scan_in_place` is the fastest way on these inputs (T, C) and computes what is needed."""
    size = shape.heads * shape.head_dim * shape.state
    few = int(rows.lengths.max()) <= CHUNK
    return inputs.device.type == "cpu" and size >= _LARGE and few and not inputs.requires_grad


def scan_in_place(
    inputs: Tensor, dt: Tensor, decay: Tensor, shape: MixerShape, rows: RaggedRows, table: Tensor, lines: Sequence[int]
) -> Tensor:
    """Computes what ``ssm.selective_scan`` does, and moves the rows' states on where they are, in float32.

    Args:
        inputs: (T, C): x, B and C side by side.
        dt: (T, H) step sizes, after softplus and clamp.
        decay: (H,) A, negative.
        shape: the sizes.
        rows: the T tokens' rows, of at most ``CHUNK`` tokens each.
        table: (S, H, P, N) states, float32.
        lines: R lines of the table, those of the rows.

    Returns:
        (T, H, P) without the skip term D x.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        x, b, c = shape.split(inputs.float())  # (T, H, P), (T, G, N)
        dt = dt.float()
        x = x * dt.unsqueeze(-1)
        log = dt * decay.float()  # (T, H)
        outputs, start = [], 0
        for length, line in zip(rows.lengths.tolist(), lines, strict=True):
            own = slice(start, start + length)
            outputs.append(_row(x[own], b[own], c[own], log[own], table[line]))
            start += length
        return torch.cat(outputs)


def _row(x: Tensor, b: Tensor, c: Tensor, log: Tensor, state: Tensor) -> Tensor:
    """Returns (n, H, P) for dt x (n, H, P), B and C (n, G, N), dt A (n, H) of one row; ``state`` (H, P, N) moves on."""
    length, groups = b.shape[:2]
    by_group = state.view(groups, -1, state.shape[-1])  # (G, H / G * P, N)
    b, c = b.transpose(0, 1), c.transpose(0, 1)  # (G, n, N)
    total = log.cumsum(0)  # (n, H), log of the decay since the tokens began
    kept = total[-1].exp()[:, None, None]
    if length == 1:
        state.mul_(kept)
        by_group.baddbmm_(x.reshape(groups, -1, 1), b)
        return (by_group @ c.transpose(1, 2)).view(x.shape)
    before = (c @ by_group.transpose(1, 2)).transpose(0, 1).reshape(x.shape)
    since = total.t()  # (H, n)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    # The exponent is masked, not its exp: above the diagonal it would overflow.
    passed = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()  # (H, n, n)
    mixed = (passed.unflatten(0, (groups, -1)) * (c @ b.transpose(1, 2)).unsqueeze(1)).flatten(0, 1)
    within = (mixed @ x.transpose(0, 1)).transpose(0, 1)
    added = (x * (total[-1:] - total).exp().unsqueeze(-1)).view(length, groups, -1).permute(1, 2, 0)
    state.mul_(kept)
    by_group.baddbmm_(added, b)
    return torch.addcmul(within, before, total.exp().unsqueeze(-1))
