"""Read-outs in float32 of models in half precision: labels, parts, gradients, and weights that cannot be read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, tiny_model
from helpers_engine import EXITS, exits_config, varied_classifiers

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.exits.adapters import Adapter
from dynamax_lm_eval.frozen import read_out as module
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.frozen.read_out import Float32ReadOut

ROWS = [random_ids(200, i) for i in range(4)]
#: A fused Transformer, a replayed one with a soft-cap, and Mamba.
FAMILIES = ["llama", "gemma3", "mamba2"]


def in_bfloat16(family: str) -> tuple[Any, FrozenPass]:
    model = copy.deepcopy(tiny_model(family)).to(torch.bfloat16).requires_grad_(False)
    return model, FrozenPass(make_backbone(model, max_length=256), EXITS, final_block=False, top_k=1)


def parts_in_float32(model: Any) -> tuple[Any, Any]:
    """Returns norm and head of a copy of a model in float32."""
    wide = copy.deepcopy(model).float()
    holder = next(m for m in wide.children() if hasattr(m, "layers"))
    return getattr(holder, "norm_f", None) or holder.norm, wide.lm_head


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_labels_in_half_precision_are_those_of_float32_read_outs(family: str) -> None:
    model, frozen = in_bfloat16(family)
    batch = frozen.run(ROWS)
    labels = frozen.label(batch, torch.arange(800))
    norm, head = parts_in_float32(model)
    full = head(norm(batch.last.float())).argmax(-1)
    early = torch.stack([head(norm(batch.reads[layer].float())).argmax(-1) for layer in EXITS])
    assert torch.equal(labels.agrees, early == full)
    assert torch.equal(labels.within_k, early == full)
    narrow = [frozen.backbone.readout(states).argmax(-1) for states in (batch.last, *map(batch.reads.get, EXITS))]
    rounded = torch.stack([found == narrow[0] for found in narrow[1:]])
    assert (rounded != labels.agrees).any(), "in bfloat16 some labels are others"


@torch.no_grad()
def test_in_float32_nothing_changes() -> None:
    frozen = FrozenPass(make_backbone(tiny_model("llama"), max_length=256), EXITS, final_block=False, top_k=1)
    hidden = torch.randn(30, 32)
    assert torch.equal(frozen.read_out(hidden), frozen.backbone.readout(hidden))


@torch.no_grad()
def test_a_soft_cap_is_applied() -> None:
    config = copy.deepcopy(tiny_model("gemma3").config)
    config.final_logit_softcapping = 0.5
    torch.manual_seed(0)
    model = type(tiny_model("gemma3"))(config).eval().to(torch.bfloat16)
    backbone = make_backbone(model, max_length=256)
    hidden = 3 * torch.randn(20, 32, dtype=torch.bfloat16)
    norm, head = parts_in_float32(model)
    expected = 0.5 * torch.tanh(head(norm(hidden.float())) / 0.5)
    torch.testing.assert_close(Float32ReadOut(backbone)(hidden), expected)


@pytest.mark.parametrize(("kept", "at_once"), [(2**20, 1), (0, 1), (0, 32 * 10)])
def test_parts_of_the_head_give_the_same_logits_and_gradients(
    kept: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frozen = in_bfloat16("llama")
    adapter = Adapter(32, None)
    torch.manual_seed(1)
    torch.nn.init.normal_(adapter.up.weight, std=0.1)
    hidden = torch.randn(12, 32).bfloat16()
    norm, head = parts_in_float32(model)
    expected = head(norm(adapter(hidden.float())))
    target = torch.randint(0, expected.shape[1], (12,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(expected, target), [adapter.up.weight])
    monkeypatch.setattr(module, "KEPT", kept)
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", at_once)
    logits = frozen.read_out(hidden, adapter)
    torch.testing.assert_close(logits, expected)
    (own,) = torch.autograd.grad(F.cross_entropy(logits, target), [adapter.up.weight])
    torch.testing.assert_close(own, gradient)
    assert own.abs().sum() > 0


@torch.no_grad()
def test_a_bias_of_the_head_is_added() -> None:
    model, _ = in_bfloat16("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features).bfloat16(), requires_grad=False)
    backbone = make_backbone(model, max_length=256)
    hidden = torch.randn(5, 32).bfloat16()
    norm, head = parts_in_float32(model)
    torch.testing.assert_close(Float32ReadOut(backbone)(hidden), head(norm(hidden.float())))


@pytest.mark.parametrize("changed", ["head", "norm", "kind"])
@torch.no_grad()
def test_what_cannot_be_read_by_its_weights_is_called(changed: str) -> None:
    model, _ = in_bfloat16("llama")
    if changed == "kind":
        model.lm_head = torch.nn.Sequential(model.lm_head)
    else:
        hooked = model.lm_head if changed == "head" else model.model.norm
        hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    backbone = make_backbone(model, max_length=256)
    hidden = torch.randn(30, 32).bfloat16()
    found = Float32ReadOut(backbone)(hidden)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, backbone.readout(hidden))


def test_adapters_learn_by_float32_read_outs() -> None:
    _, frozen = in_bfloat16("llama")
    exits = varied_classifiers(exits_config(adapter="affine")).requires_grad_()
    batch = frozen.run(ROWS[:1])
    labels = frozen.label(batch, torch.arange(40), exits, [0.5, 0.3, 0.2])
    assert labels.divergence is not None and (labels.divergence > 0).all()
    adapter: Any = exits.adapter(EXITS[0])
    hidden = batch.reads[EXITS[0]][:40]
    full = frozen.read_out(batch.last[:40]).log_softmax(-1)
    own = frozen.read_out(hidden, adapter).log_softmax(-1)
    loss = F.kl_div(own, full, log_target=True, reduction="batchmean")
    (gradient,) = torch.autograd.grad(0.5 * loss, [adapter.up.weight])
    torch.testing.assert_close(adapter.up.weight.grad, gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_weights_that_change_are_widened_again() -> None:
    model, frozen = in_bfloat16("llama")
    hidden = torch.randn(5, 32).bfloat16()
    before = frozen.read_out(hidden)
    model.lm_head.weight.mul_(2)
    torch.testing.assert_close(frozen.read_out(hidden), 2 * before)
