"""How blocks are found out about: masks, places of tokens in arguments, what cannot be pruned, and whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import VOCAB, random_ids, train_tokenizer
from helpers_architectures import DEPTH, architecture
from helpers_harness import dynamax
from transformers.models.olmo2 import modeling_olmo2

from dynamax_lm_eval.backbones import ReplayBackbone
from dynamax_lm_eval.backbones.replay.arguments import AmbiguousAxisError, Call
from dynamax_lm_eval.backbones.transformer.masks import MaskRule, classified
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import Expected, check_against_model, check_state_recompute, checked_engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.frozen.model import load_backbone
from dynamax_lm_eval.frozen.options import FrozenOptions
from dynamax_lm_eval.harness import describe


def causal(_: Any, __: Any, q: Any, k: Any) -> Any:
    return k <= q


def window(_: Any, __: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (q - k < 70)


def chunks(_: Any, __: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (q // 100 == k // 100)


class TestMasks:
    @pytest.mark.parametrize(("rule", "horizon", "expected"), [(causal, 4000, None), (window, 4000, 70)])
    def test_plain_ones_are_known(self, rule: Any, horizon: int, expected: int | None) -> None:
        assert classified(MaskRule(rule), horizon) == expected

    def test_what_lies_beyond_the_longest_row_does_not_count(self) -> None:
        assert classified(MaskRule(window), 60) is None
        assert classified(MaskRule(chunks), 90) is None

    def test_others_are_asked(self) -> None:
        rule = MaskRule(chunks)
        assert classified(rule, 4000) is rule
        seen = rule.attended(np.asarray([99, 100, 250]), np.arange(251))
        assert seen.sum(1).tolist() == [100, 1, 51]
        scores = rule.tensor(np.asarray([100]), np.asarray([99, 100]), torch.zeros(1))
        assert (scores[0, 0, 0] == 0).tolist() == [False, True]


class TestArguments:
    def test_tokens_are_found_by_comparison(self) -> None:
        def call(n: int) -> Call:
            rotary = (torch.arange(2.0 * n).view(1, n, 2), torch.zeros(1, 5))
            return Call((torch.arange(3.0 * n).view(1, n, 3),), {"rotary": rotary, "flag": True, "kind": {"x": None}})

        axes = call(5).axes(call(7), (5, 7))
        assert (axes.args, axes.kwargs["rotary"]) == ((1,), (1, None))
        chosen = axes.select(call(7), torch.tensor([2, 6]))
        assert chosen.hidden[0, :, 0].tolist() == [6, 18]
        assert chosen.kwargs["rotary"][0][0].tolist() == [[4, 5], [12, 13]]
        assert chosen.kwargs["rotary"][1].shape == (1, 5)
        joined = axes.joined(call(5), chosen)
        assert joined.hidden.shape == (1, 7, 3)
        assert axes.by_row(chosen).hidden.shape == (2, 1, 3)

    def test_two_places_are_an_error(self) -> None:
        mask = [Call((torch.zeros(1, n, 3), torch.zeros(n, n)), {}) for n in (5, 7)]
        with pytest.raises(AmbiguousAxisError):
            mask[0].axes(mask[1], (5, 7))


def test_a_mask_that_is_no_window_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, which the model makes of a mask function of its own; rows of a batch each have their own."""
    model = architecture("norm after attention")
    make = modeling_olmo2.create_causal_mask

    def chunked(**given: Any) -> Any:
        return make(**given, and_mask_function=lambda _, __, q, k: q // 4 == k // 4)

    plain = Expected.of(model, ReplayBackbone(model, 64)).logits
    monkeypatch.setattr(modeling_olmo2, "create_causal_mask", chunked)
    backbone = ReplayBackbone(model, 64)
    assert all(isinstance(block.visibility, MaskRule) for block in backbone.blocks)
    expected = Expected.of(model, backbone)
    assert not torch.allclose(expected.logits, plain, atol=0.1)
    engine = Engine(backbone)
    check_against_model(engine, model, expected)
    check_state_recompute(engine)


def test_blocks_that_others_need_are_not_pruned() -> None:
    model = architecture("inputs per block and shared K and V")
    message = r"blocks \[4\] cannot be pruned on Gemma3nForCausalLM: others need what they keep"
    with pytest.raises(UserError, match=message):
        checked_engine(model, ExitPolicy(DEPTH, pruned_blocks=frozenset({4})), 64)
    checked_engine(model, ExitPolicy(DEPTH, pruned_blocks=frozenset({2, 5})), 64)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def test_the_text_side_of_a_model_that_sees_images(tmp_path: Path) -> None:
    """Which the harness's own ``hf`` does not load."""
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    lm = dynamax(saved(model, tmp_path), confidence="softmax", threshold=0.3, exit_layers=[2, 4])
    assert type(lm.model) is hf.Qwen2_5_VLForConditionalGeneration
    context, continuation = random_ids(9, 1), random_ids(4, 2)
    lm.use_policy(replace(lm.args, threshold=(1.0,)))
    ((score, _),) = lm._loglikelihood_tokens([(("a", "b"), context, continuation)], disable_tqdm=True)
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0, len(context) - 1 :]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()
    assert score == pytest.approx(float(expected), abs=4e-4)


def test_results_say_how_a_model_ran(tmp_path: Path) -> None:
    lm = dynamax(saved(architecture("ALiBi"), tmp_path), threshold=1)
    found = describe.run_settings(lm)
    assert (found["runs_as"], found["cost_source"]) == ("whole rows", "measured")
    assert "every token costs as much as its whole row" in found["runs_as_note"]


def test_exits_are_as_wide_as_what_runs_through_the_blocks(tmp_path: Path) -> None:
    model = architecture("inputs per block and shared K and V")
    folder = saved(model, tmp_path)
    loaded = load_backbone(FrozenOptions(backbone=str(folder), seq_len=16, dtype="float32", device="cpu"))
    assert loaded.identity.hidden_size == loaded.engine.backbone.hidden_size == 4 * 32


def test_kernels_of_mamba_are_not_asked_for_without_mamba(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mamba_kernels has no effect on 'qwen3_next', which has no Mamba blocks"):
        dynamax(saved(architecture("linear attention and experts"), tmp_path), threshold=1, mamba_kernels="torch")
