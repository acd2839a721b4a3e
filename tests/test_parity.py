"""What the engine checks of a model before it uses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, tiny_model
from helpers_engine import engine_for

from dynamax_lm_eval.backbones import TransformerBackbone, make_backbone
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

    def test_refuses_scaled_embeddings(self) -> None:
        import transformers as hf

        torch.manual_seed(0)
        config = hf.GraniteConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            embedding_multiplier=12.0,
        )
        model = hf.GraniteForCausalLM(config).eval()
        with pytest.raises(UserError, match="GraniteForCausalLM is not supported"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    def test_refuses_soft_capped_attention(self) -> None:
        import transformers as hf

        config = hf.Gemma2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        model = hf.Gemma2ForCausalLM(config).eval()
        with pytest.raises(UserError, match="softcap"):
            check_against_model(Engine(TransformerBackbone(model)), model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_sees_small_errors_in_every_dtype(self, family: str, dtype: torch.dtype) -> None:
        import copy

        model = tiny_model(family, dtype)
        scaled = copy.deepcopy(model)
        scaled.get_output_embeddings().weight.data *= 1.05
        check_against_model(Engine(make_backbone(model, 256)), model)
        with pytest.raises(UserError, match="more than rounding explains"):
            check_against_model(Engine(make_backbone(model, 256)), scaled)

    def test_counts_the_window_that_the_blocks_use(self) -> None:
        import copy

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

    def test_refuses_by_name_what_fails_on_the_way(self) -> None:
        import transformers as hf

        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        stablelm = hf.StableLmForCausalLM(hf.StableLmConfig(**sizes)).eval()
        with pytest.raises(UserError, match="StableLmForCausalLM is not supported: it cannot be used block by block"):
            checked_engine(stablelm, ExitPolicy(2), 64)
        phi = hf.PhiForCausalLM(hf.PhiConfig(**sizes)).eval()
        checked_engine(phi, ExitPolicy(2), 64)
        exits = ExitPolicy(2, (1,), (0.5,))
        checked_engine(phi, replace(exits, state_mode="skip"), 64)
        with pytest.raises(UserError, match=r"skip and copy may work|use state_mode=skip or copy"):
            checked_engine(phi, exits, 64)

    def test_refuses_learned_positions(self) -> None:
        import transformers as hf

        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
        with pytest.raises(UserError, match="GPT2LMHeadModel"):
            TransformerBackbone(model)

    def test_refuses_a_wrong_projection(self) -> None:
        engine = engine_for("phi3")
        block = engine.backbone.blocks[1]  # type: ignore[attr-defined]
        wrong = replace(block, project=lambda h, c, s: tuple(2 * x for x in block.project(h, c, s)))
        engine.backbone.blocks[1] = wrong  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="block 2"):
            check_state_recompute(engine)

    def test_refuses_a_wrong_projection_of_a_lean_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = FusedLlamaBlock.states
        monkeypatch.setattr(FusedLlamaBlock, "states", lambda *args: tuple(2 * x for x in right(*args)))
        with pytest.raises(UserError, match="block 1"):
            check_state_recompute(engine_for("llama"))

    def test_refuses_weights_that_are_not_finite(self) -> None:
        import copy

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
