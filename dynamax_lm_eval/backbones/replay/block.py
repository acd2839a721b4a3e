"""What is known of one block of a model whose blocks are called with the model's own arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.replay.arguments import CallAxes
from dynamax_lm_eval.backbones.replay.mixers import FlatMixer
from dynamax_lm_eval.backbones.transformer.masks import Visibility


@dataclass
class ReplayBlock:
    """A block, and what it was seen to do at load.

    Attributes:
        module: of the model.
        kv_layers: layers of transformers' cache to which it writes K and V, side by side for all rows.
        mixers: its modules that keep states of another kind.
        axes: where tokens stand in its arguments.
        visibility: what its attention sees.
        is_sequential: a state of it depends on attention or on another state, so its tokens have to come in order.
        projections: linear layers of the same input from which, and nothing else, the states follow; empty: there are
            none, so no states can be learned.
        unneeded: its modules that run before the last write and have no part in it, and the widths of what they return.
    """

    module: nn.Module
    kv_layers: tuple[int, ...]
    mixers: tuple[FlatMixer, ...]
    axes: CallAxes
    visibility: Visibility = None
    is_sequential: bool = False
    unneeded: list[tuple[nn.Module, int]] = field(default_factory=list)
    projections: tuple[nn.Module, ...] = ()

    @property
    def num_writes(self) -> int:
        """After how many writes all its states are written."""
        return len(self.kv_layers) + len(self.mixers)

    @contextmanager
    def without_unneeded(self) -> Iterator[None]:
        """Runs the block with zeros in place of what its states do not depend on."""
        with replaced_forwards([(module, zeros(width)) for module, width in self.unneeded]):
            yield


def zeros(width: int) -> Any:
    """Returns the forward of a linear layer that has nothing to say."""

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], width)

    return forward
