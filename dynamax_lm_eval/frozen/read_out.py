"""Read-outs in float32 of a backbone whose weights are narrower, for labels and what is compared with them.

In half precision the two best tokens often have the same logit, or trade places by rounding, and a label would follow
from that. Hidden states are taken as the blocks make them; final norm and LM head are computed in float32 with the
weights as they are.

T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.backbones.base import Backbone, FinalParts
from dynamax_lm_eval.backbones.linear import is_changed, is_plain
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.models.placement import moved

#: Weights of an LM head that are kept in float32, in elements (512 MiB): widening takes as long as reading few tokens.
KEPT = 2**27
#: Weights of a larger one that are widened at once, in elements: 64 MiB.
WEIGHTS_AT_ONCE = 2**24


class Float32ReadOut:
    """Final norm and LM head of a backbone in float32, where they can be read by their weights.

    Where they cannot (quantised, hooked, adapted, split or offloaded weights, a read-out of other parts), or where all
    of them are in float32 already, logits are what :meth:`Backbone.readout` gives, to the bit.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._kept: Tensor | None = None
        self._kept_of: tuple[int, int] | None = None  # place and version of the weights that were widened

    def __call__(self, hidden: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Returns the logits (T, V) of hidden states (T, D), as blocks made them.

        ``adapter``: corrects them first, then without rounding its result.
        """
        parts = self._backbone.final_parts
        in_float32 = parts is not None and is_narrow(parts)
        if in_float32:
            hidden = hidden.float()
        if adapter is not None:
            hidden = adapter(hidden)
        if parts is None or not in_float32:
            return self._backbone.readout(hidden)
        weights = {name: tensor.float() for name, tensor in parts.norm.state_dict().items()}
        here = next(iter(weights.values())).device if weights else hidden.device
        normed: Tensor = torch.func.functional_call(parts.norm, weights, (moved(hidden, here),))
        head: Any = parts.head
        normed = moved(normed.float(), head.weight.device)
        weight = self._widened(head.weight)
        logits: Tensor = _HeadProduct.apply(normed, weight, head.bias)  # type: ignore[no-untyped-call]
        logits = moved(logits, self._backbone.output_device)
        return logits if parts.softcap is None else torch.tanh(logits / parts.softcap) * parts.softcap

    def _widened(self, weight: Tensor) -> Tensor:
        """Returns the weights (V, D) in float32, kept for the next time, or as they are where they are many."""
        if weight.numel() > KEPT:
            return weight
        now = (weight.data_ptr(), weight._version)
        if self._kept is None or self._kept_of != now:
            self._kept, self._kept_of = weight.detach().float(), now
        return self._kept


def is_narrow(parts: FinalParts) -> bool:
    """Returns whether a read-out can be made of these parts' weights, and some of these are narrower than float32."""
    norm, head = parts.norm, parts.head
    if not isinstance(norm, nn.Module) or is_changed(vars(norm)) or not is_plain(head):
        return False
    tensors = [*norm.state_dict().values(), *head.parameters()]
    if any(not t.is_floating_point() or t.is_meta or hasattr(t, "full_tensor") for t in tensors):
        return False
    return any(t.element_size() < torch.float32.itemsize for t in tensors)


class _HeadProduct(torch.autograd.Function):
    """x W^T + b in float32 for x (T, D) and W (V, D) of any dtype, some rows of W at a time in both directions.

    The gradient is that of x alone: the head is frozen. Without this, autograd would keep W in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        logits = x.new_empty(len(x), len(weight))
        for rows in _slices(weight):
            own = None if bias is None else bias[rows].float()
            logits[:, rows] = F.linear(x, weight[rows].float(), own)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        of_x = gradient.new_zeros(len(gradient), weight.shape[1])
        for rows in _slices(weight):
            of_x.addmm_(gradient[:, rows], weight[rows].float())
        return of_x, None, None


def _slices(weight: Tensor) -> list[slice]:
    """Returns the rows of W (V, D) in parts of at most ``WEIGHTS_AT_ONCE`` elements to widen, or of one row."""
    if weight.dtype == torch.float32:
        return [slice(None)]
    size = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    return [slice(first, first + size) for first in range(0, len(weight), size)]
