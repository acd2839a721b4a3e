"""Stand-ins for transformers' caches: what blocks write goes to the states of the rows in flight.

n tokens in flight, H_kv K/V heads, P head dim, C slots of a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache, cache_utils

#: Takes a cache layer, K and V (1, H_kv, n, P); returns the caches (1, H_kv, C, P) that now hold them.
Writer = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class FlatCache(DynamicCache):
    """What blocks take for their cache while tokens of several rows stand side by side.

    It says that nothing has been seen, since positions and masks come from elsewhere.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.writer: Writer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes K and V."""
        if self.writer is None:
            raise TypeError("a block writes K and V outside a pass")
        return self.writer(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a module keeps a state that is not seen where several rows stand side by side")

    get_conv_state = get_recurrent_state = update_conv_state = update_recurrent_state = update_indexer = _refuse


class RowCache(DynamicCache):
    """The cache of one row, or of several with a token each; K and V of the whole past, whatever the window.

    ``past``: how many tokens it has seen; the mask says which of them count.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [_unwindowed(layer) for layer in self.layers]
        self.past = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + int(query_length), 0


def _unwindowed(layer: Any) -> Any:
    """Returns a layer that keeps all K and V in place of one that keeps a window of them."""
    known: Any = cache_utils
    if type(layer) is known.DynamicSlidingWindowLayer:
        return known.DynamicLayer()
    hybrid = getattr(known, "LinearAttentionAndSlidingWindowAttentionLayer", None)
    if hybrid is not None and type(layer) is hybrid:
        return known.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return layer
