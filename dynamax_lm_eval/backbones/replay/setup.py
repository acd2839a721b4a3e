"""Finds out, at load, all that has to be known of the blocks of a model to run them on a flat batch.

Everything is found by running a few tokens: see ``probing``. Knows modules and shapes; knows no families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dynamax_lm_eval.backbones import families
from dynamax_lm_eval.backbones.compare import is_close
from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.mamba import kernels
from dynamax_lm_eval.backbones.mamba.mixers import make_mixer
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.replay.arguments import Call, CallAxes
from dynamax_lm_eval.backbones.replay.block import ReplayBlock, zeros
from dynamax_lm_eval.backbones.replay.caches import RowCache
from dynamax_lm_eval.backbones.replay.mixers import FlatMixer, MambaMixer, RowMixer
from dynamax_lm_eval.backbones.replay.model import HiddenShape, ReplayModel, arity_of, parts_of
from dynamax_lm_eval.backbones.replay.probing import LENGTHS, BlockTrace, ModelTrace, feed, watch
from dynamax_lm_eval.backbones.replay.row_states import StackedTable
from dynamax_lm_eval.backbones.transformer import attention
from dynamax_lm_eval.backbones.transformer.masks import MaskRule, classified
from dynamax_lm_eval.models.placement import Place
from dynamax_lm_eval.types import MambaKernels

if TYPE_CHECKING:
    from dynamax_lm_eval.backbones.replay.backbone import ReplayBackbone

#: Tokens of a row, of which states are written on trial.
_TOKENS = (3, 4, 5)
#: Names that a final norm may have.
_FINAL_NORMS = (*families.FINAL_NORMS, "norm_f", "layer_norm", "embedding_norm")
#: Positions up to which masks are looked at where nothing says how long rows will be.
_HORIZON = 4096


@dataclass(frozen=True)
class Description:
    """What was found."""

    blocks: list[ReplayBlock]
    hidden_shape: HiddenShape
    bytes: tuple[int, int]  # per token, and per row
    mixer_arities: dict[FlatMixer, int | None]


@torch.no_grad()
def describe(
    backbone: ReplayBackbone, max_length: int | None, mamba_kernels: MambaKernels, attention_by_row: bool
) -> Description:
    """Returns what is to be known of a backbone's blocks.

    Args:
        backbone: of which model, blocks and device are known.
        max_length: longest row that will be run.
        mamba_kernels: as for :class:`ReplayBackbone`.
        attention_by_row: attention keeps its K and V in caches of transformers.
    """
    replay = backbone.replay
    families.check_rope(backbone.config, max_length)
    scans = kernels.find(mamba_kernels, replay.device, backbone.model.dtype)
    trace = watch(replay)
    calls = _ModuleCalls(replay, trace, attention_by_row)
    with replay.attention(attention.NAME):
        captured = [
            replay.capture(
                torch.arange(n, device=replay.device) + 3, torch.arange(n, device=replay.device), backbone.cache
            )
            for n in LENGTHS
        ]
    axes = [shorter.axes(longer, LENGTHS) for shorter, longer in zip(*captured, strict=True)]
    first = captured[0][0]
    shape = HiddenShape(tuple(first.hidden.shape), first.hidden_axis(axes[0]))
    horizon = max_length or getattr(backbone.config, "max_position_embeddings", None) or _HORIZON
    rules: dict[int, Any] = {}
    blocks = []
    for number, seen in enumerate(trace.blocks):
        mixers = calls.mixers(seen, scans)
        rule = _mask_rule(captured[0][number])
        if rule is not None and id(rule) not in rules:
            rules[id(rule)] = classified(rule, int(horizon))
        blocks.append(
            ReplayBlock(
                module=replay.blocks[number],
                kv_layers=seen.kv_layers([mixer.module for mixer in mixers]),
                mixers=mixers,
                axes=axes[number],
                visibility=None if rule is None else rules[id(rule)],
            )
        )
    if any(isinstance(mixer, MambaMixer) for block in blocks for mixer in block.mixers):
        backbone.scans_by = kernels.packages(scans)
    arities = {mixer: calls.arities[mixer.module] for block in blocks for mixer in block.mixers}
    return Description(
        blocks=blocks,
        hidden_shape=shape,
        bytes=_row_bytes(trace, replay),
        mixer_arities=arities,
    )


class _ModuleCalls:
    """The calls of modules that keep states, seen in runs of the model as transformers runs it."""

    def __init__(self, replay: ReplayModel, trace: ModelTrace, attention_by_row: bool) -> None:
        self._replay = replay
        self._by_row = attention_by_row
        modules = {m for block in trace.blocks for m in self._layers_of(block)}
        self.arities: dict[nn.Module, int | None] = {}
        seen: list[dict[nn.Module, Call]] = []
        for length in LENGTHS if modules else ():
            found: dict[nn.Module, Call] = {}
            hooks = [module.register_forward_pre_hook(_noting(found), with_kwargs=True) for module in modules]
            hooks += [module.register_forward_hook(self._note_arity) for module in modules]
            try:
                feed(replay, range(length), RowCache(replay.model.config))
            finally:
                for hook in hooks:
                    hook.remove()
            seen.append(found)
        self._calls = seen

    def _layers_of(self, block: BlockTrace) -> dict[nn.Module, tuple[int, ...]]:
        """Returns the modules of a block that are not run flat, and their layers of the cache."""
        found = dict(block.recurrent_modules)
        if self._by_row:
            for module, layers in block.growing_modules.items():
                found[module] = tuple(sorted({*found.get(module, ()), *layers}))
        inner = {part for module in found for part in module.modules() if part is not module}
        for module in list(found):  # what an outer module calls is the outer module's business
            outer = [other for other in found if other is not module and module in set(other.modules())]
            if module in inner and outer:
                found[outer[0]] = tuple(sorted({*found[outer[0]], *found.pop(module)}))
        return found

    def mixers(self, block: BlockTrace, scans: kernels.ScanKernels | None) -> tuple[FlatMixer, ...]:
        """Returns what runs in place of the modules of a block that keep states."""
        mixers: list[FlatMixer] = []
        for module, layers in self._layers_of(block).items():
            if module in self._replay.blocks:
                raise TypeError("a block keeps states that no module of its own keeps")
            shorter, longer = (calls[module] for calls in self._calls)
            axes = shorter.axes(longer, LENGTHS, masks=True)
            grows = self._by_row and module in block.growing_modules
            ours = None if grows else self._ragged(module, shorter, scans)
            if ours is not None:
                mixers.append(ours)
                continue
            mixer = RowMixer(module, self._replay, axes, layers)
            mixer.is_recurrent = not grows
            mixer.continues = not grows and self._continues(mixer, longer, axes)
            mixers.append(mixer)
        return tuple(mixers)

    def _ragged(self, module: nn.Module, call: Call, scans: kernels.ScanKernels | None) -> MambaMixer | None:
        """Returns the module as a Mamba mixer of ours, where that computes the same."""
        try:
            ours, place = make_mixer(module, "", scans), Place(module)
            theirs = parts_of(module(*call.args, **_without_cache(self._replay, call)))[0]
            hidden = call.hidden[0].to(place.device)
            with place.weights():
                gate, update = ours.project(hidden)
                read, _ = ours.advance(update, RaggedRows([len(hidden)], place.device), None)
                output = ours.output(read, gate)
        except Exception:
            return None
        return MambaMixer(ours, place.device) if is_close(output.unsqueeze(0), theirs) else None

    def _continues(self, mixer: RowMixer, call: Call, axes: CallAxes) -> bool:
        """Returns whether a module gives the same for the tokens of a row in two calls as in one."""
        with Place(mixer.module).weights():
            return self._gives_the_same(mixer, call, axes)

    def _gives_the_same(self, mixer: RowMixer, call: Call, axes: CallAxes) -> bool:
        whole = call.hidden.shape[1]
        table = mixer.new_table()
        line = np.zeros(1, dtype=np.int64)
        outputs = []
        try:
            for first, last in ((0, whole - 3), (whole - 3, whole)):
                part = axes.select(call, torch.arange(first, last, device=call.hidden.device))
                with table.opened(line, first) as cache:
                    outputs.append(mixer.called(part, cache))
            fresh = mixer.new_table()
            with fresh.opened(line, 0) as cache:
                whole_output = mixer.called(call, cache)
            if isinstance(fresh, StackedTable):
                mixer.state_size = fresh.numel()
            return is_close(torch.cat(outputs, dim=1), whole_output)
        except Exception:
            return False

    def _note_arity(self, module: nn.Module, _: Any, output: Any) -> None:
        self.arities[module] = arity_of(output)


def _noting(found: dict[nn.Module, Call]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found[module] = Call(args, kwargs)

    return hook


def _without_cache(replay: ReplayModel, call: Call) -> dict[str, Any]:
    return {name: None if replay.is_cache(value) else value for name, value in call.kwargs.items()}


def _mask_rule(call: Call) -> MaskRule | None:
    rules = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, MaskRule)]
    return rules[0] if rules else None


def _row_bytes(trace: ModelTrace, replay: ReplayModel) -> tuple[int, int]:
    """Returns the bytes that all blocks keep of a token, and of a row however long it is."""
    size = torch.finfo(replay.model.dtype).bits // 8
    per_token = sum(use.values for block in trace.blocks for use in block.uses if use.name == "update") * size
    per_row = 0
    for layer in trace.cache.layers:
        for kind in ("conv_states", "recurrent_states"):
            states = getattr(layer, kind, None) or {}
            per_row += sum(state.numel() * 4 for state in states.values() if state is not None)
    return per_token, per_row


@torch.no_grad()
def direct_readout(backbone: ReplayBackbone) -> Any:
    """Returns the read-out by final norm, head and soft-cap, where that is what the model computes; else None."""
    from dynamax_lm_eval.backbones.replay.backbone import FinalReadout

    if backbone.device.type == "meta" or not backbone.hidden_shape.is_plain:
        return None
    softcap = getattr(backbone.config, "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(LENGTHS) + 1, backbone.hidden_size, generator=generator)
    hidden = hidden.to(backbone.device, backbone.embed(torch.zeros(1, dtype=torch.int64, device=backbone.device)).dtype)
    theirs = backbone.replay.readout(hidden.unsqueeze(0), len(hidden))
    for name, module in backbone.model.named_modules():
        if name.rpartition(".")[2] in _FINAL_NORMS and not any(block in name for block in ("layers.", "h.")):
            try:
                readout = FinalReadout(module, backbone.by_head, softcap)
                ours = readout(hidden).to(theirs.device)
            except Exception:
                continue
            # Bit for bit: in half precision a scale or a soft-cap could pass for rounding.
            if ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs):
                return readout
    return None


def takes_nothing_from_other_blocks(backbone: ReplayBackbone) -> bool:
    """Returns whether blocks need nothing that other blocks make in the same pass, but hidden states.

    Each writes K and V of its own, and is called with nothing that another one could have written into.
    """
    ids = torch.zeros(2, dtype=torch.int64, device=backbone.device)
    with backbone.running():
        calls = backbone.replay.capture(ids, torch.arange(2, device=backbone.device), backbone.cache)
    given = [value for call in calls for value in (*call.args, *call.kwargs.values())]
    written = [layer for block in backbone.blocks for layer in block.kv_layers]
    return (
        all(block.kv_layers or block.mixers for block in backbone.blocks)
        and len(set(written)) == len(written)
        and not any(isinstance(value, dict | list | set) for value in given)
    )


def why_blocks_differ(backbone: ReplayBackbone, first: int) -> str | None:
    """Returns in what the K and V of blocks ``first``.. differ; None: they mean the same in all of them."""
    numbers = range(first, backbone.num_layers + 1)
    if len({len(backbone.blocks[number - 1].kv_layers) for number in numbers}) > 1:
        return "what they keep"
    # Twice the same token: K that differ depend on the position.
    written = [backbone.write_only(number, (3, 3)) for number in numbers]
    if len({tuple(value.shape[1:] for value in states.values) for states in written}) > 1:
        return "K/V shape"
    is_meta = backbone.device.type == "meta"
    turned = {is_meta or any(not torch.equal(*value[:2]) for value in states.values) for states in written}
    if len(turned) > 1:
        return "rotary embedding"
    with backbone.running():
        ids = torch.zeros(len(_TOKENS), dtype=torch.int64, device=backbone.device)
        calls = backbone.replay.capture(ids, torch.arange(len(_TOKENS), device=backbone.device), backbone.cache)
    called_with = set()
    for number in numbers:
        call = calls[number - 1]
        found = backbone.blocks[number - 1].axes.tensors(call)
        called_with.add(tuple(id(tensor) for tensor in found if tensor is not call.hidden))
    return "rotary embedding or other inputs of their own" if len(called_with) > 1 else None


@torch.no_grad()
def find_stops(backbone: ReplayBackbone) -> None:
    """Finds what of each block has to run before its states are written: whether attention, and which modules not."""
    known: dict[Any, _Stop] = {}
    for number, block in enumerate(backbone.blocks, start=1):
        if not block.num_writes:
            continue
        names = {module: name for name, module in block.module.named_modules()}
        key = (type(block.module), block.kv_layers and True, len(block.mixers), tuple(names.values()))
        if key not in known:
            known[key] = _find_stop(backbone, number, names)
        found = known[key]
        block.is_sequential = found.is_sequential
        unneeded = [block.module.get_submodule(name) for name in found.unneeded]
        block.unneeded = [(module, _width(module)) for module in unneeded]
        block.projections = tuple(block.module.get_submodule(name) for name in found.projections)


class _Stop(NamedTuple):
    """What runs of a block until its states are written."""

    is_sequential: bool  # states depend on one another
    unneeded: Sequence[str] = ()  # linear layers on which none depends
    projections: Sequence[str] = ()  # linear layers of one and the same input, on which all depend


def _find_stop(backbone: ReplayBackbone, number: int, names: Mapping[nn.Module, str]) -> _Stop:
    """Returns what runs of a block until its states are written."""
    block = backbone.blocks[number - 1]
    called: dict[nn.Module, Tensor] = {}
    layers = [module for module in names if _width(module)]
    hooks = [module.register_forward_pre_hook(lambda m, args: called.setdefault(m, args[0])) for module in layers]
    try:
        written = backbone.write_only(number, _TOKENS)
    finally:
        for hook in hooks:
            hook.remove()
    grows = not all(mixer.is_recurrent for mixer in block.mixers)
    if written.attended or (block.num_writes > 1 and grows):
        return _Stop(is_sequential=True)
    if (
        block.mixers
        and block.num_writes > 1
        and not written.equals(backbone.write_only(number, _TOKENS, placeholder=1.0))
    ):
        return _Stop(is_sequential=True)
    unneeded = []
    for module in called:
        block.unneeded = [(module, _width(module))]
        if written.equals(backbone.write_only(number, _TOKENS)):
            unneeded.append(names[module])
    block.unneeded = []
    return _Stop(False, unneeded, _projections(backbone, number, called, names, unneeded))


def _projections(
    backbone: ReplayBackbone,
    number: int,
    called: Mapping[nn.Module, Tensor],
    names: Mapping[nn.Module, str],
    unneeded: Sequence[str],
) -> Sequence[str]:
    """Returns the linear layers that all states of a block follow from, if they have the same input; else none.

    ``called``: the layers that run before the last write, with their inputs, in order.
    """
    block = backbone.blocks[number - 1]
    needed = [module for module in called if names[module] not in unneeded]
    if not needed or block.mixers:
        return ()
    first = called[needed[0]]
    same = [module for module in needed if called[module] is first]
    # With nothing but their outputs the states must not depend on what the block is given.
    with replaced_forwards([(module, zeros(_width(module))) for module in same]):
        states = [backbone.write_only(number, tokens) for tokens in (_TOKENS, tuple(reversed(_TOKENS)))]
    return [names[module] for module in same] if states[0].equals(states[1]) else ()


def _width(module: nn.Module) -> int:
    """Returns how wide the output of a linear layer is; 0 for other modules."""
    return int(getattr(module, "out_features", 0)) if families.is_linear(module) else 0
