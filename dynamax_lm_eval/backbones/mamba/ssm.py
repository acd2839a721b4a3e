"""The arithmetic of Mamba mixers over flat ragged rows: causal convolution and the selective scans.

Rows stand side by side without padding and never touch one another's windows or states. Two forms of the
same recurrence: chunked for many tokens (Mamba-2: Dao and Gu 2024, arXiv 2405.21060, section 6), and one step
for one token per row. Knows tensors; knows no modules, engines or policies.

T tokens of all rows, R rows, C channels, H heads, P head dim, G groups, N SSM state, K conv kernel,
I inner width of Mamba-1, Q chunk length, c chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.rows import Chunks, RaggedRows

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns the function without autocast, so that its sums over many tokens keep their precision."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.autocast(args[0].device.type, enabled=False):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return run


class MixerShape(NamedTuple):
    """The sizes of a mixer."""

    heads: int  # H
    head_dim: int  # P
    groups: int  # G; heads of a group share B and C
    state: int  # N
    kernel: int  # K

    @property
    def inner(self) -> int:
        """The inner width, H * P."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The channels of the convolution: x, B and C side by side."""
        return self.inner + 2 * self.groups * self.state

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x (..., H, P), B and C (..., G, N) of (..., C)."""
        x, b, c = values.split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        per_group = (self.groups, self.state)
        return x.unflatten(-1, (self.heads, self.head_dim)), b.unflatten(-1, per_group), c.unflatten(-1, per_group)


class MixerState(NamedTuple):
    """The states that rows carry from token to token."""

    conv: Tensor  # (R, K - 1, C), the last inputs of the convolution, oldest first
    ssm: Tensor  # (R, H, P, N), float32


@_without_autocast
def causal_conv(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: RaggedRows, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the depthwise causal convolution of each row.

    Args:
        inputs: (T, C)
        weight: (C, K)
        bias: (C,)
        rows: the T tokens' rows.
        window: (R, K - 1, C) the rows' earlier inputs; None: zeros.

    Returns:
        (T, C), and the new window (R, K - 1, C).
    """
    width = weight.shape[1] - 1
    if window is None:
        window = inputs.new_zeros(rows.num_rows, width, inputs.shape[1])
    if rows.single_tokens:
        seen = torch.cat([window.to(inputs.dtype), inputs.unsqueeze(1)], dim=1)  # (R, K, C)
        output = (seen * weight.T).sum(1)
        return (output if bias is None else output + bias), seen[:, 1:]
    # One pass of shifted sums over all rows; what the first tokens of a row have from the row before is
    # then replaced.
    output = inputs * weight[:, width]
    for k in range(1, width + 1):
        output = output + F.pad(inputs, (0, 0, k, 0))[: len(inputs)] * weight[:, width - k]
    edges = rows.edges(width)
    earlier = torch.cat([window.flatten(0, 1).to(inputs.dtype), inputs])
    near = earlier[edges.seen_by_first]  # (first tokens, K, C)
    output = output.index_copy(0, edges.first, torch.einsum("fkc,ck->fc", near, weight).to(output.dtype))
    return (output if bias is None else output + bias), earlier[edges.last]


@_without_autocast
def selective_scan(
    inputs: Tensor,
    dt: Tensor,
    decay: Tensor,
    shape: MixerShape,
    rows: RaggedRows,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Computes h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t and y_t = C_t h_t, for each head of each row, in float32.

    Args:
        inputs: (T, C): x, B and C side by side.
        dt: (T, H) step sizes, after softplus and clamp; 0 leaves the state as it is.
        decay: (H,) A, negative.
        shape: the sizes.
        rows: the T tokens' rows.
        state: (R, H, P, N) the rows' states; None: zeros. Overwritten where every row has one token.

    Returns:
        (T, H, P) without the skip term D x, and the new states (R, H, P, N); None in training on new rows,
        where nobody asks for them.
    """
    inputs, dt, decay = inputs.float(), dt.float(), decay.float()
    if rows.single_tokens:
        return _step(inputs, dt, decay, shape, state)
    heads, groups, q, layout = shape.heads, shape.groups, rows.chunk, rows.chunks
    x, b, c = shape.split(layout.split(inputs, q))  # (c, Q, H, P), (c, Q, G, N)
    steps = layout.split(dt, q)  # (c, Q, H)
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # (c, G, Q, N)
    total = (steps * decay).cumsum(1)  # (c, Q, H), log of the decay since the chunk began
    weighted = x * steps.unsqueeze(-1)  # (c, Q, H, P)

    log = total.transpose(1, 2)  # (c, H, Q)
    later = torch.ones(q, q, dtype=torch.bool, device=inputs.device).triu(1)
    # The exponent is masked, not its exp: above the diagonal it would overflow.
    passed = (log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()  # (c, H, Q, Q)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(2)  # (c, G, 1, Q, Q)
    mixed = (passed.unflatten(1, (groups, -1)) * scores).flatten(1, 2)  # (c, H, Q, Q)
    output = (mixed @ weighted.transpose(1, 2)).transpose(1, 2)  # (c, Q, H, P)

    def by_group(values: Tensor) -> Tensor:  # (c, Q, H, P) to (c, G, Q, H / G * P)
        grouped: Tensor = values.unflatten(2, (groups, -1))
        return grouped.flatten(3).transpose(1, 2)

    to_end = (total[:, -1:] - total).exp()  # (c, Q, H)
    added = by_group(weighted * to_end.unsqueeze(-1)).transpose(-1, -2) @ b  # (c, G, H / G * P, N)
    added = added.flatten(1, 2).unflatten(1, (heads, -1))  # (c, H, P, N)
    kept = total[:, -1].exp()[..., None, None]  # (c, H, 1, 1)
    last: Tensor | None
    if state is None and inputs.requires_grad:
        before, last = _carried_at_once(layout, added, total[:, -1]), None
    else:
        before, last = _carry(layout, added, kept, rows.num_rows, state)
    carried = before.unflatten(1, (groups, -1)).flatten(2, 3)  # (c, G, H / G * P, N)
    from_before = (c @ carried.transpose(-1, -2)).transpose(1, 2).flatten(2).unflatten(2, (heads, -1))  # (c, Q, H, P)
    output = output + from_before * total.exp().unsqueeze(-1)
    return layout.join(output.flatten(2)).unflatten(-1, (heads, -1)), last


def _carry(layout: Chunks, added: Tensor, kept: Tensor, num_rows: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the states before each chunk (c, H, P, N) and after each row (R, H, P, N)."""
    current = added.new_zeros(num_rows, *added.shape[1:]) if state is None else state.float()
    before = []
    for row, number in layout.rounds:
        incoming = current.index_select(0, row)
        before.append(incoming)
        after = kept.index_select(0, number) * incoming + added.index_select(0, number)
        current = current.index_copy(0, row, after)
    return torch.cat(before).index_select(0, layout.order), current


def _carried_at_once(layout: Chunks, added: Tensor, log: Tensor) -> Tensor:
    """Returns the states before each chunk (c, H, P, N) of new rows; ``log`` (c, H) is the log of each chunk's decay.

    One product with a (c, c) matrix for each head: few operations to differentiate, but quadratic in c.
    """
    number = torch.arange(len(added), device=added.device)
    since = log.cumsum(0).T  # (H, c)
    # From the end of chunk j to the beginning of chunk i: the decay of the chunks between them.
    exponent = (since - log.T).unsqueeze(-1) - since.unsqueeze(-2)  # (H, c, c)
    reaches = (layout.row_of.unsqueeze(-1) == layout.row_of) & (number.unsqueeze(-1) > number)
    weights = exponent.masked_fill(~reaches, -torch.inf).exp()
    before = weights @ added.transpose(0, 1).flatten(2)  # (H, c, P * N)
    states: Tensor = before.transpose(0, 1).unflatten(-1, added.shape[2:])
    return states


def _step(inputs: Tensor, dt: Tensor, decay: Tensor, shape: MixerShape, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs one token per row and returns (R, H, P) and the new states (R, H, P, N), in the memory of the given ones.

    States are the largest tensors of a decoding step by far, so they are gone through as seldom as can be.
    """
    x, b, c = shape.split(inputs)  # (R, H, P), (R, G, N)
    weighted = (dt.unsqueeze(-1) * x).unflatten(1, (shape.groups, -1)).unsqueeze(-1)  # (R, G, H / G, P, 1)
    b = b[:, :, None, None]  # (R, G, 1, 1, N)
    if state is None:
        current = weighted * b
    else:
        state = state.float()
        state *= (dt * decay).exp()[..., None, None]
        current = state.unflatten(1, (shape.groups, -1)).addcmul_(weighted, b)
    read = current.flatten(2, 3) @ c.unsqueeze(-1)  # (R, G, H / G * P, 1)
    return read.view(len(read), shape.heads, shape.head_dim), current.flatten(1, 2)


@_without_autocast
def channel_scan(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    rows: RaggedRows,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes the recurrence of Mamba-1, where each channel and state has a decay of its own, in float32.

    Such decays have no matrix form within a chunk: the tokens of a chunk follow one another, all chunks of all
    rows at once. Rows of several chunks are gone through twice, first for the states between chunks.

    Args:
        x: (T, I)
        dt: (T, I) step sizes after softplus; 0 leaves the state as it is.
        decay: (I, N) A, negative.
        b: (T, N)
        c: (T, N)
        rows: the T tokens' rows.
        state: (R, I, N) the rows' states; None: zeros. May be overwritten.

    Returns:
        (T, I) without the skip term D x, and the new states (R, I, N).
    """
    x, dt, decay, b, c = (values.float() for values in (x, dt, decay, b, c))
    current = x.new_zeros(rows.num_rows, *decay.shape) if state is None else state.float()
    if rows.single_tokens:
        current = _advance(current, x, dt, decay, b)
        return (current @ c.unsqueeze(-1)).squeeze(-1), current
    layout, q = rows.chunks, rows.chunk
    xs, steps, bs, cs = (layout.split(values, q) for values in (x, dt, b, c))  # (c, Q, I), (c, Q, N)
    if len(layout.rounds) > 1:
        added = x.new_zeros(len(xs), *decay.shape)
        for i in range(q):
            added = _advance(added, xs[:, i], steps[:, i], decay, bs[:, i])
        kept = (steps.sum(1).unsqueeze(-1) * decay).exp()  # (c, I, N)
        current, last = _carry(layout, added, kept, rows.num_rows, current)
    outputs = []
    for i in range(q):
        current = _advance(current, xs[:, i], steps[:, i], decay, bs[:, i])
        outputs.append((current @ cs[:, i].unsqueeze(-1)).squeeze(-1))
    joined = layout.join(torch.stack(outputs, dim=1))
    return joined, last if len(layout.rounds) > 1 else current


def _advance(state: Tensor, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor) -> Tensor:
    """Returns the states (r, I, N) one step later, after x and dt (r, I) and B (r, N)."""
    return torch.addcmul((dt.unsqueeze(-1) * decay).exp() * state, (dt * x).unsqueeze(-1), b.unsqueeze(-2))
