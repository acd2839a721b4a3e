"""Adapters of PEFT run as with ``--model hf``, and their weights are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from helpers_harness import EXIT_ARGS, dynamax, generation_requests
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from dynamax_lm_eval.errors import UserError


class TestPeft:
    @pytest.fixture
    def adapted(self, model_folder: Path, tmp_path: Path) -> Any:
        peft = pytest.importorskip("peft", reason="needs peft")
        import copy

        def save(config: Any, name: str) -> str:
            torch.manual_seed(5)
            model = peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.3)
                if "ia3_l" in key or "ln_tuning" in key:
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
            model.save_pretrained(tmp_path / name)
            return str(tmp_path / name)

        return peft, save

    def test_lora_runs_as_with_hf(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]), "lora")
        requests = generation_requests(["The quick", "nobody knows"])
        plain = dynamax(model_folder).generate_until(requests, disable_tqdm=True)
        theirs = HFLM(str(model_folder), peft=adapter, device="cpu", batch_size=1)
        ours = dynamax(model_folder, peft=adapter)
        expected = theirs.generate_until(requests, disable_tqdm=True)
        assert ours.generate_until(requests, disable_tqdm=True) == expected
        assert expected != plain
        # The adapter's weights are counted, in the block and in the K and V that recompute projects.
        base = dynamax(model_folder).engine.backbone.cost.blocks[0]
        block = dynamax(model_folder, peft=adapter, **EXIT_ARGS).engine.backbone.cost.blocks[0]
        assert block.weights == base.weights + 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 48))
        assert block.state_recompute == base.state_recompute + 4 * 2 * (32 + 16)

    @pytest.mark.parametrize("kind", ["ia3", "layer norms"])
    def test_adapters_of_vectors_run_as_with_hf_and_cost_nothing(
        self, model_folder: Path, adapted: Any, kind: str
    ) -> None:
        peft, save = adapted
        config = {
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
            "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        }[kind]
        adapter = save(config(), "vectors")
        pairs = [(("a", "b"), [5, 9, 14, 3], [7, 21])]
        ((plain, _),) = dynamax(model_folder)._loglikelihood_tokens(pairs, disable_tqdm=True)
        theirs = HFLM(str(model_folder), peft=adapter, device="cpu", batch_size=1)
        ((expected, _),) = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
        ours = dynamax(model_folder, peft=adapter)
        ((found, _),) = ours._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-5)
        assert abs(found - plain) > 0.01
        # What recompute projects was compared with what the blocks write, through the adapted modules.
        exiting = dynamax(model_folder, peft=adapter, **EXIT_ARGS)
        assert exiting.engine.recomputes_states
        base = dynamax(model_folder).engine.backbone.cost
        cost = exiting.engine.backbone.cost
        assert (cost.blocks, cost.lm_head) == (base.blocks, base.lm_head)

    def test_missing_weights_are_refused(self, model_folder: Path, adapted: Any, tmp_path: Path) -> None:
        peft, save = adapted
        adapter = Path(save(peft.LoraConfig(r=4, target_modules=["k_proj"]), "lora"))
        file = adapter / "adapter_model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(file).items() if ".5." not in name}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"^peft='.*lora': 2 of its weights are not in its files.*layers\.5\."):
            dynamax(model_folder, peft=str(adapter))

    def test_adapters_that_cannot_be_counted_are_refused(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.VeraConfig(target_modules=["k_proj"], r=4), "vera")
        with pytest.raises(UserError, match="is VERA, whose compute the cost model cannot count"):
            dynamax(model_folder, peft=adapter)

    def test_prompt_tuning_is_refused(self, model_folder: Path, adapted: Any) -> None:
        peft, save = adapted
        adapter = save(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prompt")
        with pytest.raises(UserError, match="adds virtual tokens"):
            dynamax(model_folder, peft=adapter)
