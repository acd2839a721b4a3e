"""Affine read-outs fitted in closed form: h + A h + b that comes closest to the state after block L.

Ridge regression from the hidden states after a layer, over second moments that are summed batch by batch, so nothing
is kept of the tokens. No gradient and no label: a quick guess at what trained adapters might reach.

T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import Backbone, on_device
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.headroom.reading import batches
from dynamax_lm_eval.headroom.text import Row


@dataclass
class Moments:
    """Sums over tokens, in float64: of states x, of what they lack y = (state after block L) - x, and of products.

    Takes 16 * D * D bytes for a layer.
    """

    count: int
    x: Tensor  # (D,)
    y: Tensor  # (D,)
    xx: Tensor  # (D, D)
    xy: Tensor  # (D, D)

    @classmethod
    def zero(cls, hidden_size: int, device: torch.device) -> Moments:
        sums = torch.zeros(2, hidden_size, dtype=torch.float64, device=device)
        squares = torch.zeros(2, hidden_size, hidden_size, dtype=torch.float64, device=device)
        return cls(0, sums[0], sums[1], squares[0], squares[1])

    def add(self, hidden: Tensor, last: Tensor) -> None:
        """Adds tokens: their states (T, D) after the layer and after block L."""
        x = hidden.double()
        y = last.to(hidden.device).double() - x
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Returns A (D, D) and b (D,) with the least mean of |y - A x - b|^2 + penalty * |A|^2, b free.

        ``ridge``: the penalty, in units of the mean variance of a coordinate of x. 0 with too few tokens for one
        solution gives the one with the least A.
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - torch.outer(mean_x, mean_x)
        xy = self.xy / self.count - torch.outer(mean_x, mean_y)
        values, vectors = torch.linalg.eigh(xx)
        values = values.clamp(min=0) + ridge * xx.diagonal().mean()
        usable = values > values.max() * 1e-12
        inverse = torch.where(usable, 1 / values.where(usable, values.new_ones(())), values.new_zeros(()))
        a = (vectors @ (inverse[:, None] * (vectors.T @ xy))).T
        return a, mean_y - a @ mean_x


@torch.no_grad()
def fitted_adapters(backbone: Backbone, rows: Sequence[Row], layers: tuple[int, ...], ridge: float) -> ExitClassifiers:
    """Returns an affine adapter for each layer, fitted on the tokens of ``rows`` that may leave."""
    exits = ExitClassifiers((), layers, backbone.hidden_size, "silu", ClassifierOptions(), adapter="affine")
    exits.place([place.device for place in backbone.places])
    moments: dict[int, Moments] = {}
    for batch, tokens in batches(backbone, rows, layers, False, "adapters"):
        last = batch.last[on_device(tokens, batch.last.device)]
        for layer in layers:
            hidden = batch.exits[layer]
            if layer not in moments:
                moments[layer] = Moments.zero(hidden.shape[1], hidden.device)
            moments[layer].add(hidden[on_device(tokens, hidden.device)], last)
    for layer in layers:
        adapter = exits.adapter(layer)
        assert adapter is not None
        a, b = moments.pop(layer).solve(ridge)
        adapter.up.weight.copy_(a)
        adapter.up.bias.copy_(b)
    return exits.requires_grad_(False).eval()
