"""Plain torch in place of the kernels of mamba-ssm and causal-conv1d, token by token.

For what surrounds the kernels: rows, lines and orders. That they are called as they are released is shown by
``test_kernel_sources``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from cudalike import as_one_kernel
from helpers_engine import KernelsOnCpu
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.kernels import ConvKernels


def _state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    lines = torch.arange(len(state), device=state.device) if state_batch_indices is None else state_batch_indices.long()
    steps = dt.float() + dt_bias
    steps = (F.softplus(steps) if dt_softplus else steps).unsqueeze(-1)
    if state.ndim == 4:
        heads = state.shape[1] // b.shape[1]  # that share B and C
        b, c = (values[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2).unsqueeze(2) for values in (b, c))
    else:
        b, c = b.unsqueeze(1), c.unsqueeze(1)
    state[lines] = after = (steps * decay).exp() * state[lines] + steps * x.unsqueeze(-1) * b
    return ((after * c).sum(-1) + x * skip).to(x.dtype)


def _chunk_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor,  # noqa: N803
    dt_bias: Tensor,
    dt_softplus: bool,
    cu_seqlens: Tensor | None = None,
    initial_states: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        assert initial_states is not None
        spans, states = [(row, 0, x.shape[1]) for row in range(len(x))], initial_states.clone()
    else:
        spans = [(0, start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]
        states = torch.zeros(len(spans), *x.shape[2:], b.shape[-1], device=x.device)
    output = torch.empty_like(x)
    for number, (row, start, end) in enumerate(spans):
        for t in range(start, end):
            values = (
                x[row, t, None],
                dt[row, t, None, :, None],
                decay[:, None, None],
                b[row, t, None],
                c[row, t, None],
            )
            output[row, t] = _state_update(
                states[number, None], *values, D.unsqueeze(-1), dt_bias.unsqueeze(-1), dt_softplus
            )
    return output, states


def _gated_norm(
    x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    assert not norm_before_gate
    groups = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group_size))
    return (F.rms_norm(groups, (group_size,), eps=eps).flatten(-2) * weight).to(x.dtype)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor, activation: str) -> Tensor:
    assert activation == "silu" and x.stride(1) == 1
    output = torch.empty_like(x)
    for row in seq_idx.unique():
        own = seq_idx[0] == row
        padded = F.pad(x[:, :, own].to(weight.dtype), (weight.shape[1] - 1, 0))
        output[:, :, own] = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).to(x.dtype)
    return output


def _conv_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str, conv_state_indices: Tensor | None
) -> Tensor:
    assert activation == "silu" and state.dtype == x.dtype
    lines = torch.arange(len(state), device=state.device) if conv_state_indices is None else conv_state_indices.long()
    seen = torch.cat([state[lines], x.unsqueeze(-1)], dim=-1)
    state[lines] = seen[:, :, 1:]
    return F.silu((seen * weight).sum(-1) + bias).to(x.dtype)


STAND_INS = KernelsOnCpu(_chunk_scan, _state_update, _gated_norm, ConvKernels(_conv, _conv_update))
#: The same where launches are counted: as many as kernels would be launched for a step.
COUNTED_STAND_INS = KernelsOnCpu(
    _chunk_scan,
    as_one_kernel(_state_update),
    as_one_kernel(_gated_norm),
    ConvKernels(_conv, as_one_kernel(_conv_update)),
)
