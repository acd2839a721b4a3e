"""Trained exits inside the harness: found, named, checked, counted and recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from helpers import LAYERS, tiny_model
from helpers_engine import EXITS, exits_config
from helpers_harness import exit_model, instance, save_exits
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

from dynamax_lm_eval.engine.decisions import ExitDecisions
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits import checkpoint, lookup
from dynamax_lm_eval.exits.confidences import ExitInputs
from dynamax_lm_eval.exits.confidences.trained import TrainedConfidence
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.lm import DynamaxLM
from dynamax_lm_eval.models import aliases
from dynamax_lm_eval.models.fingerprint import files_fingerprint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNAMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_exits_in_the_users_cache_are_used(model_folder: Path, cache: Path, manager: TaskManager) -> None:
    folder = save_exits(model_folder, cache / "exits" / "some-name")
    lm = exit_model(model_folder)
    results = lm_eval.simple_evaluate(
        lm, tasks=["tiny_generate", "tiny_choice"], task_manager=manager, bootstrap_iters=0
    )
    assert results is not None
    shown = results["config"]["dynamax"]
    assert shown["exits"] == str(folder)
    assert shown["exits_fingerprint"] == checkpoint.ExitCheckpoint.open(folder).fingerprint()
    assert shown["exits_config"]["backbone"]["num_layers"] == LAYERS
    assert shown["policy"]["classifier"] == "mamba"
    assert shown["policy"]["exit_layers"] == list(EXITS)
    compute = results["compute"]["by_task"]["tiny_generate"]
    assert compute["macs"]["exits"]["classifiers"] > 0
    assert set(map(int, compute["exit_histogram"])) <= {*EXITS, LAYERS}
    assert json.dumps(shown)


def test_the_newest_exits_win_and_other_backbones_are_not_taken(model_folder: Path, cache: Path) -> None:
    save_exits(model_folder, cache / "exits" / "other", fingerprint="f" * 64)
    assert exit_model(model_folder, confidence="state").exits is None
    assert exit_model(model_folder).policy.confidence == "softmax"
    found = save_exits(model_folder, cache / "exits" / "right")
    assert exit_model(model_folder).exits.path == found  # type: ignore[union-attr]
    assert exit_model(model_folder, threshold=1).exits is None


def test_damaged_exits_of_this_backbone_are_no_reason_to_do_without(model_folder: Path, cache: Path) -> None:
    fingerprint = files_fingerprint(str(model_folder), {})
    folder = save_exits(model_folder, lookup.default_folder(str(model_folder), str(fingerprint)))
    (folder / checkpoint.CONFIG_NAME).write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be used: it is damaged"):
        lookup.find(str(model_folder), fingerprint)
    assert lookup.find("another", "f" * 64) is None


def test_another_policy_with_the_same_exits(model_folder: Path, tmp_path: Path, cache: Path) -> None:
    """What follow() asks for is answered and counted as by a model that was loaded with it."""
    folder = str(save_exits(model_folder, tmp_path / "mine"))
    requests = [instance("generate_until", ("The quick", {"until": [], "max_gen_toks": 8}), 0, ("t", 0, 1))]
    lm = exit_model(model_folder, exits=folder, threshold=1)
    other = exit_model(model_folder, exits=folder, classifier="calm", state_mode="skip")
    lm.use_policy(other.args)
    assert lm.policy == other.policy
    assert lm.identity() == other.identity()
    assert lm.generate_until(requests) == other.generate_until(requests)
    (key,) = request_keys([("generate_until", requests[0].args)])
    mine, theirs = (x.response_ledger.find(key) for x in (lm, other))
    assert mine == theirs
    assert mine.classifier_macs > 0
    with pytest.raises(UserError, match="exits is loaded already"):
        lm.use_policy(replace(other.args, exits=None))
    with pytest.raises(UserError, match="exit_layers"):
        lm.use_policy(replace(other.args, exit_layers=(5,)))
    assert lm.policy == other.policy


def test_exits_of_the_package_come_after_those_of_the_user(
    model_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "shipped_home", lambda: tmp_path / "package")
    shipped = save_exits(model_folder, tmp_path / "package" / "some-model")
    assert exit_model(model_folder).exits.path == shipped  # type: ignore[union-attr]
    own = save_exits(model_folder, cache / "exits" / "mine")
    assert exit_model(model_folder).exits.path == own  # type: ignore[union-attr]


def test_named_exits(model_folder: Path, tmp_path: Path, cache: Path) -> None:
    folder = save_exits(model_folder, tmp_path / "mine")
    lm = exit_model(model_folder, exits=str(folder), classifier="calm", exit_layers=[3])
    assert lm.policy.classifier == "calm"
    assert lm.policy.exit_layers == (3,)
    with pytest.raises(UserError, match="there is no such folder"):
        exit_model(model_folder, exits="./nowhere")
    with pytest.raises(UserError, match=r"there is no config\.json"):
        exit_model(model_folder, exits=str(tmp_path))


def test_exits_for_other_weights_need_the_users_word(
    model_folder: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_exits(model_folder, tmp_path / "foreign", fingerprint="f" * 64)
    with pytest.raises(UserError, match="were trained for other weights"):
        exit_model(model_folder, exits=str(folder))
    caplog.clear()
    lm = exit_model(model_folder, exits=str(folder), exits_check="false")
    assert lm.exits is not None
    assert "because of exits_check=false" in caplog.text


def test_a_model_from_memory_finds_its_exits(model_folder: Path, cache: Path) -> None:
    folder = save_exits(model_folder, cache / "exits" / "x")
    lm = DynamaxLM(tiny_model("llama"), tokenizer=str(model_folder), threshold=0.6, device="cpu")
    assert lm.exits is not None
    assert lm.exits.path == folder


def test_the_response_cache_knows_the_exits(model_folder: Path, tmp_path: Path, cache: Path) -> None:
    one = exit_model(model_folder, exits=str(save_exits(model_folder, tmp_path / "a")))
    config = exits_config()
    other_weights = config.build(seed=99)
    fingerprint = files_fingerprint(str(model_folder), {})
    assert fingerprint is not None
    config = replace(config, backbone=replace(config.backbone, fingerprint=fingerprint))
    checkpoint.save(tmp_path / "b", config, other_weights)
    other = exit_model(model_folder, exits=str(tmp_path / "b"))
    assert one.identity()["exits"] != other.identity()["exits"]
    assert one.identity()["policy"] == other.identity()["policy"]


@pytest.mark.parametrize("kind", ["calm", "mamba"])
def test_classifiers_that_give_no_number_name_the_document(
    model_folder: Path, tmp_path: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would tell: logits are as they should be, and no token would ever exit."""
    exits = str(save_exits(model_folder, tmp_path / "mine"))
    lm = exit_model(model_folder, exits=exits, classifier=kind, exit_scope="all", threshold=0.99)
    texts = ["The quick", "on the river"]
    poisoned = list(set(lm.tokenizer.encode(texts[1])) - set(lm.tokenizer.encode("The quick Paris is")))
    evaluate, score = ExitDecisions._evaluate, TrainedConfidence.score
    evaluated: list[Any] = []

    def noted(self: Any, use: Any, block: int, tokens: Any, places: Any, *rest: Any) -> Any:
        evaluated[:] = [self._batch.ids[tokens[places]]]
        return evaluate(self, use, block, tokens, places, *rest)

    def broken(self: TrainedConfidence, inputs: ExitInputs) -> torch.Tensor:
        hit = torch.from_numpy(np.isin(evaluated[0], poisoned)) & (inputs.layer == EXITS[1])
        return score(self, inputs).masked_fill(hit, float("nan"))

    monkeypatch.setattr(ExitDecisions, "_evaluate", noted)
    monkeypatch.setattr(TrainedConfidence, "score", broken)
    settings = {"until": [], "max_gen_toks": 4}
    arguments = {"generate_until": (settings,), "loglikelihood": (" Paris is",), "loglikelihood_rolling": ()}
    for kind_of_request, rest in arguments.items():
        asked = [instance(kind_of_request, (text, *rest), i, ("t", i, 1)) for i, text in enumerate(texts)]
        message = f"{kind} confidences at exit layer {EXITS[1]} that are not finite for document 1 of task 't'"
        with pytest.raises(UserError, match=message):
            getattr(lm, kind_of_request)(asked, disable_tqdm=True)


def test_preset_paper(model_folder: Path, tmp_path: Path, cache: Path) -> None:
    folder = save_exits(model_folder, tmp_path / "final", final_block=True)
    lm = exit_model(model_folder, exits=str(folder), preset="paper")
    shown = lm.get_model_info()["dynamax"]
    assert shown["preset"] == "paper"
    assert shown["preset_sets"] == {"final_block": True, "state_mode": "copy", "repetition_penalty": 1.1}
    assert lm.policy.final_block
    overridden = exit_model(model_folder, exits=str(folder), preset="paper", state_mode="skip", repetition_penalty=1.0)
    assert overridden.policy.state_mode == "skip"
    assert overridden.args.repetition_penalty == 1.0


def test_what_the_package_ships() -> None:
    """Small, in bfloat16, with credit for the text, and readable by this version."""
    folders = sorted(file.parent for file in lookup.shipped_home().glob("*/config.json"))
    assert [folder.name for folder in folders] == ["smollm2-gguf", "tiny-llama", "tiny-mamba2"]
    for folder in folders:
        opened = checkpoint.ExitCheckpoint.open(folder)
        assert opened.config.classifiers[0] == "mamba"
        assert opened.config.adapter == "affine"
        assert opened.config.states is not None and opened.config.states.kind == "linear"
        assert not str(opened.config.training["options"]["init"]).startswith("/")
        opened.load()
        tensors = load_file(folder / checkpoint.WEIGHTS_NAME)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        card = (folder / checkpoint.CARD_NAME).read_text(encoding="utf-8")
        assert "OpenStax" in card
        assert "CC BY 4.0" in card
    files = [file for folder in folders for file in folder.rglob("*")]
    assert sum(file.stat().st_size for file in files) < 24e6


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mamba2"])
def test_backbones_of_the_package_run_with_their_exits(name: str, cache: Path) -> None:
    """Small, in bfloat16, with credit for the text; both with the same tokenizer."""
    folder = aliases.shipped_backbones()[name]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    other = aliases.shipped_backbones()["tiny-llama"]
    assert (folder / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "OpenStax" in card
    assert "CC BY 4.0" in card
    lm = DynamaxLM(name, threshold=0.5, device="cpu", dtype="float32", batch_size=2)
    assert lm.exits is not None
    assert lm.exits.path == lookup.shipped_home() / name
    assert lm.model.num_parameters() < 4e6
    options = {"until": [], "max_gen_toks": 24, "do_sample": False}
    prompts = ["The cell membrane is", "In the nineteenth century, the United States"]
    requests = [instance("generate_until", (p, options), i, ("t", i, 1)) for i, p in enumerate(prompts)]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert all(len(text.split()) > 3 for text in texts)
    keys = request_keys(("generate_until", request.args) for request in requests)
    records = [lm.response_ledger.find(key) for key in keys]
    assert min(layer for record in records for layers in record.exit_layers for layer in layers) < 12


def test_what_is_shipped_is_small() -> None:
    files = [file for file in aliases.shipped_dir().rglob("*") if "tiny-" in str(file) and file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
