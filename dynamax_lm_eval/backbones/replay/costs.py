"""What blocks cost, measured: torch's FLOP counter sees one token after another go through them.

Attention is the eager one, whose products all are seen, and experts run one by one, so that those count that a token
is sent to. A block costs a + b * context for a token that sees ``context`` positions, itself included; windows are the
masks' business. A recurrence is element-wise, which no counter sees: convolution windows and states are counted by
size, as of Mamba blocks (``compute.cost``), so that the count is that of the recurrent form whatever runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.replay.caches import RowCache
from dynamax_lm_eval.backbones.replay.mixers import MambaMixer, RowMixer
from dynamax_lm_eval.backbones.replay.model import ReplayModel
from dynamax_lm_eval.backbones.replay.probing import feed
from dynamax_lm_eval.compute.cost import PAPER_ATTENTION_RECOMPUTE, PAPER_MAMBA_RECOMPUTE, BackboneCost, BlockCost

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.replay.backbone import ReplayBackbone

#: Positions at which a token is fed; two tell a line, and the third whether it is one.
_POSITIONS = (2, 3, 4)


class Products(TorchDispatchMode):
    """Counts the MACs of matrix products, by torch's own formulas.

    As ``FlopCounterMode`` does, but without its tracker of modules, which wants graphs of gradients.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops = 0

    @property
    def macs(self) -> int:
        """What has been counted so far."""
        return self._flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # products that torch puts together from others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=output)
        return output


@torch.inference_mode()
def measure(backbone: ReplayBackbone, lm_head: int) -> BackboneCost:
    """Returns the cost of a backbone whose blocks are known, and of one read of its LM head."""
    recurrent = [[mixer.module for mixer in block.mixers if mixer.is_recurrent] for block in backbone.blocks]
    lines = _lines(backbone.replay, recurrent)
    blocks = tuple(_cost(backbone, number, *line) for number, line in enumerate(lines, start=1))
    return BackboneCost(blocks, lm_head, source="measured")


@torch.inference_mode()
def measure_whole_rows(replay: ReplayModel, lm_head: int) -> BackboneCost:
    """Returns the cost of a model that runs without a cache: that of its blocks on one more token.

    The states of a token that left come from running the blocks on it, so they cost as much as if it had stayed.
    """
    whole = {n: _counted(replay, [[] for _ in replay.blocks], range(n), None) for n in _POSITIONS}
    blocks = []
    for number in range(len(replay.blocks)):
        low, high = (whole[n][number] / n for n in _POSITIONS[:2])  # a + b * n each
        per_position = high - low
        per_token = low - _POSITIONS[0] * per_position
        blocks.append(BlockCost(round(per_token), round(per_position), None, round(per_token)))
    return BackboneCost(tuple(blocks), lm_head, source="measured")


def _lines(replay: ReplayModel, without: Sequence[Sequence[nn.Module]]) -> list[tuple[int, int]]:
    """Returns the MACs of every block per token and per position, without those of some of its modules."""
    cache = RowCache(replay.model.config)
    feed(replay, range(_POSITIONS[0]), cache)
    steps = [_counted(replay, without, [position], cache) for position in _POSITIONS]
    lines = []
    for first, second, third in zip(*steps, strict=True):
        # Where it is no line (states that are compressed now and then), the mean slope.
        per_position = second - first if second - first == third - second else (third - first) // 2
        lines.append((first - per_position * (_POSITIONS[0] + 1), per_position))
    return lines


def _counted(
    replay: ReplayModel, without: Sequence[Sequence[nn.Module]], tokens: Sequence[int], cache: RowCache | None
) -> list[int]:
    """Returns the MACs of every block while tokens are fed, without those of some of its modules."""
    totals = [0] * len(replay.blocks)
    counter = Products()
    with replay.attention("eager", experts="eager"), _accumulating(replay, without, totals, counter), counter:
        feed(replay, tokens, cache)
    return totals


@contextmanager
def _accumulating(
    replay: ReplayModel, without: Sequence[Sequence[nn.Module]], totals: list[int], counter: Products
) -> Iterator[None]:
    """Adds to ``totals`` what the counter sees between the beginnings and ends of blocks."""
    hooks = []
    for number, block in enumerate(replay.blocks):
        for module, sign in [(block, 1), *((module, -1) for module in without[number])]:

            def begin(*_: Any, number: int = number, sign: int = sign) -> None:
                totals[number] -= sign * counter.macs

            def end(*_: Any, number: int = number, sign: int = sign) -> None:
                totals[number] += sign * counter.macs

            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cost(backbone: ReplayBackbone, number: int, per_token: int, per_position: int) -> BlockCost:
    block = backbone.blocks[number - 1]
    weights, recurrence, recompute = per_token, 0, _recompute(backbone, number)
    for mixer in block.mixers:
        if isinstance(mixer, MambaMixer):
            own = mixer.mixer.cost(backbone.name)
            weights, recurrence = weights + own.weights, recurrence + own.recurrence
            recompute += own.state_recompute
        elif isinstance(mixer, RowMixer) and mixer.is_recurrent:
            own_weights, own_recurrence = mixer_macs(mixer.module, mixer.state_size)
            weights, recurrence = weights + own_weights, recurrence + own_recurrence
            # Its code cannot be stopped in the middle.
            recompute += own_weights + own_recurrence
    paper = PAPER_MAMBA_RECOMPUTE if block.mixers and not block.kv_layers else PAPER_ATTENTION_RECOMPUTE
    return BlockCost(
        weights=weights,
        per_position=per_position,
        window=block.visibility if isinstance(block.visibility, int) else None,
        state_recompute=recompute,
        paper_recompute=paper if block.num_writes else 0.0,
        recurrence=recurrence,
    )


def _recompute(backbone: ReplayBackbone, number: int) -> int:
    """Returns the MACs of giving a block the states of one token that left, mixers with a recurrence left out."""
    block = backbone.blocks[number - 1]
    if not block.num_writes:
        return 0
    silenced = [mixer for mixer in block.mixers if mixer.is_recurrent]
    counter, before = Products(), [0]
    # What the model does to make the block's arguments is none of it, and the block does not come to its end.
    hook = block.module.register_forward_pre_hook(lambda *_: before.__setitem__(0, counter.macs))
    try:
        with _silent(silenced), counter:
            backbone.write_only(number, (3,))
    finally:
        hook.remove()
    whole = counter.macs - before[0]
    for mixer in block.mixers:
        if not mixer.is_recurrent:
            whole += _module_macs(backbone, mixer.module)
    return int(whole)


@contextmanager
def _silent(mixers: Sequence[Any]) -> Iterator[None]:
    """Lets mixers take nothing of the tokens that they are called with."""
    for mixer in mixers:
        mixer.collected = lambda _: None
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.collected


def _module_macs(backbone: ReplayBackbone, module: nn.Module) -> int:
    """Returns the MACs of a module on the first token of a row."""
    total = [0]
    counter = Products()
    hooks = [
        module.register_forward_pre_hook(lambda *_: total.__setitem__(0, total[0] - counter.macs)),
        module.register_forward_hook(lambda *_: total.__setitem__(0, total[0] + counter.macs)),
    ]
    try:
        with backbone.replay.attention("eager", experts="eager"), counter:
            feed(backbone.replay, range(1), RowCache(backbone.model.config))
    finally:
        for hook in hooks:
            hook.remove()
    return total[0]


def mixer_macs(module: nn.Module, state_size: int) -> tuple[int, int]:
    """Returns the MACs per token of the linear layers of a module with a recurrence, and of the rest of it.

    The rest is its convolutions (channels * kernel) and 3 for each element of its state (``state_size``): decay, input
    and read-out.
    """
    weights, rest = 0, 3 * state_size
    leaf: Any
    for leaf in module.modules():
        if families.is_linear(leaf):
            weights += int(leaf.in_features) * int(leaf.out_features)
        elif isinstance(leaf, nn.Conv1d):
            rest += leaf.weight.numel()
    return weights, rest
