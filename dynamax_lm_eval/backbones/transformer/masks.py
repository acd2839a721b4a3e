"""What a token may attend to, as the model's own mask code says it.

transformers describes every mask by a function of positions and hands it to whoever makes the mask. Registered here
under the name of the ragged attention is one that makes no mask: it hands the function on.

Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dynamax_lm_eval.backbones.base import BoolArray, IntArray, on_device

#: Positions at which a mask is compared with a causal one: all of the first, and then ever fewer.
_DENSE = 64
_SPARSE = 48


class MaskRule:
    """A mask as a function of positions; stands where models expect the mask to be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """``function``: of batch, head, query and key indices, as transformers defines it."""
        self._function = function

    def attended(self, queries: IntArray, keys: IntArray) -> BoolArray:
        """Returns whether queries at positions (Q,) attend to keys at positions (K,), (Q, K)."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        q, k = torch.from_numpy(queries).view(-1, 1), torch.from_numpy(keys).view(1, -1)
        seen: Any = self._function(nothing, nothing, q, k)
        result: BoolArray = torch.as_tensor(seen).expand(len(queries), len(keys)).bool().cpu().numpy()
        return result

    def tensor(self, queries: IntArray, keys: IntArray, like: Tensor) -> Tensor:
        """Returns the mask as scores to add (1, 1, Q, K), in the dtype and on the device of ``like``."""
        seen = on_device(self.attended(queries, keys), like.device)
        zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return zeros.masked_fill_(~seen, torch.finfo(like.dtype).min)[None, None]

    def __getitem__(self, _: Any) -> MaskRule:
        """Some families cut masks to the length of the keys; what they ask for is decided by positions here."""
        return self


#: None: everything up to the token; a number: so many tokens up to it; else what the rule says of those up to it.
Visibility = int | None | MaskRule


def classified(rule: MaskRule, horizon: int) -> Visibility:
    """Returns what a rule is up to position ``horizon``: causal, causal with a window, or itself."""
    sparse = np.geomspace(_DENSE, max(horizon - 1, _DENSE), _SPARSE).astype(np.int64)
    queries = np.unique(np.concatenate([np.arange(min(_DENSE, horizon)), sparse[sparse < horizon]]))
    last = int(queries[-1])
    window = int(rule.attended(queries[-1:], np.arange(last + 1)).sum())
    for query in queries:
        keys = np.arange(int(query) + 1)
        seen = rule.attended(np.asarray([query]), keys)[0]
        if not np.array_equal(seen, query - keys < window):
            return rule
    return None if window == last + 1 else window


def _as_rule(*_: Any, mask_function: Callable[..., Any], **__: Any) -> MaskRule:
    return MaskRule(mask_function)


def register(name: str) -> None:
    """Makes models hand on mask functions where their attention is the one of this name."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _as_rule)
