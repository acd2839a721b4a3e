"""Exit adapters: a correction of the hidden state that is read out at an exit, before norm and LM head.

Affine, h + A h + b: an affine read-out of an intermediate layer (tuned lens, Belrose et al. 2023, arXiv 2303.08112), A
of full rank or of rank R. Gated, with an MLP of W channels beside it (SwiGLU, Shazeer 2020, arXiv 2002.05202):
h + A h + b + V (silu(G n) * U n), n = h / rms(h). The state that a token leaves behind is made of h. Knows hidden
states; knows no classifiers, policies or files.

T tokens, D hidden size, R rank, W channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.errors import UserError


class Adapter(nn.Module):
    """The affine correction; it begins as the identity."""

    def __init__(self, hidden_size: int, rank: int | None) -> None:
        """``rank``: R; None: full rank."""
        super().__init__()
        self.down = None if rank is None else nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(hidden_size if rank is None else rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def macs(self) -> int:
        """The MACs of one read-out's correction: its weights, without those of a bias."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the corrected states (T, D), computed in the adapter's dtype and returned in that of ``hidden``."""
        # In float32 as trained; autocast of the backbone does not reach it.
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(self.up.weight.dtype)
            return (x + self.correction(x)).to(hidden.dtype)

    def correction(self, x: Tensor) -> Tensor:
        """Returns what is added to states (T, D)."""
        added: Tensor = self.up(x if self.down is None else self.down(x))
        return added


class GatedAdapter(Adapter):
    """The affine correction with a gated MLP beside it; it begins as the identity."""

    def __init__(self, hidden_size: int, channels: int) -> None:
        """``channels``: W."""
        super().__init__(hidden_size, None)
        self.gate_up = nn.Linear(hidden_size, 2 * channels, bias=False)
        self.mlp_down = nn.Linear(channels, hidden_size, bias=False)
        nn.init.zeros_(self.mlp_down.weight)

    def correction(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], eps=1e-5)).chunk(2, dim=-1)
        added: Tensor = super().correction(x) + self.mlp_down(F.silu(gate) * up)
        return added


def check_adapter(name: str) -> None:
    """Raises UserError unless ``name`` is ``none``, ``affine``, ``lowrank:R`` or ``swiglu:W``."""
    kind, _, size = name.partition(":")
    if name not in ("none", "affine") and not (kind in ("lowrank", "swiglu") and size.isdigit() and int(size) > 0):
        raise UserError(f"adapter must be none, affine, lowrank:R or swiglu:W with R and W at least 1, got {name!r}")


def make_adapters(name: str, exit_layers: tuple[int, ...], hidden_size: int) -> nn.ModuleDict:
    """Makes an adapter of the named kind for each exit layer, and nothing for ``none``.

    Raises:
        UserError: there is no such kind, or its rank exceeds the hidden size.
    """
    check_adapter(name)
    if name == "none":
        return nn.ModuleDict()
    kind, _, size = name.partition(":")
    if kind == "swiglu":
        return nn.ModuleDict({str(layer): GatedAdapter(hidden_size, int(size)) for layer in exit_layers})
    rank = None if kind == "affine" else int(size)
    if rank is not None and rank > hidden_size:
        raise UserError(f"adapter={name}: the rank must be at most the hidden size, {hidden_size}")
    return nn.ModuleDict({str(layer): Adapter(hidden_size, rank) for layer in exit_layers})
