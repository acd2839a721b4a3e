"""Convolution and scan of Mamba mixers by kernels, on the lines of a state table in place.

The same as ``ssm`` computes, with the states left where they are: where every row has one token a block is one call of
each kernel, without a gather, a cast or a copy. Knows tensors; knows no modules.

T tokens of R rows, C channels of the convolution, K its kernel, H heads, P head dim, G groups, N SSM state, I inner
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    def heads(self, update: Tensor, shape: MixerShape, limits: tuple[float, float] = (0.0, math.inf)) -> Tensor:
        """Moves the rows' states on as Mamba-2 does and returns the read-outs with their skip term, (T, I).

        Args:
            update: (T, C + H): x, B and C before the convolution, then step sizes before bias, softplus and limits.
            shape: the sizes.
            limits: of the step sizes.
        """
        sizes, bias, ssm = [shape.channels, shape.heads], self.constants.dt_bias, self.table.ssm
        if self.rows.rows.single_tokens:
            mixed, dt = update.split(sizes, dim=-1)
            mixed = self._convolve_singles(mixed)
            return self._step_heads(mixed, StepSizes.of(dt, bias, limits), shape, *self.rows.in_place(ssm))
        groups = self.rows.groups(self._width, _MOST_STEPS, padded=True)
        if groups.is_steps and self.conv is not None:
            read, update = [], _selected(update, groups)
            for own, indices in _steps(groups):
                mixed, dt = update[own].split(sizes, dim=-1)
                mixed = self.conv.step(mixed.to(self.table.conv.dtype), self.table.conv, indices, self.constants)
                read.append(self._step_heads(mixed, StepSizes.of(dt, bias, limits), shape, ssm, indices))
            return _joined(read, groups)
        mixed, dt = update.split(sizes, dim=-1)
        mixed, steps = self._convolve(mixed, groups), StepSizes.of(dt, bias, limits)
        if groups.order is not None:
            steps = steps.at(groups.order.tokens) if groups.aside is None else steps.with_none().at(groups.order.tokens)
        read = [
            self._step_heads(mixed[own], steps._replace(dt=steps.dt[own]), shape, ssm, indices)
            for own, indices in _steps(groups)
        ]
        start = sum(groups.steps)
        if groups.beside is not None:
            own = slice(start, start + groups.beside.num_tokens)
            x, b, c = shape.split(mixed[own])
            given = steps._replace(dt=steps.dt[own])
            output, after = self.kernels.new_rows(x, given, self.constants, b, c, *groups.beside.bounds)
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
        groups = self.rows.groups(self._width, _MOST_STEPS_OF_CHANNELS, padded=False)
        x = self._convolve(mixed, groups)
        dt, b, c = project(x)
        steps = StepSizes.of(dt, constants.dt_bias)
        read = [
            self.kernels.step(ssm, indices, x[own], steps._replace(dt=dt[own]), constants, b[own], c[own])
            for own, indices in _steps(groups)
        ]
        if groups.beside is not None:
            x, dt, b, c = (values[sum(groups.steps) :] for values in (x, dt, b, c))
            before = ssm.index_select(0, groups.beside_lines)
            sizes = F.softplus(dt.float() + constants.dt_bias)
            output, after = channel_scan(x, sizes, constants.decay, b, c, groups.beside, before)
            ssm.index_copy_(0, groups.beside_lines, after)
            read.append(torch.addcmul(output, x.float(), constants.skip).to(x.dtype))
        return _joined(read, groups)

    @property
    def _width(self) -> int:
        return self.constants.conv_weight.shape[1] - 1

    def _convolve_singles(self, mixed: Tensor) -> Tensor:
        """Returns the convolution with its activation of one token per row, (R, C), and moves the windows on."""
        table = self.table.conv
        if self.conv is not None:
            return self.conv.step(mixed.to(table.dtype), *self.rows.in_place(table), self.constants)
        return self._convolve_by_torch(mixed)

    def _convolve(self, mixed: Tensor, groups: Groups) -> Tensor:
        """Returns the convolution with its activation in the order of groups, (T', C), and moves the windows on."""
        if self.conv is None:
            return _selected(self._convolve_by_torch(mixed), groups)
        table, windows = self.table.conv, groups.windows
        mixed = mixed.to(table.dtype)
        if self.rows.all_new:  # nothing was before them
            last = mixed.index_select(0, windows.last)
            if windows.absent is not None:
                last = last.masked_fill(windows.absent, 0)
            table.index_copy_(0, windows.lines, last.unflatten(0, (-1, table.shape[1])))
            return _selected(self.conv.rows(mixed, self.rows.rows.bounds.row_of, self.constants), groups)
        before = table.index_select(0, windows.lines)
        rows = torch.cat([before.flatten(0, 1), mixed]).index_select(0, windows.source)
        table.index_copy_(0, windows.lines, rows.index_select(0, windows.after).view_as(before))
        return self.conv.rows(rows, windows.row_of, self.constants).index_select(0, windows.tokens)

    def _convolve_by_torch(self, mixed: Tensor) -> Tensor:
        table, lines = self.table.conv, self.rows.lines
        weight, bias = self.constants.conv_weight, self.constants.conv_bias
        window = None if self.rows.all_new else table[lines]
        output, after = causal_conv(mixed.float(), weight, bias, self.rows.rows, window)
        table[lines] = after.to(table.dtype)
        return self.activation(output.to(mixed.dtype))


def _steps(groups: Groups) -> Iterator[tuple[slice, Tensor]]:
    """Yields which tokens in the order of groups move on together, and on which lines of a table, int32."""
    start = 0
    for count in groups.steps:
        yield slice(start, start + count), groups.step_lines[:count]
        start += count


def _selected(values: Tensor, groups: Groups) -> Tensor:
    """Returns values (T, ...) in the order of groups, (T', ...)."""
    return values if groups.order is None else values.index_select(0, groups.order.present)


def _joined(parts: list[Tensor], groups: Groups) -> Tensor:
    """Returns what was made of groups, (T', I) in parts, in the order of the rows' tokens, (T, I)."""
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    return values if groups.order is None else values.index_select(0, groups.order.place)
