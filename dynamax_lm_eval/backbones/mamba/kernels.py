"""The selective scan of Mamba-2 by the CUDA kernels of mamba-ssm, where they are installed.

They stand behind ``ssm.selective_scan``, which falls back to plain torch for what they cannot do (gradients). Knows
tensors of flat ragged rows; knows no modules.

T tokens of R rows, H heads, P head dim, G groups, N SSM state.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynamax_lm_eval.models.loading import described
from dynamax_lm_eval.types import MambaKernels

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.mamba.rows import RaggedRows

logger = logging.getLogger(__name__)

#: Tokens of a chunk, which is what the kernels were tuned for.
_CHUNK = 256


@dataclass(frozen=True)
class ScanKernels:
    """The two functions of mamba-ssm."""

    chunk_scan: Callable[..., Any]  # mamba_chunk_scan_combined
    state_update: Callable[..., Tensor]  # selective_state_update

    def can_run(self, inputs: Tensor) -> bool:
        """Returns whether the kernels take these tensors."""
        return inputs.is_cuda and not inputs.requires_grad

    def step(self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
        """Returns the read-outs (R, H, P) of one token per row: x (R, H, P), dt (R, H), b and c (R, G, N).

        ``state`` (R, H, P, N) is updated in place.
        """
        heads, head_dim, size = state.shape[1:]
        # The kernel knows by their strides of 0 that these are one number per head.
        steps = dt.unsqueeze(-1).expand(-1, -1, head_dim)
        decays = decay.view(-1, 1, 1).expand(heads, head_dim, size)
        zeros = _zero_on(x.device).expand(heads, head_dim)
        return self.state_update(state, x, steps, decays, b, c, zeros, dt_bias=zeros, dt_softplus=False)

    def step_channels(self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
        """Returns the read-outs (R, I) of Mamba-1: x and dt (R, I), decay (I, N), b and c (R, N), state (R, I, N)."""
        zeros = _zero_on(x.device).expand(x.shape[1])
        return self.state_update(state, x, dt, decay, b, c, zeros, dt_bias=zeros, dt_softplus=False)

    def chunks(
        self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, rows: RaggedRows
    ) -> tuple[Tensor, Tensor]:
        """Runs new rows side by side: x (T, H, P), dt (T, H), b and c (T, G, N).

        Returns:
            (T, H, P), and the states after each row (R, H, P, N).
        """
        bounds = rows.bounds
        output, after = self.chunk_scan(
            *(values.unsqueeze(0).contiguous() for values in (x, dt)),
            decay,
            *(values.unsqueeze(0).contiguous() for values in (b, c)),
            chunk_size=_CHUNK,
            seq_idx=bounds.row_of.unsqueeze(0),
            cu_seqlens=bounds.ends,
            dt_softplus=False,
            return_varlen_states=True,
        )
        return output.squeeze(0), after

    def go_on(
        self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, rows: RaggedRows, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs rows that have a past, ``state`` (R, H, P, N): those of one token by a step, the others padded.

        A padded token has a step size of 0, which leaves the state as it is.

        Returns:
            (T, H, P), and the new states, in the memory of the given ones.
        """
        split = rows.split_by_length
        output = torch.empty_like(x)
        if split.single_rows is not None:
            tokens, own = split.single_tokens, split.single_rows
            moved = state.index_select(0, own)
            own_x, own_dt, own_b, own_c = (values.index_select(0, tokens) for values in (x, dt, b, c))
            read = self.step(own_x, own_dt, decay, own_b, own_c, moved)
            output.index_copy_(0, tokens, read)
            state.index_copy_(0, own, moved)
        if split.long_rows is not None:
            padded, own = split.long_tokens, split.long_rows  # (r, L), T where there is no token
            long = [_padded(values, padded) for values in (x, dt, b, c)]
            read, after = self.chunk_scan(
                *long[:2],
                decay,
                *long[2:],
                chunk_size=_CHUNK,
                initial_states=state.index_select(0, own),
                dt_softplus=False,
                return_final_states=True,
            )
            output.index_copy_(0, split.long_order, read.flatten(0, 1).index_select(0, split.long_present))
            state.index_copy_(0, own, after.to(state.dtype))
        return output, state


def _padded(values: Tensor, tokens: Tensor) -> Tensor:
    """Returns values (T, ...) as (r, L, ...) for ``tokens`` (r, L); zeros at T."""
    with_zero = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    padded: Tensor = with_zero.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
    return padded


@functools.cache
def _zero_on(device: torch.device) -> Tensor:
    """Returns a zero: no released kernel runs without a skip term and a bias of dt."""
    with torch.inference_mode(False):
        return torch.zeros((), device=device)


def find(choice: MambaKernels, device: torch.device) -> ScanKernels | None:
    """Returns the kernels, if they are asked for, installed and of use on ``device``; logs which are used."""
    if device.type != "cuda" or choice == "torch":
        return None
    try:
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            logger.info("Mamba runs on plain torch: mamba-ssm is not installed")
        else:
            logger.warning("Mamba runs on plain torch: mamba-ssm cannot be imported (%s)", described(error))
        return None
    logger.info("Mamba runs on the kernels of mamba-ssm; mamba_kernels=torch does without them")
    return ScanKernels(combined.mamba_chunk_scan_combined, update.selective_state_update)
