"""The states that modules of transformers keep of rows: in tables of a line per row, or in a cache of each row.

R rows, t tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import cache_utils

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.mamba.state_cache import lines_of
from dynamax_lm_eval.backbones.replay.caches import RowCache

#: The states of a layer of transformers' caches for linear attention: their dicts, and where it says what there is.
_KINDS = (("conv_states", "is_conv_states_initialized"), ("recurrent_states", "is_recurrent_states_initialized"))


class StackedTable:
    """States of constant size: convolution windows and recurrent states, those of all rows in one tensor each."""

    def __init__(self, config: Any, layers: tuple[int, ...]) -> None:
        """``layers``: of transformers' cache, that the module uses."""
        self._cache = RowCache(config)
        self._layers = layers
        self._parts: dict[tuple[int, str, int], Tensor] = {}
        self._widths: dict[tuple[int, int], int] = {}

    def clear(self, line: int) -> None:
        """Forgets a row; a new one begins without a state."""

    def copy(self, source: int, line: int) -> None:
        """Gives a line what another holds."""
        for key, part in self._parts.items():
            part = self._reserved(key, line + 1, part)
            with torch.inference_mode(part.is_inference()):
                part[line] = part[source]

    @contextmanager
    def opened(self, numbers: IntArray, past: int) -> Iterator[Any]:
        """Gives a cache that holds the states of rows ``numbers`` (R,), and takes over what was written into it.

        ``past``: 0 for rows that have seen nothing.
        """
        lines = lines_of(numbers, torch.device("cpu"))
        where = lines.tolist() if isinstance(lines, Tensor) else lines
        cache = copy.copy(self._cache)
        cache.layers, cache.past = list(cache.layers), past
        for number in self._layers:
            states = getattr(cache.layers[number], "number_of_states", 1)
            layer: Any = cache_utils.LinearAttentionLayer(number_of_states=states)
            cache.layers[number] = layer
            if not past:
                continue
            for (of, kind, index), part in self._parts.items():
                if of != number:
                    continue
                state = part[where]
                getattr(layer, kind)[index] = state
                getattr(layer, dict(_KINDS)[kind])[index] = True
                layer.has_previous_state[index] = True
                layer.conv_kernel_size[index] = self._widths.get((of, index))
                layer.device, layer.dtype = state.device, state.dtype
        yield cache
        for number in self._layers:
            layer = cache.layers[number]
            for kind, _ in _KINDS:
                for index, state in getattr(layer, kind).items():
                    if state is not None:
                        self._take((number, kind, index), where, numbers, state)
                    if layer.conv_kernel_size[index] is not None:
                        self._widths[number, index] = layer.conv_kernel_size[index]

    def _take(self, key: tuple[int, str, int], where: Any, numbers: IntArray, state: Tensor) -> None:
        part = self._reserved(key, int(numbers.max()) + 1, state)
        if not (isinstance(where, slice) and state.data_ptr() == part[where].data_ptr()):  # else it is a view
            part[where] = state

    def _reserved(self, key: tuple[int, str, int], num_lines: int, like: Tensor) -> Tensor:
        """Returns the tensor of a state with at least so many lines; ``like``: states of some rows."""
        part = self._parts.get(key)
        held = 0 if part is None else len(part)
        if held < num_lines:
            more = like.new_zeros(max(num_lines, 2 * held) - held, *like.shape[1:])
            self._parts[key] = more if part is None else torch.cat([part, more])
        return self._parts[key]

    def numel(self) -> int:
        """Returns how many elements the recurrent states of one row have."""
        return sum(part[0].numel() for (_, kind, _), part in self._parts.items() if kind == "recurrent_states")


class RowTable:
    """States of any kind, in a cache of each row; they may grow with it."""

    def __init__(self, config: Any, layers: tuple[int, ...]) -> None:
        self._config = config
        self._caches: dict[int, RowCache] = {}
        self._positions: dict[int, IntArray] = {}

    def clear(self, line: int) -> None:
        """Forgets a row."""
        self._caches.pop(line, None)
        self._positions.pop(line, None)

    def copy(self, source: int, line: int) -> None:
        """Gives a line what another holds."""
        self.clear(line)
        if source in self._caches:
            self._caches[line] = copy.deepcopy(self._caches[source])
            self._positions[line] = self._positions[source]

    @contextmanager
    def opened(self, numbers: IntArray, past: int) -> Iterator[Any]:
        """Gives the cache of row ``numbers`` (1,); ``past``: 0 for a row that has seen nothing."""
        line = int(numbers[0])
        if not past:
            self.clear(line)
        cache = self._caches.setdefault(line, RowCache(self._config))
        cache.past = len(self._positions.get(line, ()))
        yield cache

    def seen(self, line: int, positions: IntArray) -> IntArray:
        """Notes the tokens that are fed to a row, at ``positions`` (t,), and returns those of all that it holds."""
        before = self._positions.get(line, np.empty(0, dtype=np.int64))
        self._positions[line] = np.concatenate([before, positions])
        return self._positions[line]
