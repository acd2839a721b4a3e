"""Exit adapters: a correction of the hidden state that is read out at an exit, h + A h + b before norm and LM head.

An affine read-out of an intermediate layer (tuned lens, Belrose et al. 2023, arXiv 2303.08112). The state that a token
leaves behind is made of h. Knows hidden states; knows no classifiers, policies or files.

T tokens, D hidden size, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError


class Adapter(nn.Module):
    """The correction h + A h + b, with A of full rank or A = up down of rank R; it begins as the identity."""

    def __init__(self, hidden_size: int, rank: int | None) -> None:
        """``rank``: R; None: full rank."""
        super().__init__()
        self.down = None if rank is None else nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(hidden_size if rank is None else rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def macs(self) -> int:
        """The MACs of one read-out's correction."""
        return self.up.weight.numel() + (0 if self.down is None else self.down.weight.numel())

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the corrected states (T, D), computed in the adapter's dtype and returned in that of ``hidden``."""
        # In float32 as trained; autocast of the backbone does not reach it.
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(self.up.weight.dtype)
            inner = x if self.down is None else self.down(x)
            corrected: Tensor = x + self.up(inner)
            return corrected.to(hidden.dtype)


def check_adapter(name: str) -> None:
    """Raises UserError unless ``name`` is ``none``, ``affine`` or ``lowrank:R``."""
    kind, _, rank = name.partition(":")
    if name not in ("none", "affine") and not (kind == "lowrank" and rank.isdigit() and int(rank) > 0):
        raise UserError(f"adapter must be none, affine or lowrank:R with R at least 1, got {name!r}")


def make_adapters(name: str, exit_layers: tuple[int, ...], hidden_size: int) -> nn.ModuleDict:
    """Makes an adapter of the named kind for each exit layer, and nothing for ``none``.

    Raises:
        UserError: there is no such kind, or its rank exceeds the hidden size.
    """
    check_adapter(name)
    if name == "none":
        return nn.ModuleDict()
    rank = None if name == "affine" else int(name.partition(":")[2])
    if rank is not None and rank > hidden_size:
        raise UserError(f"adapter={name}: the rank must be at most the hidden size, {hidden_size}")
    return nn.ModuleDict({str(layer): Adapter(hidden_size, rank) for layer in exit_layers})
