"""What blocks do, found by watching them: which modules keep which states, and what blocks return.

Nothing here knows a family. A few tokens run through the model as transformers runs it, once at once and once more
after one another; every use of the cache is noted with the module that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones.replay.caches import RowCache
from dynamax_lm_eval.backbones.replay.model import ReplayModel, arity_of

#: Tokens that are fed at once, in two runs: where arguments differ in size, there stand tokens.
LENGTHS = (5, 7)

_RECURRENT = ("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state")


@dataclass(frozen=True)
class CacheUse:
    """One use of the cache by a block."""

    name: str  # of the cache's method
    module: nn.Module  # the innermost that was running
    layer: int  # of the cache
    values: int = 0  # elements of K and V for one token


@dataclass
class BlockTrace:
    """What one block was seen to do with a cache, in order."""

    uses: list[CacheUse] = field(default_factory=list)

    @property
    def recurrent_modules(self) -> dict[nn.Module, tuple[int, ...]]:
        """The modules that keep a convolution window or a recurrent state, and their layers of the cache."""
        return self._modules(_RECURRENT)

    @property
    def growing_modules(self) -> dict[nn.Module, tuple[int, ...]]:
        """The modules that keep something that grows with the row, and their layers of the cache."""
        return self._modules(("update", "update_indexer"))

    def _modules(self, names: Sequence[str]) -> dict[nn.Module, tuple[int, ...]]:
        found: dict[nn.Module, tuple[int, ...]] = {}
        for use in self.uses:
            if use.name in names:
                found[use.module] = tuple(sorted({*found.get(use.module, ()), use.layer}))
        return found

    def kv_layers(self, intercepted: Sequence[nn.Module]) -> tuple[int, ...]:
        """The layers of the cache to which K and V are written outside some modules."""
        return tuple(use.layer for use in self.uses if use.name == "update" and use.module not in intercepted)


class Watched(RowCache):
    """A cache of one row that tells who uses it."""

    def __init__(self, config: Any, tell: Any) -> None:
        super().__init__(config)
        self._tell = tell

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._tell("update", layer_idx, (key_states.numel() + value_states.numel()) // key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _telling(name: str) -> Any:
    def method(self: Watched, *args: Any, **kwargs: Any) -> Any:
        place = 0 if name.startswith("get") else 1
        layer = kwargs["layer_idx"] if "layer_idx" in kwargs else args[place]
        self._tell(name, layer)
        return getattr(RowCache, name)(self, *args, **kwargs)

    return method


for _name in (*_RECURRENT, "update_indexer"):
    if hasattr(RowCache, _name):
        setattr(Watched, _name, _telling(_name))


@dataclass(frozen=True)
class ModelTrace:
    """What all blocks were seen to do."""

    blocks: list[BlockTrace]
    cache: Watched  # after the run


@torch.no_grad()
def watch(replay: ReplayModel) -> ModelTrace:
    """Runs a few tokens at once and one after them, and notes what every block does; sets the blocks' arities."""
    traces = [BlockTrace() for _ in replay.blocks]
    stack: list[nn.Module] = []
    inside: list[int] = []

    def tell(name: str, layer: int, values: int = 0) -> None:
        if inside:
            use = CacheUse(name, stack[-1], layer, values)
            if use not in traces[inside[-1]].uses:
                traces[inside[-1]].uses.append(use)

    cache = Watched(replay.model.config, tell)
    with _following(replay, stack, inside):
        feed(replay, range(LENGTHS[0]), cache)
        feed(replay, [LENGTHS[0]], cache)
    return ModelTrace(traces, cache)


def feed(replay: ReplayModel, tokens: Sequence[int], cache: RowCache | None) -> Tensor:
    """Feeds the tokens at positions ``tokens`` of a row, as transformers would; returns their logits (t, V)."""
    config = replay.model.config.get_text_config()
    positions = torch.as_tensor(list(tokens), device=replay.device)
    output = replay.run((positions * 7 + 3) % config.vocab_size, positions, cache)
    if cache is not None:
        cache.past = int(tokens[-1]) + 1
    logits: Tensor = output.logits[0]
    return logits


def _popping(stack: list[nn.Module]) -> Any:
    def hook(*_: Any) -> None:
        stack.pop()

    return hook


@contextmanager
def _following(replay: ReplayModel, stack: list[nn.Module], inside: list[int]) -> Iterator[None]:
    """Keeps the modules of blocks that are running in ``stack``, and the numbers of their blocks in ``inside``."""
    hooks = []
    for number, block in enumerate(replay.blocks):

        def enter(*_: Any, number: int = number) -> None:
            inside.append(number)

        def leave(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
            inside.pop()
            replay.arities[number] = arity_of(output)

        hooks.append(block.register_forward_pre_hook(enter))
        for module in block.modules():
            hooks.append(module.register_forward_pre_hook(lambda m, _: stack.append(m)))
            hooks.append(module.register_forward_hook(_popping(stack)))
        hooks.append(block.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
