"""Affine read-outs fitted in closed form: h + A h + b that comes closest to the state after block L.

Ridge regression from the hidden states after a layer, over second moments that are summed batch by batch, so nothing
is kept of the tokens. No gradient and no label: a quick guess at what trained adapters might reach.

T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamax_lm_eval.backbones.base import Backbone, on_device
from dynamax_lm_eval.exits.classifiers import ClassifierOptions, ExitClassifiers
from dynamax_lm_eval.frozen.regression import Moments
from dynamax_lm_eval.headroom.reading import batches
from dynamax_lm_eval.headroom.text import Row


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
                moments[layer] = Moments.zero(hidden.shape[1], last.shape[1], hidden.device, torch.float64)
            own = hidden[on_device(tokens, hidden.device)].double()
            moments[layer].add(own, last.to(own.device).double() - own)
    for layer in layers:
        adapter = exits.adapter(layer)
        assert adapter is not None
        sums = moments.pop(layer)
        # In units of the mean variance of a coordinate.
        a, b = sums.solve(ridge * float(sums.covariance.diagonal().mean()))
        adapter.up.weight.copy_(a)
        adapter.up.bias.copy_(b)
    return exits.requires_grad_(False).eval()
