"""Names of operating points: one for each, stable, readable, and without the home folder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from helpers import LAYERS
from helpers_engine import exits_config
from helpers_harness import EXIT_ARGS, dynamax
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.config import DynamaxArgs
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.exits.resolve import resolve_policy
from dynamax_lm_eval.harness import naming
from dynamax_lm_eval.models.aliases import public_name

EXITS = exits_config(classifiers=("mamba", "calm"))


def label_of(**given: Any) -> str:
    args = DynamaxArgs("b", **given)
    return naming.label(resolve_policy(args, LAYERS, EXITS), args, EXITS, "0" * 16, is_shipped=True)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"threshold": (1.0,)}, "full"),
        ({}, "mamba-recompute-0.8"),
        ({"classifier": "calm", "threshold": (0.9, 0.8, 0.75)}, "calm-recompute-0.9+0.8+0.75"),
        ({"state_mode": "skip", "threshold": (0.5,)}, "mamba-skip-0.5"),
        ({"confidence": "softmax"}, "softmax-recompute-0.8"),
        ({"threshold": (1.0,), "prune_layers": 2}, "prune2"),
        ({"prune_layers": 1, "exit_layers": (2, 3)}, "mamba-recompute-0.8-prune1-"),
        ({"threshold": (1.0,), "prompt_exit_layer": 3}, "recompute-prompt3"),
        ({"target_reduction": 1.2}, "mamba-recompute-reduction1.2"),
        ({"exit_scope": "all"}, "mamba-recompute-0.8-"),
        ({"threshold": (1.0,), "repetition_penalty": 1.2}, "full-"),
    ],
)
def test_labels(given: dict[str, Any], label: str) -> None:
    found = label_of(**given)
    assert found == label or (label.endswith("-") and found.startswith(label) and len(found) == len(label) + 6)
    assert found == label_of(**given), "stable"


def test_exits_of_another_training_are_another_operating_point() -> None:
    args = DynamaxArgs("b", threshold=(0.8,))
    policy = resolve_policy(args, LAYERS, EXITS)
    first, second = (naming.label(policy, args, EXITS, fingerprint) for fingerprint in ("1" * 16, "2" * 16))
    assert first != second and all(found.startswith("mamba-recompute-0.8-") for found in (first, second))
    named = replace(args, exits="folder")
    assert naming.label(policy, named, EXITS, "1" * 16) == first, "whether they were named or found"
    full = replace(args, threshold=(1.0,))
    assert naming.label(resolve_policy(full, LAYERS, EXITS), full, EXITS, "1" * 16) == "full"


def test_no_two_operating_points_share_a_label() -> None:
    choices: dict[str, list[Any]] = {
        "threshold": [(0.8,), (0.81,), (0.8, 0.8, 0.9), (1.0,)],
        "classifier": ["mamba", "calm"],
        "state_mode": ["recompute", "skip", "copy"],
        "exit_scope": ["generated", "all"],
        "exit_layers": [None, (2, 3, 4), (2, 4)],
        "prune_layers": [0, 1, (1,)],
        "repetition_penalty": [None, 1.1],
        "threshold_decay": [None, 2.0],
        "classifier_warmup": [None, 4],
    }
    found: dict[str, Any] = {}
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        args = DynamaxArgs("b", **given)
        try:
            policy = resolve_policy(args, LAYERS, EXITS)
        except Exception:
            continue
        if not policy.active_exits:
            # Nothing leaves: only what is pruned, and the penalty, matter.
            policy = ExitPolicy(LAYERS, pruned_blocks=policy.pruned_blocks)
        settings = json.dumps([policy.describe(), args.repetition_penalty], sort_keys=True)
        label = naming.label(policy, args, EXITS, None)
        assert found.setdefault(label, settings) == settings, label
        assert len(label) < 60
    assert len(found) > 200


def test_backbones() -> None:
    assert public_name("mistral") == "mistralai/Mistral-7B-v0.3"
    assert public_name("tiny-llama") == "dynamax-lm-eval/tiny-llama"
    assert public_name("smollm2-gguf").startswith("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (public_name("owner/model"), public_name("gpt2")) == ("owner/model", "gpt2")
    assert public_name("/somewhere/my model/") == "local/my model"
    assert naming.model_name("owner/model", "/x/adapters", "calm-skip-0.5") == "owner/model+adapters@calm-skip-0.5"


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    given = {"a": "pretrained=/home/somebody/m,exits=/home/somebody/e", "b": ["/home/somebody", "/home/somebodyelse"]}
    assert naming.without_home(given) == {"a": "pretrained=~/m,exits=~/e", "b": ["~", "/home/somebodyelse"]}


@pytest.mark.parametrize("given", [{}, {"threshold": 1}])
def test_files_go_by_the_name(model_folder: Path, manager: TaskManager, tmp_path: Path, given: dict[str, Any]) -> None:
    tracker = EvaluationTracker(output_path=str(tmp_path))
    lm = dynamax(model_folder, **{**EXIT_ARGS, **given})
    results = lm_eval.simple_evaluate(
        lm, tasks=["tiny_generate"], task_manager=manager, bootstrap_iters=0, limit=1, evaluation_tracker=tracker
    )
    assert results is not None
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    name = f"local/{model_folder.name}" + ("" if given else f"@{written['config']['dynamax']['label']}")
    assert written["model_name"] == written["config"]["model_name"] == name
    assert written["config"]["dynamax"]["backbone_name"] == f"local/{model_folder.name}"
    assert file.parent.name == name.replace("/", "__") == written["model_name_sanitized"]
    about = written["config"]["dynamax"]
    assert (about["dtype"], about["batch_size"]) == (str(lm.model.dtype)[6:], lm.batch_size)
    assert about["device"].startswith("cpu") and set(about["versions"]) >= {"torch", "transformers", "lm_eval"}


@pytest.mark.parametrize("cached", [False, True])
def test_the_device_is_the_one_that_ran(model_folder: Path, manager: TaskManager, tmp_path: Path, cached: bool) -> None:
    """The harness's command passes the first GPU by default, whatever the machine has."""
    lm = dynamax(model_folder, threshold=1)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=["tiny_generate"],
        task_manager=manager,
        bootstrap_iters=0,
        limit=1,
        device="cuda:0",
        use_cache=str(tmp_path / "answers") if cached else None,
    )
    assert results is not None and results["config"]["device"] == "cpu"
