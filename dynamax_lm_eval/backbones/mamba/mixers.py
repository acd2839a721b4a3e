"""The mixers of Mamba-2, Mamba and Falcon-Mamba as transformers' modules hold them, for flat ragged rows.

A mixer's work falls into three parts, because tokens that left early need only the second: projections of the
normalised hidden state, the update of conv and SSM state with its read-out, and the gated output. Projections
are called as modules, so quantised layers, LoRA and hooks keep working; what is left of a plain one is read
by rows. Knows modules and states; knows no batches, exits or policies.

T tokens of R rows, D hidden, I inner width (H * P), C channels of the convolution, H heads, N SSM state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.linear import is_plain, linear
from dynamax_lm_eval.backbones.mamba import in_place, norms
from dynamax_lm_eval.backbones.mamba.by_kernels import KernelScan
from dynamax_lm_eval.backbones.mamba.constants import ScanConstants, ScanParameters
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.kernels import ConvKernels, ScanKernels
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, MixerState, causal_conv, channel_scan, selective_scan
from dynamax_lm_eval.compute.cost import PAPER_MAMBA_RECOMPUTE, BlockCost
from dynamax_lm_eval.errors import UserError


class Mixer(ABC):
    """The mixer of one block."""

    def __init__(self, module: Any, inner: int, channels: int, kernels: ScanKernels | None) -> None:
        """``inner``: I; ``channels``: C; ``kernels``: where there are any."""
        self.module = module
        self.kernels = kernels
        self.inner = inner
        self.channels = channels
        self.kernel = int(module.conv_kernel_size)
        self._activation = ACT2FN[module.activation]
        self._parameters = ScanParameters()

    @property
    @abstractmethod
    def ssm_shape(self) -> tuple[int, ...]:
        """The shape of one row's SSM state."""

    @abstractmethod
    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gate (T, I), and what the state is updated from (T, U), of normalised hidden states (T, D)."""

    @abstractmethod
    def project_update(self, normed: Tensor) -> Tensor:
        """Returns the second result of :meth:`project` alone, (T, U)."""

    @abstractmethod
    def advance(self, update: Tensor, rows: RaggedRows, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        """Returns the SSM's read-out (T, I) in float32 with its skip term, and the rows' new states.

        ``state``: None for rows that have seen nothing; where they are also trained, no states come back.
        """

    def moves_lines_on(self, update: Tensor, rows: RaggedRows) -> bool:
        """Returns whether :meth:`advance_lines` is the fastest way to move states on."""
        return False

    def advance_lines(
        self, update: Tensor, rows: RaggedRows, windows: Tensor, table: Tensor, lines: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        """Does what :meth:`advance` does, with SSM states that are moved on where they lie.

        Args:
            update: as for :meth:`advance`.
            rows: the rows.
            windows: (R, K - 1, C) conv windows of the rows.
            table: (S, H, P, N) SSM states.
            lines: R lines of the table, those of the rows.

        Returns:
            the read-out (T, I), and the rows' new windows.
        """
        raise NotImplementedError

    @abstractmethod
    def advance_in_place(self, update: Tensor, rows: KernelRows, table: MixerState) -> Tensor:
        """Returns the same read-out (T, I), by kernels, in the dtype of ``update``; the table's lines are moved on."""

    def runs_on_kernels(self, update: Tensor) -> bool:
        """Returns whether kernels can update states from this."""
        return self.kernels is not None and self.kernels.can_run(update)

    @abstractmethod
    def output(self, scanned: Tensor, gate: Tensor) -> Tensor:
        """Returns what the block adds to the residual stream, (T, D), of the read-out (T, I) and the gate (T, I)."""

    def new_state(self, num_rows: int, device: torch.device) -> MixerState:
        """Returns the states of rows that have seen nothing."""
        # The kernel of the convolution wants windows in the dtype of its inputs.
        dtype = torch.float32 if self._conv_kernels is None else self.module.conv1d.weight.dtype
        return MixerState(
            torch.zeros(num_rows, self.kernel - 1, self.channels, dtype=dtype, device=device),
            torch.zeros(num_rows, *self.ssm_shape, device=device),
        )

    def cost(self, name: str) -> BlockCost:
        """Returns what the block costs, in MACs."""
        ssm = math.prod(self.ssm_shape)
        # The depthwise convolution is counted with the recurrence, by hand.
        linears = [child for child in self.module.children() if child is not self.module.conv1d]
        weights = sum(families.linear_macs(child, name) for child in linears)
        conv = self.channels * self.kernel
        return BlockCost(
            weights=weights,
            per_position=0,
            window=None,
            state_recompute=weights - self._left_out_of_updates(name) + conv + 2 * ssm,
            paper_recompute=PAPER_MAMBA_RECOMPUTE,
            recurrence=conv + 3 * ssm,
        )

    def _left_out_of_updates(self, name: str) -> int:
        """Returns how many weights an update does not need: out_proj, and the gate's rows of a plain in_proj."""
        in_proj = self.module.in_proj
        gate = self.inner * int(in_proj.in_features) if is_plain(in_proj) else 0
        return gate + families.linear_macs(self.module.out_proj, name)

    @property
    def _conv_kernels(self) -> ConvKernels | None:
        if self.kernels is None:
            return None
        return self.kernels.conv_for(self.channels, self.kernel, self.module.activation)

    def _constants(self, dt_bias: Tensor) -> ScanConstants:
        module = self.module
        return self._parameters.constants(module.conv1d.weight, module.conv1d.bias, dt_bias, module.A_log, module.D)

    def _scan(self, constants: ScanConstants, rows: KernelRows, table: MixerState) -> KernelScan:
        assert self.kernels is not None, "kernels can run"
        return KernelScan(self.kernels, self._conv_kernels, self._activation, constants, rows, table)

    def _convolve(
        self, mixed: Tensor, constants: ScanConstants, rows: RaggedRows, window: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns convolution and activation of (T, C), rounded to its dtype as the model does, and the new window."""
        output, window = causal_conv(mixed.float(), constants.conv_weight, constants.conv_bias, rows, window)
        return self._activation(output.to(mixed.dtype)), window


class Mamba2Mixer(Mixer):
    """The mixer that is transformers' ``Mamba2Mixer``: in_proj gives z, then x, B and C, then dt."""

    def __init__(self, module: Any, kernels: ScanKernels | None = None) -> None:
        self.shape = MixerShape(
            heads=int(module.num_heads),
            head_dim=int(module.head_dim),
            groups=int(module.n_groups),
            state=int(module.ssm_state_size),
            kernel=int(module.conv_kernel_size),
        )
        super().__init__(module, self.shape.inner, self.shape.channels, kernels)
        self._limits = float(module.time_step_limit[0]), float(module.time_step_limit[1])

    @property
    def ssm_shape(self) -> tuple[int, ...]:
        return self.shape.heads, self.shape.head_dim, self.shape.state

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        projected = linear(self.module.in_proj, normed).contiguous()
        return projected[:, : self.inner], projected[:, self.inner :]

    def project_update(self, normed: Tensor) -> Tensor:
        return _rows_of(self.module.in_proj, normed, slice(self.inner, None))

    def advance(self, update: Tensor, rows: RaggedRows, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        constants = self._constants(self.module.dt_bias)
        mixed, steps, conv = self._inputs(update, constants, rows, None if state is None else state.conv)
        before = None if state is None else state.ssm
        read, ssm = selective_scan(mixed, steps, constants.decay, self.shape, rows, before)  # (T, H, P)
        return self._with_skip(read, mixed, constants), None if ssm is None else MixerState(conv, ssm)

    def moves_lines_on(self, update: Tensor, rows: RaggedRows) -> bool:
        return in_place.pays(self.shape, rows, update)

    def advance_lines(
        self, update: Tensor, rows: RaggedRows, windows: Tensor, table: Tensor, lines: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        constants = self._constants(self.module.dt_bias)
        mixed, steps, windows = self._inputs(update, constants, rows, windows)
        read = in_place.scan_in_place(mixed, steps, constants.decay, self.shape, rows, table, lines)
        return self._with_skip(read, mixed, constants), windows

    def _inputs(
        self, update: Tensor, constants: ScanConstants, rows: RaggedRows, windows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x, B and C side by side (T, C), step sizes (T, H), and the new windows (R, K - 1, C)."""
        mixed, dt = update.split([self.shape.channels, self.shape.heads], dim=-1)
        mixed, windows = self._convolve(mixed, constants, rows, windows)
        steps = F.softplus(dt.float() + constants.dt_bias)
        if self._limits != (0.0, math.inf):
            steps = steps.clamp(*self._limits)
        return mixed, steps, windows

    def _with_skip(self, read: Tensor, mixed: Tensor, constants: ScanConstants) -> Tensor:
        x = mixed[:, : self.shape.inner].unflatten(-1, (self.shape.heads, self.shape.head_dim))
        return torch.addcmul(read, x.float(), constants.skip.unsqueeze(-1)).flatten(1)

    def advance_in_place(self, update: Tensor, rows: KernelRows, table: MixerState) -> Tensor:
        return self._scan(self._constants(self.module.dt_bias), rows, table).heads(update, self.shape, self._limits)

    def output(self, scanned: Tensor, gate: Tensor) -> Tensor:
        norm = self._norm if self.kernels is not None and self.kernels.can_run(scanned) else None
        if norm is None:
            normed = self.module.norm(scanned, gate)
        else:
            assert self.kernels is not None
            normed = self.kernels.norm(scanned, gate, self.module.norm.weight, *norm)
        return linear(self.module.out_proj, normed.to(gate.dtype))

    @cached_property
    def _norm(self) -> norms.RmsNorm | None:
        return norms.recognised(self.module.norm, gated=True)


class Mamba1Mixer(Mixer):
    """The mixer that is transformers' ``MambaMixer`` or ``FalconMambaMixer``: in_proj gives x, z; B, C, dt are of x."""

    def __init__(self, module: Any, kernels: ScanKernels | None = None) -> None:
        super().__init__(module, int(module.intermediate_size), int(module.intermediate_size), kernels)
        self._sizes = [int(module.time_step_rank), int(module.ssm_state_size), int(module.ssm_state_size)]
        #: Falcon-Mamba normalises dt, B and C.
        self._norms = [getattr(module, f"{name}_layernorm", nn.Identity()) for name in ("dt", "b", "c")]

    @property
    def ssm_shape(self) -> tuple[int, ...]:
        return self.inner, self._sizes[1]

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        projected = linear(self.module.in_proj, normed).contiguous()
        return projected[:, self.inner :], projected[:, : self.inner]

    def project_update(self, normed: Tensor) -> Tensor:
        return _rows_of(self.module.in_proj, normed, slice(None, self.inner))

    def advance(self, update: Tensor, rows: RaggedRows, state: MixerState | None) -> tuple[Tensor, MixerState | None]:
        constants = self._constants(self.module.dt_proj.bias)
        x, conv = self._convolve(update, constants, rows, None if state is None else state.conv)
        dt, b, c = self._project_convolved(x)
        steps = F.softplus(dt.float() + constants.dt_bias)
        before = None if state is None else state.ssm
        read, ssm = channel_scan(x, steps, constants.decay, b, c, rows, before)  # (T, I)
        return torch.addcmul(read, x.float(), constants.skip), MixerState(conv, ssm)

    def advance_in_place(self, update: Tensor, rows: KernelRows, table: MixerState) -> Tensor:
        scan = self._scan(self._constants(self.module.dt_proj.bias), rows, table)
        return scan.channels(update, self._project_convolved)

    def _project_convolved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns raw step sizes (T, I) without their bias, and B and C (T, N)."""
        parts = linear(self.module.x_proj, x).split(self._sizes, dim=-1)
        dt, b, c = (norm(part) for norm, part in zip(self._norms, parts, strict=True))
        return dt @ self.module.dt_proj.weight.T.to(dt.dtype), b, c

    def output(self, scanned: Tensor, gate: Tensor) -> Tensor:
        return linear(self.module.out_proj, (scanned * self._activation(gate.to(scanned.dtype))).to(gate.dtype))


def make_mixer(module: Any, where: str, kernels: ScanKernels | None = None) -> Mixer:
    """Returns the mixer that a module of transformers is; ``kernels`` run its scan where they can.

    Raises:
        UserError: it is of no known kind.
    """
    if hasattr(module, "x_proj"):
        return Mamba1Mixer(module, kernels)
    if hasattr(module, "n_groups"):
        return Mamba2Mixer(module, kernels)
    raise UserError(f"{where}: {type(module).__name__} is no Mamba mixer that is known; it is not supported")


def _rows_of(projection: Any, inputs: Tensor, rows: slice) -> Tensor:
    """Returns part of a projection's output."""
    if not is_plain(projection):
        whole: Tensor = projection(inputs)
        return whole[:, rows]
    bias = None if projection.bias is None else projection.bias[rows]
    return F.linear(inputs, projection.weight[rows], bias)
