"""Checks the layer loop against ``model.forward`` when a model is loaded.

Instead of a list of supported families: whatever a family does that the loop does not (soft-capping,
scaled embeddings, another mask) shows as a difference, and the model is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.backbones.compare import differences, is_close
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.models import loading
from dynamax_lm_eval.types import MambaKernels

_BLOCK_BY_BLOCK = "block by block"
_LENGTHS = (11, 4)
#: How many tokens of the first row are fed at once; the others follow one by one.
_PREFILL = 7
#: Most characters of an exception that a message quotes.
_LONGEST_REASON = 240


def engine_without_weights(
    config: Any, options: Mapping[str, Any], max_length: int, mamba_kernels: MambaKernels = "auto"
) -> Engine | None:
    """Returns the engine that a configuration leads to, judged by its structure and cost before weights are read.

    Args:
        config: the backbone's configuration.
        options: the arguments that the model will be loaded with (trust_remote_code, revision).
        max_length: longest row that will be run.
        mamba_kernels: as for :func:`checked_engine`.

    Returns:
        An engine with which policies can be checked and nothing can be run; None where it cannot be known before the
        model is loaded.

    Raises:
        UserError: whatever its weights, the model cannot be run block by block.
    """
    model = loading.model_without_weights(config, options)
    if model is None:
        return None
    with _naming_model(type(model).__name__, _BLOCK_BY_BLOCK):
        return Engine(make_backbone(model, max_length, mamba_kernels))


def checked_engine(
    model: Any,
    policy: ExitPolicy,
    max_length: int,
    classifiers: ExitClassifiers | None = None,
    mamba_kernels: MambaKernels = "auto",
    autocast_dtype: torch.dtype | None = None,
) -> Engine:
    """Returns an engine for a loaded model that was seen to compute what the model computes.

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
    with _naming_model(type(model).__name__, _BLOCK_BY_BLOCK):
        engine = Engine(make_backbone(model, max_length, mamba_kernels), classifiers, autocast_dtype)
        engine.check_policy(policy)
        with engine.autocast():
            check_against_model(engine, model)
    check_policy(engine, policy)
    return engine


def check_policy(engine: Engine, policy: ExitPolicy) -> None:
    """Raises UserError where the backbone cannot follow the policy, or makes other states than its blocks do."""
    engine.check_policy(policy)
    if policy.active_exits and policy.state_mode == "recompute" and not engine.recomputes_states:
        what = "with state_mode=recompute (skip and copy may work)"
        with _naming_model(engine.backbone.name, what), engine.autocast():
            check_state_recompute(engine)
        engine.recomputes_states = True


@torch.no_grad()
def check_against_model(engine: Engine, model: Any) -> None:
    """Runs a few tokens both ways: two rows together, and one row partly token by token.

    Raises:
        UserError: the logits differ by more than rounding, or are not finite.
    """
    backbone = engine.backbone
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, backbone.vocab_size, (n,), generator=generator) for n in _LENGTHS]
    reference: list[Tensor] = []
    for text in texts:
        reference.append(model(text.unsqueeze(0).to(backbone.device), use_cache=False).logits[0])
    if not all(torch.isfinite(logits).all() for logits in reference):
        raise UserError(f"{name} computes logits that are not finite; use another dtype, or check the weights")

    dtype = backbone.embed(texts[0].to(backbone.device)).dtype
    states = engine.new_states(2 * sum(_LENGTHS))
    together = _logits(engine, states, [(text.tolist(), 0, None) for text in texts])
    _compare(name, "two rows in one batch", together, torch.cat(reference), dtype)

    first = texts[0].tolist()
    slot = states.allocate_row(len(first))
    assert slot is not None
    stepped = [_logits(engine, states, [(first[:_PREFILL], 0, slot)])]
    stepped += [_logits(engine, states, [([first[i]], i, slot)]) for i in range(_PREFILL, len(first))]
    _compare(name, "token by token", torch.cat(stepped), reference[0], dtype)
    backbone.observe(texts[0].to(backbone.device))


def check_state_recompute(engine: Engine) -> None:
    """Checks the states that ``state_mode=recompute`` makes; raises UserError where they differ."""
    ids = torch.arange(_LENGTHS[0]) % engine.backbone.vocab_size
    engine.backbone.verify_recompute(ids.to(engine.backbone.device))


@contextmanager
def _naming_model(name: str, what: str) -> Iterator[None]:
    """Turns whatever goes wrong while a model is tried into one line; the cause stays attached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = loading.described(error)[:_LONGEST_REASON]
        raise UserError(f"{name} is not supported: it cannot be used {what} ({reason})") from error


def _logits(engine: Engine, states: Any, rows: list[tuple[list[int], int, int | None]]) -> Tensor:
    """Returns the logits (N, V) of rows given as ids, first position and slot; None: a new row."""
    policy = ExitPolicy(engine.backbone.num_layers)
    inputs = []
    for ids, first, slot in rows:
        row_slot = states.allocate_row(len(ids)) if slot is None else slot
        inputs.append(RowInput(ids, first, row_slot, prompt_length=1, max_steps=1, policy=policy))
    batch = FlatBatch.build(inputs)
    collector = _AllLogits(len(batch))
    engine.forward(batch, states, collector)
    return torch.stack([row for row in collector.rows if row is not None])


def _compare(name: str, what: str, ours: Tensor, theirs: Tensor, computed_in: torch.dtype) -> None:
    """Raises UserError where logits of ours and of the model differ by more than rounding."""
    if not is_close(ours, theirs, computed_in):
        largest, mean = differences(ours, theirs)
        raise UserError(
            f"{name} is not supported: run block by block ({what}), its logits differ from model.forward by "
            f"{largest:.1e} of their largest and {mean:.1e} of their mean value, more than rounding explains"
        )


class _AllLogits:
    """A collector of the logits of every token."""

    def __init__(self, num_tokens: int) -> None:
        self.rows: list[Tensor | None] = [None] * num_tokens

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        for token, row in zip(tokens.tolist(), reduced, strict=True):
            self.rows[token] = row
