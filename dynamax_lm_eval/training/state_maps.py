"""Fits state maps: what a block would have projected of a token, by least squares from the state at its exit.

For exit l and block b > l, x is what the block's projections P get in state recompute (the norm of the exit state h_l)
and y = P(x') what they make of what they get of a token that stays, x'. Ridge regression of y - P(x) on x with an
intercept, so that with few tokens a map is near to recompute:

    minimise  sum |y - P(x) - A x - c|^2  +  lambda |A|^2,   lambda = RIDGE * mean square of x's channels * tokens

in closed form from second moments, which are summed over one pass through the text, or over as many as keep them small
enough beside a large model. A map of rank R keeps the R
directions of A x that vary most (reduced-rank regression, Izenman 1975).

N tokens of a batch, D inputs and O outputs of a block's projections, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.learned import StateProjection
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.state_maps import StateMap, StateMapOptions, by_exit_and_block
from dynamax_lm_eval.frozen.passes import FrozenPass, begin
from dynamax_lm_eval.frozen.regression import Moments
from dynamax_lm_eval.progress import Bar
from dynamax_lm_eval.training.batches import MicroBatches
from dynamax_lm_eval.training.trainer import Processes

#: Bytes of the moments of the maps that are fitted in one pass through the text; others take further passes.
MOMENT_BYTES = 2**32
#: Strength of the ridge, relative to the mean square of a channel of x.
RIDGE = 1e-4


def projection_sizes(frozen: FrozenPass) -> tuple[tuple[int, int], ...]:
    """Returns D and O of every block's projections; zeros for blocks before all exits, and a final block.

    Raises:
        UserError: the backbone's states cannot be learned.
    """
    frozen.backbone.check_state_mode("learned", frozen.exit_layers)
    sizes = [(0, 0)] * frozen.backbone.num_layers
    for projected in _projections(frozen, [[0, 0]]):
        outputs = projected.true.project(projected.true.inputs).shape[-1]
        sizes[projected.block - 1] = (projected.true.inputs.shape[-1], outputs)
    return tuple(sizes)


@dataclass(frozen=True)
class _Projected:
    """What the projections of one block are given."""

    block: int
    true: StateProjection  # of tokens that stay
    at_exit: dict[int, StateProjection]  # of tokens that left, by exit layer


@torch.no_grad()
def _projections(frozen: FrozenPass, rows: Sequence[Sequence[int]]) -> Iterator[_Projected]:
    """Yields, block by block, what blocks behind exits are given of all tokens of some rows."""
    backbone = frozen.backbone
    run, _, ids = begin(backbone, rows)
    last = backbone.num_layers - 1 if frozen.final_block else backbone.num_layers
    left: dict[int, Tensor] = {}
    with backbone.running():
        hidden, tokens = run.embed(ids), np.arange(len(ids))
        for block in range(1, last + 1):
            if left:
                at_exit = {layer: run.state_projection(block, state) for layer, state in left.items()}
                yield _Projected(block, run.state_projection(block, hidden), at_exit)
            hidden = run.run_block(block, tokens, hidden)
            if block in frozen.exit_layers:
                left[block] = hidden


def _solved(sums: Moments, rank: int | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns A (O, D) as ``up`` and None, or of rank R as ``up`` (O, R) and ``down`` (R, D); and c (O,)."""
    weight, bias = sums.solve(RIDGE * sums.mean_square)
    if rank is None:
        return weight, None, bias
    spread = weight @ sums.covariance @ weight.T
    _, directions = torch.linalg.eigh((spread + spread.T) / 2)
    kept = directions[:, -rank:]  # (O, R)
    # What is dropped keeps its mean.
    bias = bias + (weight - kept @ kept.T @ weight) @ (sums.x.double() / sums.count)
    return kept, kept.T @ weight, bias


@torch.no_grad()
def fit(
    frozen: FrozenPass,
    classifiers: ExitClassifiers,
    text: Callable[[], MicroBatches],
    count: int,
    processes: Processes | None = None,
) -> None:
    """Fits all maps of ``classifiers`` to the text of ``count`` micro-batches, which processes share.

    Args:
        frozen: the backbone.
        classifiers: hold the maps, which are changed in place.
        text: begins the text.
        count: micro-batches to read.
        processes: which of several this is.
    """
    options, mine = classifiers.states, processes or Processes()
    assert options is not None, "there are maps"
    maps = by_exit_and_block(classifiers.state_maps)
    passes = _passes(options, list(maps))
    with Bar(count * len(passes), "fitting state maps", disable=mine.index != 0) as bar:
        for keys in passes:
            batches = text()
            moments = {(layer, block): _no_moments(maps[layer, block], options, block) for layer, block in keys}
            for number in range(count):
                rows = next(batches)
                if number % mine.count == mine.index:
                    _add(frozen, rows, moments)
                bar.update()
            for key, sums in moments.items():
                _set(maps[key], *_solved(sums.added_up(mine.add_up), options.rank))
    if options.rank is None:
        _add_projections(frozen, maps)


def _passes(options: StateMapOptions, keys: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Returns the maps, by exit and block, that are fitted in each pass."""
    passes: list[list[tuple[int, int]]] = []
    room = 0
    for layer, block in keys:
        inputs, outputs = options.sizes[block - 1]
        size = 4 * (inputs + 1) * (inputs + 1 + outputs)
        if not passes or size > room:
            passes.append([])
            room = MOMENT_BYTES
        passes[-1].append((layer, block))
        room -= size
    return passes


def _no_moments(state_map: StateMap, options: StateMapOptions, block: int) -> Moments:
    # Of a large model, float64 would take several GB more.
    return Moments.zero(*options.sizes[block - 1], state_map.weight.device, torch.float32)


def _add(frozen: FrozenPass, rows: Sequence[Sequence[int]], moments: Mapping[tuple[int, int], Moments]) -> None:
    for projected in _projections(frozen, rows):
        own = {layer: part for layer, part in projected.at_exit.items() if (layer, projected.block) in moments}
        target = projected.true.project(projected.true.inputs).float() if own else None
        for layer, (inputs, project) in own.items():
            assert target is not None
            moments[layer, projected.block].add(inputs.float(), target - project(inputs).float())


def _set(state_map: StateMap, up: Tensor, down: Tensor | None, bias: Tensor) -> None:
    state_map.weight.copy_(up)
    state_map.bias.copy_(bias)
    if down is not None:
        assert state_map.down is not None
        state_map.down.copy_(down)


def _add_projections(frozen: FrozenPass, maps: dict[tuple[int, int], StateMap]) -> None:
    """Adds the blocks' own projections to full maps, which stand in their place."""
    for projected in _projections(frozen, [[0, 0]]):
        inputs, project = projected.true
        size = inputs.shape[-1]
        parts = []
        for some in torch.eye(size, device=inputs.device).split(256):
            parts.append((project(some.to(inputs.dtype)) - project(torch.zeros_like(some, dtype=inputs.dtype))).float())
        weight, bias = torch.cat(parts).T, project(inputs.new_zeros(1, size))[0].float()
        for layer in projected.at_exit:
            if (state_map := maps.get((layer, projected.block))) is not None:
                state_map.weight.add_(weight.to(state_map.weight.device))
                state_map.bias.add_(bias.to(state_map.bias.device))


@torch.no_grad()
def explained(
    frozen: FrozenPass, classifiers: ExitClassifiers, rows: Sequence[Sequence[int]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns how much of the variance of true projections learned and recomputed ones explain (R^2).

    By exit layer and block; ``learned`` and ``recompute``, of all outputs together.
    """
    maps = by_exit_and_block(classifiers.state_maps)
    found: dict[tuple[int, int], Tensor] = {}
    targets: dict[int, tuple[Tensor, Tensor, int]] = {}
    for row in rows:
        for projected in _projections(frozen, [row]):
            y = projected.true.project(projected.true.inputs).double()
            total, squares, count = targets.get(projected.block, (0.0, 0.0, 0))
            targets[projected.block] = total + y.sum(0), squares + y.square().sum(), count + len(y)
            for layer, own in projected.at_exit.items():
                if (state_map := maps.get((layer, projected.block))) is None:
                    continue
                made = (state_map(own.inputs, own.project), own.project(own.inputs))
                errors = torch.stack([(y - part.double()).square().sum() for part in made])
                key = layer, projected.block
                found[key] = found[key] + errors if key in found else errors
    report: dict[str, dict[str, dict[str, float]]] = {}
    for (layer, block), errors in found.items():
        total, squares, count = targets[block]
        variance = squares - total.square().sum() / count
        values = (1 - errors / variance).tolist()
        report.setdefault(str(layer), {})[str(block)] = dict(zip(("learned", "recompute"), values, strict=True))
    return report


def make_options(frozen: FrozenPass, kind: str) -> StateMapOptions | None:
    """Returns the options of maps of this kind for a backbone; None for ``none``."""
    return None if kind == "none" else StateMapOptions(kind, projection_sizes(frozen))
