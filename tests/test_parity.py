"""What the engine checks of a model before it uses it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import FAMILIES, tiny_model
from helpers_engine import engine_for
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamax_lm_eval.backbones import TransformerBackbone, make_backbone
from dynamax_lm_eval.backbones.replay.mixers import RowMixer
from dynamax_lm_eval.backbones.replay.model import ReplayModel
from dynamax_lm_eval.backbones.transformer import attention, fused_llama
from dynamax_lm_eval.backbones.transformer.fused_llama import FusedLlamaBlock
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import check_against_model, check_state_recompute, checked_engine
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy


class TestSelfCheck:
    """What the layer loop does not compute is refused by name at load."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_accepts(self, family: str) -> None:
        engine = engine_for(family)
        check_against_model(engine, tiny_model(family))
        check_state_recompute(engine)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_sees_small_errors_in_every_dtype(self, family: str, dtype: torch.dtype) -> None:
        model = tiny_model(family, dtype)
        scaled = copy.deepcopy(model)
        scaled.get_output_embeddings().weight.data *= 1.05
        check_against_model(Engine(make_backbone(model, 256)), model)
        with pytest.raises(UserError, match="more than rounding explains"):
            check_against_model(Engine(make_backbone(model, 256)), scaled)

    def test_counts_the_window_that_the_blocks_use(self) -> None:
        for family, windows in (("mistral", [5] * 6), ("gemma3", [5, 5, None] * 2), ("qwen2", [None] * 6)):
            engine = engine_for(family)
            check_against_model(engine, tiny_model(family))
            assert [block.window for block in engine.backbone.cost.blocks] == windows
        # Converted checkpoints carry windows in their configuration that a Llama never looks at.
        model = copy.deepcopy(tiny_model("llama"))
        model.config.sliding_window = 5
        engine = Engine(TransformerBackbone(model, 256))
        check_against_model(engine, model)
        assert [block.window for block in engine.backbone.cost.blocks] == [None] * 6

    def test_refuses_by_name_what_fails_on_the_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(ReplayModel, "capture", fails)
        message = r"Gemma3ForCausalLM is not supported: it cannot be used block by block \(ZeroDivisionError"
        with pytest.raises(UserError, match=message):
            checked_engine(tiny_model("gemma3"), ExitPolicy(6), 64)

    def test_takes_the_fastest_way_that_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, exits = tiny_model("llama"), ExitPolicy(6, (2,), (0.5,))

        def rung(policy: ExitPolicy = exits) -> str:
            return checked_engine(model, policy, 64).backbone.rung

        assert rung() == "fused"
        with monkeypatch.context() as wrong:
            states = FusedLlamaBlock.states
            wrong.setattr(FusedLlamaBlock, "states", lambda *args: tuple(1.1 * x for x in states(*args)))
            assert rung() == "flat"
            assert (
                rung(ExitPolicy(6)) == rung(replace(exits, state_mode="skip")) == "fused"
            )  # which need no such states
        with monkeypatch.context() as wrong:
            attend = attention.ragged_attention
            wrong.setattr(fused_llama, "ragged_attention", lambda *args: (1.1 * attend(*args)[0], None))
            assert rung() == "flat"
            wrong.setitem(ALL_ATTENTION_FUNCTIONS, attention.NAME, lambda *a, **k: (1.1 * attend(*a, **k)[0], None))
            assert rung() == "row modules"
            wrong.setattr(RowMixer, "called", lambda *_: torch.zeros(1, 1, 32))
            assert rung() == "whole rows"

    def test_a_mode_that_cannot_be_had_is_refused_for_its_own_reason(self) -> None:
        with pytest.raises(UserError, match="state_mode=copy is not possible on Gemma3ForCausalLM"):
            checked_engine(tiny_model("gemma3"), ExitPolicy(6, (2,), (0.5,), state_mode="copy"), 64)

    def test_refuses_what_is_not_causal(self) -> None:
        model = copy.deepcopy(tiny_model("gemma3"))
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
        with pytest.raises(UserError, match="Gemma3ForCausalLM is not causal"):
            checked_engine(model, ExitPolicy(6), 64)

    @pytest.mark.parametrize("family", ["phi3", "mamba2", "gemma3"])
    def test_sees_wrong_states_of_tokens_that_left(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = engine_for(family)
        check_state_recompute(engine)
        if family == "mamba2":
            block = engine.backbone.blocks[2]  # type: ignore[attr-defined]
            right = type(block).project

            def wrong(self: Any, hidden: torch.Tensor, *left: Any) -> Any:
                gate, update = right(self, hidden, *left)
                factor = torch.ones(len(update), 1)
                factor[len(hidden) :] = 1.1 if self is block else 1.0
                return gate, update * factor

            monkeypatch.setattr(type(block), "project", wrong)
        else:
            block = engine.backbone.blocks[1]  # type: ignore[attr-defined]
            block.unneeded.append((block.module.self_attn.o_proj, 32))  # has no part in it
            check_state_recompute(engine)
            block.unneeded[:] = [(block.module.input_layernorm, 32)]
        with pytest.raises(UserError, match="logits after exits differ"):
            check_state_recompute(engine)

    def test_refuses_weights_that_are_not_finite(self) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
        with pytest.raises(UserError, match="not finite"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    def test_refuses_rope_that_depends_on_the_longest_row(self) -> None:
        import transformers as hf

        config = hf.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        )
        model = hf.LlamaForCausalLM(config).eval()
        with pytest.raises(UserError, match="max_length="):
            TransformerBackbone(model, max_length=128)
        TransformerBackbone(model, max_length=32)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = tiny_model("llama")
        model.config._attn_implementation = "sdpa"
        check_against_model(engine_for("llama"), model)
        assert model.config._attn_implementation == "sdpa"
