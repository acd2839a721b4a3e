"""Learned states: what a block projects of a token that left, predicted from its state at the exit.

State recompute gives the projections that a block's states are made of (K and V before the rotary embedding; x, B, C
and dt of a Mamba block) the norm of the exit state, as if nothing had happened in the blocks between. A learned map
in their place, one for each exit and later block, is trained to return what they make of the state that the token
would have had there. All that follows (norms per head, rotary embedding, convolution, scan) is the block's own.

The maps belong to trained exits; this module knows only that they are called.

m tokens that left, D hidden, O outputs of the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

#: Returns what a block projects, (m, O), of what its projections are given, (m, D).
Project = Callable[[Tensor], Tensor]
#: The same for tokens that left at certain exits, given also the block's own way of doing so.
MappedProject = Callable[[Tensor, Project], Tensor]


class StateMap(Protocol):
    """The map of one exit to one block."""

    def __call__(self, inputs: Tensor, project: Project) -> Tensor:
        """Returns (m, O) in place of ``project(inputs)``, for inputs (m, D)."""
        ...


#: By exit layer and block, both counted from 1.
StateMaps = Mapping[tuple[int, int], StateMap]


def mapped_by_place(maps: StateMaps, layers: Sequence[int], origins: Tensor, block: int) -> MappedProject | None:
    """Returns how ``block`` projects tokens that take places and change from call to call; None where it does as ever.

    Every map is made of all of them and each token takes its own, so that the same is asked whoever they are.

    Args:
        maps: those of the exits.
        layers: the exits at which tokens left, 0 for those whose states are recomputed.
        origins: (m,) that of each token.
        block: 1-based.
    """
    known = [layer for layer in layers if (layer, block) in maps]
    if not known:
        return None

    def mapped(inputs: Tensor, project: Project) -> Tensor:
        flat = inputs.flatten(0, -2)
        output = project(flat) if len(known) < len(layers) else None
        for layer in known:
            made = maps[layer, block](flat, project)
            output = made if output is None else torch.where((origins == layer).unsqueeze(-1), made, output)
        assert output is not None, "there is a map"
        shaped: Tensor = output.unflatten(0, inputs.shape[:-1])
        return shaped

    return mapped


class StateProjection(NamedTuple):
    """What the projections of a block are given of some tokens, and what they make of anything."""

    inputs: Tensor  # (m, D)
    project: Project


def mapped_forwards(modules: Sequence[nn.Module], mapped: MappedProject) -> list[tuple[nn.Module, Any]]:
    """Returns modules, which a block calls with the same input, with forwards that hand out parts of what is mapped."""
    joined = JoinedModules(modules)
    made: dict[nn.Module, Tensor] = {}

    def forward_of(module: nn.Module) -> Any:
        def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            if module not in made:
                made.update(joined.split(mapped(inputs, joined.project)))
            return made.pop(module)

        return forward

    return [(module, forward_of(module)) for module in modules]


class JoinedModules:
    """Linear layers of the same input, seen as one projection by their own forwards, whatever replaces them later."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._forwards = [module.forward for module in modules]

    def project(self, inputs: Tensor) -> Tensor:
        """Returns their outputs (m, O) side by side."""
        outputs = [forward(inputs) for forward in self._forwards]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def split(self, outputs: Tensor) -> dict[nn.Module, Tensor]:
        """Returns the parts of outputs (.., O) that are each module's."""
        widths = [int(getattr(module, "out_features")) for module in self._modules]  # noqa: B009 (nn.Module has any)
        return dict(zip(self._modules, outputs.split(widths, dim=-1), strict=True))
