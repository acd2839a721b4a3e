"""Convolution and scan of Mamba mixers by kernels, on the lines of a state table in place.

The same as ``ssm`` computes, with the states left where they are: where every row has one token a block is one call of
each kernel, without a gather, a cast or a copy. Knows tensors; knows no modules.

T tokens of R rows, C channels of the convolution, K its kernel, H heads, P head dim, G groups, N SSM state, I inner
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.constants import ScanConstants
from dynamax_lm_eval.backbones.mamba.groups import Groups, KernelRows
from dynamax_lm_eval.backbones.mamba.kernels import ConvKernels, ScanKernels, StepSizes
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, MixerState, causal_conv, channel_scan

#: Rows of more tokens run by chunks: these go over a state ten times however many tokens there are, a step twice.
_MOST_STEPS = 4
#: Mamba-1 has no form by chunks in kernels; that of torch takes seven operations for each token of a chunk.
_MOST_STEPS_OF_CHANNELS = 64


@dataclass(frozen=True)
class KernelScan:
    """One pass of a mixer on kernels."""

    kernels: ScanKernels
    conv: ConvKernels | None  # None: the convolution runs on torch
    activation: Callable[[Tensor], Tensor]  # after the convolution
    constants: ScanConstants
    rows: KernelRows
    table: MixerState  # all lines

    def heads(
        self, mixed: Tensor, dt: Tensor, shape: MixerShape, limits: tuple[float, float] = (0.0, math.inf)
    ) -> Tensor:
        """Moves the rows' states on as Mamba-2 does and returns the read-outs with their skip term, (T, I).

        Args:
            mixed: (T, C): x, B and C side by side, before the convolution.
            dt: (T, H) step sizes before bias, softplus and limits.
            shape: the sizes.
            limits: of the step sizes.
        """
        steps = StepSizes.of(dt, self.constants.dt_bias, limits)
        if self.rows.rows.single_tokens:
            return self._step_heads(self._convolve_singles(mixed), steps, shape, *self.rows.in_place(self.table.ssm))
        groups = self.rows.groups(_MOST_STEPS, padded=True)
        mixed = self._convolve(mixed, groups)
        if groups.order is not None:
            steps = steps.at(groups.order.tokens)
        ssm, start, read = self.table.ssm, 0, []
        for count in groups.steps:
            own = slice(start, start + count)
            indices = groups.step_lines[:count]
            read.append(self._step_heads(mixed[own], steps._replace(dt=steps.dt[own]), shape, ssm, indices))
            start += count
        if groups.beside is not None:
            bounds, own = groups.beside.bounds, slice(start, start + groups.beside.num_tokens)
            x, b, c = shape.split(mixed[own])
            given = steps._replace(dt=steps.dt[own])
            output, after = self.kernels.new_rows(x, given, self.constants, b, c, *bounds)
            ssm.index_copy_(0, groups.beside_lines, after)
            read.append(output.flatten(1))
            start += groups.beside.num_tokens
        if groups.aside is not None:
            x, b, c = shape.split(mixed[start:].unflatten(0, groups.aside))
            given = steps._replace(dt=steps.dt[start:].unflatten(0, groups.aside))
            before = ssm.index_select(0, groups.aside_lines)
            output, after = self.kernels.go_on(x, given, self.constants, b, c, before)
            ssm.index_copy_(0, groups.aside_lines, after)
            read.append(output.flatten(0, 1).flatten(1))
        return _joined(read, groups)

    def _step_heads(
        self, mixed: Tensor, steps: StepSizes, shape: MixerShape, ssm: Tensor, indices: Tensor | None
    ) -> Tensor:
        x, b, c = shape.split(mixed)
        return self.kernels.step(ssm, indices, x, steps, self.constants, b, c).flatten(1)

    def channels(self, mixed: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Moves the rows' states on as Mamba-1 does and returns the read-outs with their skip term, (T, I).

        Args:
            mixed: (T, I) before the convolution.
            project: gives raw step sizes (T, I), B and C (T, N) of what the convolution makes of it.
        """
        constants, ssm = self.constants, self.table.ssm
        if self.rows.rows.single_tokens:
            x = self._convolve_singles(mixed)
            dt, b, c = project(x)
            steps = StepSizes.of(dt, constants.dt_bias)
            return self.kernels.step(*self.rows.in_place(ssm), x, steps, constants, b, c)
        groups = self.rows.groups(_MOST_STEPS_OF_CHANNELS, padded=False)
        x = self._convolve(mixed, groups)
        dt, b, c = project(x)
        start, read = 0, []
        for count in groups.steps:
            own = slice(start, start + count)
            steps = StepSizes.of(dt[own], constants.dt_bias)
            read.append(self.kernels.step(ssm, groups.step_lines[:count], x[own], steps, constants, b[own], c[own]))
            start += count
        if groups.beside is not None:
            before = ssm.index_select(0, groups.beside_lines)
            sizes = F.softplus(dt[start:].float() + constants.dt_bias)
            output, after = channel_scan(x[start:], sizes, constants.decay, b[start:], c[start:], groups.beside, before)
            ssm.index_copy_(0, groups.beside_lines, after)
            read.append(torch.addcmul(output, x[start:].float(), constants.skip).to(x.dtype))
        return _joined(read, groups)

    def _convolve_singles(self, mixed: Tensor) -> Tensor:
        """Returns the convolution with its activation of one token per row, (R, C), and moves the windows on."""
        table = self.table.conv
        if self.conv is not None:
            return self.conv.step(mixed.to(table.dtype), *self.rows.in_place(table), self.constants)
        return self._convolve_by_torch(mixed)

    def _convolve(self, mixed: Tensor, groups: Groups) -> Tensor:
        """Returns the convolution with its activation in the order of groups, (T', C), and moves the windows on."""
        present = None if groups.order is None else groups.order.present
        if self.conv is not None and not self.rows.all_new:
            return self._convolve_behind_windows(mixed, self.conv, present)
        output = self._convolve_by_torch(mixed) if self.conv is None else self._convolve_new(mixed, self.conv)
        return output if present is None else output.index_select(0, present)

    def _convolve_new(self, mixed: Tensor, conv: ConvKernels) -> Tensor:
        table = self.table.conv
        mixed, windows = mixed.to(table.dtype), self.rows.windows(table.shape[1])
        last = mixed.index_select(0, windows.last)
        if windows.absent is not None:
            last = last.masked_fill(windows.absent, 0)
        table.index_copy_(0, windows.lines, last.unflatten(0, (-1, table.shape[1])))
        return conv.rows(mixed, self.rows.rows.bounds.row_of, self.constants)

    def _convolve_behind_windows(self, mixed: Tensor, conv: ConvKernels, present: Tensor | None) -> Tensor:
        table = self.table.conv
        windows = self.rows.windows(table.shape[1])
        before = table.index_select(0, windows.lines)
        rows = torch.cat([before.flatten(0, 1), mixed.to(table.dtype)]).index_select(0, windows.source)
        table.index_copy_(0, windows.lines, rows.index_select(0, windows.after).view_as(before))
        tokens = windows.tokens if present is None else windows.tokens.index_select(0, present)
        return conv.rows(rows, windows.row_of, self.constants).index_select(0, tokens)

    def _convolve_by_torch(self, mixed: Tensor) -> Tensor:
        table, lines = self.table.conv, self.rows.lines
        weight, bias = self.constants.conv_weight, self.constants.conv_bias
        window = None if self.rows.all_new else table[lines]
        output, after = causal_conv(mixed.float(), weight, bias, self.rows.rows, window)
        table[lines] = after.to(table.dtype)
        return self.activation(output.to(mixed.dtype))


def _joined(parts: list[Tensor], groups: Groups) -> Tensor:
    """Returns what was made of groups, (T', I) in parts, in the order of the rows' tokens, (T, I)."""
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    return values if groups.order is None else values.index_select(0, groups.order.place)
