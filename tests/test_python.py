"""The package from Python: names that editors complete, another policy on loaded weights, our tasks by name."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers import TASKS
from helpers_harness import dynamax, save_exits

import dynamax_lm_eval
from dynamax_lm_eval.config import OWN_ARGUMENTS
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import describe, hflm
from dynamax_lm_eval.hf_arguments import FROM_PRETRAINED_ARGUMENTS
from dynamax_lm_eval.keywords import ModelKeywords, PolicyKeywords
from dynamax_lm_eval.lm import DynamaxLM

#: Ours that belong to what is loaded.
LOADED = {"backbone", "exits", "mamba_kernels"}


def test_the_model_is_listed_and_not_imported() -> None:
    code = """
import sys
import dynamax_lm_eval
assert {"DynamaxLM", "task_manager", "tasks_dir"} <= set(dir(dynamax_lm_eval))
assert not {"torch", "lm_eval"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class TestKeywords:
    def test_are_those_that_are_accepted(self) -> None:
        accepted = {*OWN_ARGUMENTS, *hflm.harness_arguments(), *FROM_PRETRAINED_ARGUMENTS}
        assert set(OWN_ARGUMENTS) - LOADED == set(PolicyKeywords.__annotations__)
        assert {*ModelKeywords.__annotations__, "backbone"} <= accepted
        assert {*OWN_ARGUMENTS} <= {*ModelKeywords.__annotations__, "backbone"}

    def test_are_in_the_signature(self) -> None:
        parameters = inspect.signature(DynamaxLM).parameters
        assert next(iter(parameters)) == "backbone"
        assert parameters["threshold"].default == (0.8,)
        assert parameters["state_mode"].annotation == "StateMode | None"
        assert parameters["batch_size"].kind is inspect.Parameter.KEYWORD_ONLY
        assert "kwargs" not in parameters

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ('from pathlib import Path; DynamaxLM(Path("b"), threshold=0.8, device="cpu").use(state_mode="skip")', ""),
            ('DynamaxLM("b", threshhold=0.8)', 'Unexpected keyword argument "threshhold"'),
            ('DynamaxLM("b", state_mode="skp")', "incompatible type"),
            ('DynamaxLM("b").use(dtype="float32")', 'Unexpected keyword argument "dtype"'),
        ],
    )
    def test_are_seen_by_type_checkers(self, tmp_path: Path, call: str, message: str) -> None:
        (tmp_path / "script.py").write_text(f"from dynamax_lm_eval import DynamaxLM\n{call}\n")
        root = Path(dynamax_lm_eval.__file__).parents[1]
        result = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(tmp_path / "script.py")],
            capture_output=True,
            text=True,
            check=False,
            cwd=root,
        )
        assert (message in result.stdout) if message else result.returncode == 0, result.stdout


def test_paths_are_folders_as_their_texts_are(model_folder: Path) -> None:
    by_path = DynamaxLM(model_folder, threshold=0.5, confidence="state", device="cpu", tokenizer=model_folder)
    assert by_path.args == dynamax(model_folder, threshold=0.5, confidence="state").args
    assert DynamaxLM(pretrained=model_folder, threshold=1, device="cpu").args.backbone == str(model_folder)


class TestUse:
    def test_another_policy_on_the_same_weights(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, threshold=0.3, confidence="softmax", exit_layers=[2, 4])
        model, first = lm.model, lm.policy
        assert lm.use(threshold=0.7) is lm
        assert lm.model is model
        assert lm.policy.thresholds == (0.7, 0.7)
        assert lm.policy.exit_layers == first.exit_layers
        assert lm.use(state_mode="skip").policy.thresholds == (0.3, 0.3)  # from the model's own arguments
        assert lm.use().policy == first
        manager = dynamax_lm_eval.task_manager(["tiny_generate"], str(TASKS))
        results = lm_eval.simple_evaluate(
            lm.use(threshold=1), tasks=["tiny_generate"], task_manager=manager, limit=1, bootstrap_iters=0
        )
        assert results is not None
        assert results["compute"]["overall"]["compute_reduction"] == 1
        assert results["config"]["dynamax"]["label"] == "full"

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"threshold": 2}, "threshold must be in"),
            ({"threshhold": 0.5}, "did you mean 'threshold'"),
            ({"target_reduction": 1.2}, r"DynamaxLM\(lm.model, ...\)"),
            ({"threshold": "calibrated"}, r"DynamaxLM\(lm.model, ...\)"),
            ({"exit_layers": [9]}, "exit_layers must lie in"),
            ({"dtype": "float64"}, "dtype belongs to the loaded model"),
            ({"mamba_kernels": "torch"}, "mamba_kernels is loaded already"),
        ],
    )
    def test_what_cannot_change(self, model_folder: Path, changed: dict[str, Any], message: str) -> None:
        lm = dynamax(model_folder, threshold=0.3, confidence="softmax")
        before = lm.policy
        with pytest.raises(UserError, match=message):
            lm.use(**changed)
        assert lm.policy == before

    def test_exits_that_were_not_loaded_are_not_forgotten(
        self, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path))
        lm = dynamax(model_folder, threshold=1)
        assert lm.use(threshold=0.5).policy.confidence == "softmax"  # there are none
        save_exits(model_folder, tmp_path / "exits" / "some")
        with pytest.raises(UserError, match="without its trained exits"):
            lm.use(threshold=0.5)
        assert lm.use(threshold=0.5, confidence="state").policy.confidence == "state"

    def test_a_budget_gives_way_to_a_threshold(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, threshold=None, target_reduction=1.1, confidence="softmax")
        assert lm.use(threshold=0.4).policy.thresholds[0] == 0.4
        assert not lm.budget.has_budget


def test_a_run_says_what_runs(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = dynamax_lm_eval.task_manager(["tiny_generate"], str(TASKS))
    lm = dynamax(model_folder, threshold=0.3, confidence="softmax", exit_layers=[2, 4], prune_layers=1)
    with caplog.at_level(logging.INFO, logger="dynamax_lm_eval"):
        lm_eval.simple_evaluate(lm, tasks=["tiny_generate"], task_manager=manager, limit=1, bootstrap_iters=0)
        lm_eval.simple_evaluate(
            lm.use(threshold=1, prune_layers=0), tasks=["tiny_generate"], task_manager=manager, limit=1
        )
    first, second = (text for text in caplog.messages if " blocks, run as fused, " in text)
    assert f"{model_folder} (6 blocks, run as fused, float32 on cpu)" in first
    assert "exits after blocks 2, 4 (no trained exits)" in first
    assert "confidence softmax, threshold 0.3, states recompute" in first
    assert "without blocks 5" in first
    assert second.endswith("; no exits")


def test_a_run_says_what_confirms(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = dynamax(
        model_folder,
        exits=save_exits(model_folder, tmp_path / "exits"),  # a path as well as its text
        confidence="cascade",
        classifier="calm",
        propose=0.4,
        threshold=0.3,
    )
    with caplog.at_level(logging.INFO, logger="dynamax_lm_eval"):
        describe.announce(lm)
    assert "confidence cascade:calm (proposes from 0.4, the read-out confirms), threshold 0.3" in caplog.text
