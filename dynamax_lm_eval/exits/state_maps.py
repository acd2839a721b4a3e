"""State maps of trained exits: what the blocks that a token skipped are to project, predicted from its exit state.

One map for each exit and each block after the one behind it, of the input that the block's projections get in state
recompute (the norm of the exit state); see ``backbones.learned`` for where they stand. A full map takes the place of
the projections and costs what they do; one of rank R is added to them. Knows tensors; knows no backbone.

m tokens, D inputs and O outputs of a block's projections, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError


@dataclass(frozen=True)
class StateMapOptions:
    """What maps an exit checkpoint has."""

    #: ``linear`` or ``lowrank:R``.
    kind: str
    #: D and O of every block, in order; zeros where a block projects nothing that states are made of.
    sizes: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int | None:
        """R; None: maps are full."""
        return None if self.kind == "linear" else int(self.kind.partition(":")[2])

    def macs(self) -> tuple[int, ...]:
        """Returns the MACs that a map to each block adds to those of state recompute."""
        rank = self.rank
        return tuple(0 if rank is None else rank * (inputs + outputs) for inputs, outputs in self.sizes)


def check_state_maps(kind: str) -> None:
    """Raises UserError unless ``kind`` is ``none``, ``linear`` or ``lowrank:R``."""
    name, _, rank = kind.partition(":")
    if kind not in ("none", "linear") and not (name == "lowrank" and rank.isdigit() and int(rank) > 0):
        raise UserError(f"states must be none, linear or lowrank:R with R at least 1, got {kind!r}")


class StateMap(nn.Module):
    """The map of one exit to one block: W x + b, or P x + U V x + b where P are the block's own projections."""

    def __init__(self, inputs: int, outputs: int, rank: int | None) -> None:
        """``inputs``: D; ``outputs``: O; ``rank``: R, None for a full map."""
        super().__init__()
        self.down = None if rank is None else nn.Parameter(torch.zeros(rank, inputs))
        self.weight = nn.Parameter(torch.zeros(outputs, inputs if rank is None else rank))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns (m, O) for inputs (m, D); ``project``: the block's own projections."""
        with torch.autocast(inputs.device.type, enabled=False):
            x = inputs.to(self.weight.dtype)
            if self.down is None:
                return F.linear(x, self.weight, self.bias).to(inputs.dtype)
            added = F.linear(F.linear(x, self.down), self.weight, self.bias)
        projected = project(inputs)
        return projected + added.to(projected.dtype)


def make_state_maps(options: StateMapOptions | None, exit_layers: Sequence[int]) -> nn.ModuleDict:
    """Makes the maps of all exits, by exit layer and block; nothing without options.

    The block right behind an exit has none: what it would have been given is the exit state itself.

    Raises:
        UserError: a rank exceeds a block's sizes.
    """
    maps = nn.ModuleDict()
    if options is None:
        return maps
    smallest = min(min(size) for size in options.sizes if min(size))
    if options.rank is not None and options.rank > smallest:
        raise UserError(f"states={options.kind}: the rank must be at most {smallest}, as the projections have")
    for layer in exit_layers:
        later = list(enumerate(options.sizes, start=1))[layer + 1 :]
        maps[str(layer)] = nn.ModuleDict(
            {str(block): StateMap(*size, options.rank) for block, size in later if min(size)}
        )
    return maps


def by_exit_and_block(maps: nn.ModuleDict) -> dict[tuple[int, int], StateMap]:
    """Returns the maps by exit layer and block, as backbones look them up."""
    found: dict[tuple[int, int], StateMap] = {}
    at_exit: Any
    for layer, at_exit in maps.items():
        found |= {(int(layer), int(block)): state_map for block, state_map in at_exit.items()}
    return found
