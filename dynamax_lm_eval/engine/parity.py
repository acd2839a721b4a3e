"""Finds out how a loaded model can be run: by comparing each way to run its blocks with ``model.forward``.

Instead of a list of supported families: whatever a family does that one way does not shows as a difference, and the
next is tried; where none is right, the model is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones import SLOW_RUNGS, WholeRowBackbone, make_backbone, rungs
from dynamax_lm_eval.backbones.base import Backbone, IntArray
from dynamax_lm_eval.backbones.compare import differences, is_close
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.draft_check import drafted_logits
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.policy import NEVER, ExitPolicy
from dynamax_lm_eval.models import loading
from dynamax_lm_eval.types import MambaKernels

logger = logging.getLogger(__name__)

_BLOCK_BY_BLOCK = "block by block"
#: Tokens of the two texts of the self-check, where nothing asks for more.
_SHORT = 13
_LENGTH_OF_SECOND = 7
#: How many of the second are fed while the first decodes; the others follow one by one.
_PREFILL_OF_SECOND = 4
#: Settings that limit what a token sees, and how far beyond them the first text goes.
_LIMITS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "index_topk")
_BEYOND = 9
#: Most parameters times tokens of the first text, elsewhere and on a CPU.
_AFFORDABLE = (10**13, 10**11)
#: Most logits of the first text: 1 GiB in float32.
_MOST_LOGITS = 2**28
#: From the exit layer of a token that leaves to that of the next one.
_STRIDE = 5
#: Most characters of an exception that a message quotes.
_LONGEST_REASON = 240


def engine_without_weights(structure: Any, max_length: int, mamba_kernels: MambaKernels = "auto") -> Engine | None:
    """Returns the engine that a model leads to, judged by its structure and cost before weights are read.

    Args:
        structure: the model on the meta device, as ``loading.model_without_weights`` makes it.
        max_length: longest row that will be run.
        mamba_kernels: as for :func:`checked_engine`.

    Returns:
        An engine with which policies can be checked and nothing can be run; None where it cannot be known before the
        model is loaded.

    Raises:
        UserError: whatever its weights, the model cannot be run block by block.
    """
    if structure is None:
        return None
    try:
        return Engine(make_backbone(structure, max_length, mamba_kernels))
    except UserError:
        raise
    except Exception as error:
        logger.debug("%s: not judged before its weights are loaded (%s)", type(structure).__name__, error)
        return None


def checked_engine(
    model: Any,
    policy: ExitPolicy,
    max_length: int,
    classifiers: ExitClassifiers | None = None,
    mamba_kernels: MambaKernels = "auto",
    autocast_dtype: torch.dtype | None = None,
) -> Engine:
    """Returns an engine for a loaded model that was seen to compute what the model computes.

    Of the ways in which blocks may be run (``backbones.rungs``) it takes the fastest that is right.

    Args:
        model: a causal LM of transformers in eval mode.
        policy: the policy that will be used; decides what has to work.
        max_length: longest row that will be run.
        classifiers: the trained exits that the policy uses, if it does.
        mamba_kernels: what runs the scans of a Mamba backbone.
        autocast_dtype: as :class:`Engine` takes it.

    Raises:
        UserError: the model cannot be run block by block, or not under this policy; says why.
    """
    refused: dict[str, UserError] = {}
    expected: Expected | None = None
    for rung, make in rungs(model, max_length, mamba_kernels).items():
        try:
            with _naming_model(type(model).__name__, _BLOCK_BY_BLOCK):
                engine = Engine(make(), classifiers, autocast_dtype)
                with engine.autocast():
                    expected = expected or Expected.of(model, engine.backbone, max_length)
                    check_against_model(engine, model, expected)
            check_policy(engine, policy)
        except (ParityError, KindError) as error:
            logger.debug("%s: not run as %s (%s)", type(model).__name__, rung, error)
            refused[rung] = error
            continue
        logger.debug("%s runs as: %s", type(model).__name__, engine.backbone.rung)
        if rung in SLOW_RUNGS:
            logger.warning("%s runs %s", type(model).__name__, SLOW_RUNGS[rung])
        return engine
    # What to say: why the last way is not right that could be tried at all.
    errors = list(refused.values())
    last = next((error for error in reversed(errors) if isinstance(error, ParityError)), errors[-1])
    raise UserError(str(last)) from last


def check_policy(engine: Engine, policy: ExitPolicy) -> None:
    """Raises UserError where the backbone cannot follow the policy, or makes other states than its blocks do."""
    engine.check_policy(policy)
    if policy.pruned_blocks:
        check_pruning(engine, policy)
    if policy.drafts and not engine.verifies:
        with _naming_model(engine.backbone.name, "with verify=true"), engine.autocast():
            check_drafts(engine)
        engine.verifies = True
    # Learned states go the same way through a block as recomputed ones, so their way is checked with these.
    makes_states = policy.used_exits and not policy.drafts and policy.state_mode in ("recompute", "learned")
    if makes_states and not engine.recomputes_states:
        what = "with state_mode=recompute (skip and copy may work)"
        with _naming_model(engine.backbone.name, what), engine.autocast():
            check_state_recompute(engine)
        engine.recomputes_states = True


@dataclass(frozen=True)
class Expected:
    """Two texts, and what the model's own forward says of them."""

    texts: tuple[list[int], list[int]]
    logits: Tensor  # (N, V) of both, one after the other

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, backbone: Backbone, max_length: int | None = None) -> Expected:
        """Makes texts of up to ``max_length`` tokens and runs them through the model.

        Raises:
            UserError: its logits are not finite, or change when tokens are added.
        """
        name, generator = type(model).__name__, torch.Generator().manual_seed(0)
        known = min(backbone.vocab_size, backbone.num_embeddings)
        for length in dict.fromkeys((_length(model, backbone.device, max_length), _SHORT)):
            texts = [torch.randint(0, known, (n,), generator=generator) for n in (length, _LENGTH_OF_SECOND)]
            whole, second = (_logits_of(model, text, backbone.device) for text in texts)
            if not (whole.isfinite().all() and second.isfinite().all()):
                raise UserError(f"{name} computes logits that are not finite; use another dtype, or check the weights")
            cut = length - _LENGTH_OF_SECOND
            if is_close(_logits_of(model, texts[0][:cut], backbone.device), whole[:cut]):
                return cls((texts[0].tolist(), texts[1].tolist()), torch.cat([whole, second]))
            # Ties in what is looked up (sparse attention) may be broken otherwise in a longer text.
            logger.debug("%s: its logits at the first of %d tokens change with the others", name, length)
        raise UserError(
            f"{name} is not causal: in its own forward, what it says of a token changes when others follow, so nothing "
            "that is generated token by token equals it"
        )


def _logits_of(model: Any, text: Tensor, device: torch.device) -> Tensor:
    """Returns the logits (T, V) of a text by the model's own forward."""
    logits: Tensor = model(text.unsqueeze(0).to(device), use_cache=False).logits[0]
    return logits


def _length(model: Any, device: torch.device, max_length: int | None) -> int:
    """Returns how long the first text is: longer than whatever limits what a token sees, where that is cheap."""
    config = model.config.get_text_config()
    limits = [value for name in _LIMITS if isinstance(value := getattr(config, name, None), int) and value > 0]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    affordable = _AFFORDABLE[device.type == "cpu"] // max(parameters, 1)
    affordable = min(affordable, _MOST_LOGITS // int(getattr(config, "vocab_size", 1)))
    if max_length:
        affordable = min(affordable, max_length)
    longest = max((limit for limit in limits if limit + _BEYOND <= affordable), default=0)
    return max(_SHORT, longest + _BEYOND if longest else 0)


@torch.no_grad()
def check_against_model(engine: Engine, model: Any, expected: Expected | None = None) -> None:
    """Runs two texts in one batch, and again so that one is fed while the other decodes, and both token by token.

    Args:
        engine: what runs them.
        model: whose own forward counts.
        expected: what that gives, where it is known.

    Raises:
        ParityError: the logits differ by more than rounding from the model's.
    """
    backbone, expected = engine.backbone, expected or Expected.of(model, engine.backbone)
    dtype = backbone.embed(torch.tensor([0], device=backbone.device)).dtype
    together = _fed(engine, expected.texts, [_all_at_once(expected.texts)])
    _compare(backbone.name, "two rows in one batch", together, expected.logits, dtype)
    stepped = _fed(engine, expected.texts, _one_after_the_other(expected.texts))
    _compare(backbone.name, "token by token", stepped, expected.logits, dtype)


@torch.no_grad()
def check_state_recompute(engine: Engine) -> None:
    """Checks the states that ``state_mode=recompute`` makes: tokens leave after every number of blocks.

    Compared with blocks that are given the exit states of tokens that left as if they had stayed, and run on whole
    rows without a cache.

    Raises:
        UserError: the logits of any token differ by more than rounding.
    """
    backbone = engine.backbone
    if backbone.rung == WholeRowBackbone.rung or backbone.num_layers < 2:
        return
    reference = Engine(WholeRowBackbone(backbone.model))
    generator = torch.Generator().manual_seed(1)
    known = min(backbone.vocab_size, backbone.num_embeddings)
    texts = [torch.randint(0, known, (n,), generator=generator).tolist() for n in (_SHORT, _LENGTH_OF_SECOND)]
    # About half of the tokens stay, and those that leave do so everywhere.
    leave = [
        [0 if i % 2 == 0 else 1 + (i // 2 * _STRIDE + row) % (backbone.num_layers - 1) for i in range(len(text))]
        for row, text in enumerate(texts)
    ]
    dtype = backbone.embed(torch.tensor([0], device=backbone.device)).dtype
    theirs = _fed(reference, texts, [_all_at_once(texts)], leave)
    for what, feeds in (("at once", [_all_at_once(texts)]), ("token by token", _one_after_the_other(texts))):
        ours = _fed(engine, texts, feeds, leave)
        if not is_close(ours, theirs, dtype):
            largest, mean = differences(ours, theirs)
            raise ParityError(
                f"{backbone.name}: with state_mode=recompute (fed {what}), logits after exits differ from those of its "
                f"own blocks by {largest:.1e} of their largest and {mean:.1e} of their mean value; use state_mode=skip"
            )


@torch.no_grad()
def check_drafts(engine: Engine) -> None:
    """Checks what ``verify=true`` needs: tokens go on after exits, and rows are taken back to before wrong drafts.

    Raises:
        UserError: the logits of any token differ by more than rounding from those of a text that is fed at once.
    """
    backbone = engine.backbone
    known = min(backbone.vocab_size, backbone.num_embeddings)
    text = torch.randint(0, known, (_SHORT,), generator=torch.Generator().manual_seed(2)).tolist()
    theirs, ours = _fed(engine, [text], [_all_at_once([text])]), drafted_logits(engine, text, _PREFILL_OF_SECOND)
    dtype = backbone.embed(torch.tensor([0], device=backbone.device)).dtype
    if not is_close(ours, theirs[_PREFILL_OF_SECOND - 1 :], dtype):
        largest, mean = differences(ours, theirs[_PREFILL_OF_SECOND - 1 :])
        raise UserError(
            f"verify is not possible on {backbone.name}: the logits of tokens that go on after an exit differ from the "
            f"model's by {largest:.1e} of their largest and {mean:.1e} of their mean value; leave it out"
        )


@contextmanager
def _naming_model(name: str, what: str) -> Iterator[None]:
    """Turns whatever goes wrong while a model is tried into one line; the cause stays attached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = loading.described(error)[:_LONGEST_REASON]
        raise KindError(f"{name} is not supported: it cannot be used {what} ({reason})") from error


def check_pruning(engine: Engine, policy: ExitPolicy) -> None:
    """Raises UserError where other blocks need what the pruned ones keep (K and V that they share, say)."""
    text, pruned = list(range(_LENGTH_OF_SECOND)), sorted(policy.pruned_blocks)
    try:
        with engine.autocast():
            _fed(
                engine,
                [text],
                [_all_at_once([text])],
                policy=ExitPolicy(policy.num_layers, pruned_blocks=policy.pruned_blocks),
            )
    except Exception as error:
        raise UserError(
            f"blocks {pruned} cannot be pruned on {engine.backbone.name}: others need what they keep "
            f"({loading.described(error)}); prune others"
        ) from error


#: What is fed in one pass: rows, and from where to where.
_Feed = list[tuple[int, int, int]]


def _all_at_once(texts: Sequence[Sequence[int]]) -> _Feed:
    return [(row, 0, len(text)) for row, text in enumerate(texts)]


def _one_after_the_other(texts: Sequence[Sequence[int]]) -> list[_Feed]:
    """Returns passes in which the second row begins while the first decodes, and then both decode."""
    first, second = (len(text) for text in texts)
    steps = second - _PREFILL_OF_SECOND
    begin = first - steps - 1
    feeds: list[_Feed] = [[(0, 0, begin)], [(0, begin, begin + 1), (1, 0, _PREFILL_OF_SECOND)]]
    for i in range(steps):
        position = _PREFILL_OF_SECOND + i
        feeds.append([(0, begin + 1 + i, begin + 2 + i), (1, position, position + 1)])
    return feeds


def _fed(
    engine: Engine,
    texts: Sequence[list[int]],
    feeds: Sequence[_Feed],
    leave: Sequence[Sequence[int]] | None = None,
    policy: ExitPolicy | None = None,
) -> Tensor:
    """Returns the logits (N, V) of rows, one after the other.

    Args:
        engine: runs them.
        texts: the rows.
        feeds: the passes.
        leave: for each token after how many blocks it leaves; 0: it stays.
        policy: under which tokens stay; None: every block runs.
    """
    depth, stride = engine.backbone.num_layers, max(map(len, texts))
    states = engine.new_states(len(texts) * stride, row_stride=stride)
    slots = [states.allocate_row(len(text)) for text in texts]
    policy = policy or ExitPolicy(depth)
    if leave is not None:
        layers = tuple(range(1, depth))
        policy = ExitPolicy(depth, layers, (0.0,) * len(layers), confidence="state", exit_scope="all")
    rows: list[list[Tensor]] = [[] for _ in texts]
    for feed in feeds:
        inputs = []
        for row, begin, end in feed:
            slot = slots[row]
            assert slot is not None
            inputs.append(RowInput(texts[row][begin:end], begin, slot, prompt_length=1, max_steps=1, policy=policy))
        batch = FlatBatch.build(inputs)
        if leave is not None:
            after = np.concatenate([leave[row][begin:end] for row, begin, end in feed])
            table = {layer: np.where(after == layer, 0.0, NEVER).astype(np.float32) for layer in policy.exit_layers}
            batch = replace(batch, thresholds=table)
        collector = _AllLogits(len(batch))
        engine.forward(batch, states, collector)
        found = torch.stack([logits for logits in collector.rows if logits is not None])
        parts = found.split([end - begin for _, begin, end in feed])
        for (row, _, _), logits in zip(feed, parts, strict=True):
            rows[row].append(logits)
    for slot in slots:
        assert slot is not None
        states.free_row(slot)
    return torch.cat([logits for parts in rows for logits in parts])


def _compare(name: str, what: str, ours: Tensor, theirs: Tensor, computed_in: torch.dtype) -> None:
    """Raises ParityError where logits of ours and of the model differ by more than rounding."""
    if not is_close(ours, theirs, computed_in):
        largest, mean = differences(ours, theirs)
        raise ParityError(
            f"{name} is not supported: run block by block ({what}), its logits differ from model.forward by "
            f"{largest:.1e} of their largest and {mean:.1e} of their mean value, more than rounding explains"
        )


class ParityError(UserError):
    """A model, run block by block in one way, does not compute what it computes."""


class KindError(UserError):
    """A model cannot be run in one way."""


class _AllLogits:
    """A collector of the logits of every token."""

    def __init__(self, num_tokens: int) -> None:
        self.rows: list[Tensor | None] = [None] * num_tokens

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        for token, row in zip(tokens.tolist(), reduced, strict=True):
            self.rows[token] = row
