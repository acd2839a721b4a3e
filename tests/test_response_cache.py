"""The harness's response cache: equal results, and no answers of another model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers_harness import EXIT_ARGS, add_post_processor, dynamax, evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import cache, responder


class TestCache:
    def run(self, folder: Path, manager: TaskManager, cache: Path, **args: Any) -> Any:
        return evaluate(dynamax(folder, **args), manager, "tiny_group", "tiny_rolling", use_cache=str(cache))

    def test_a_cached_run_reports_the_same(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        monkeypatch.setattr(responder, "generate", lambda *_: pytest.fail("not answered from the cache"))
        monkeypatch.setattr(responder, "score", lambda *_: pytest.fail("not answered from the cache"))
        second = self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        assert second["compute"]["by_task"] == first["compute"]["by_task"]
        assert second["results"] == first["results"]

    def test_another_policy_or_a_foreign_file_is_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        with pytest.raises(UserError, match="differs in policy"):
            self.run(model_folder, manager, tmp_path / "c", **{**EXIT_ARGS, "threshold": 0.2})
        hf = HFLM(str(model_folder), device="cpu", batch_size=1)
        evaluate(hf, manager, "tiny_generate", use_cache=str(tmp_path / "foreign"))
        with pytest.raises(UserError, match="no identity record"):
            self.run(model_folder, manager, tmp_path / "foreign", **EXIT_ARGS)

    def test_another_configuration_or_way_of_counting_is_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        edited = shutil.copytree(model_folder, tmp_path / model_folder.name)
        config = json.loads((edited / "config.json").read_text())
        config["rms_norm_eps"] = 1e-3
        (edited / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="differs in config"):
            self.run(edited, manager, tmp_path / "c", **EXIT_ARGS)
        monkeypatch.setattr(cache, "ACCOUNTING", "other")
        with pytest.raises(UserError, match="differs in accounting"):
            self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)

    def test_a_changed_tokenizer_is_refused_and_a_moved_one_is_not(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        moved = shutil.copytree(model_folder, tmp_path / "moved" / "with another name")
        assert self.run(moved, manager, tmp_path / "c", **EXIT_ARGS)["results"] == first["results"]
        add_post_processor(moved)
        with pytest.raises(UserError, match="differs in tokenizer"):
            self.run(moved, manager, tmp_path / "c", **EXIT_ARGS)

    def test_another_release_of_transformers_is_not_another_run(
        self, model_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity = dynamax(model_folder, **EXIT_ARGS).identity()
        monkeypatch.setattr(transformers.generation.configuration_utils, "__version__", "9.9.9")
        monkeypatch.setattr(transformers.configuration_utils, "__version__", "9.9.9")
        lm = dynamax(model_folder, **EXIT_ARGS)
        assert lm.model.generation_config.to_diff_dict()["transformers_version"] == "9.9.9"
        assert lm.identity() == identity

    def test_one_changed_weight_is_refused(self, model_folder: Path, manager: TaskManager, tmp_path: Path) -> None:
        lm = dynamax(model_folder, **EXIT_ARGS)
        evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))
        lm.model.get_input_embeddings().weight.data[7, 3] += 1
        with pytest.raises(UserError, match="differs in weights"):
            evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))

    def test_responses_that_another_model_added_are_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        cache = str(tmp_path / "c")
        evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate", use_cache=cache)
        hf = HFLM(str(model_folder), device="cpu", batch_size=1)
        evaluate(hf, manager, "tiny_rolling", use_cache=cache)
        with pytest.raises(UserError, match="7 responses that another model wrote"):
            evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate", use_cache=cache)

    def test_another_policy_leaves_the_cache_of_the_first_alone(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        lm = dynamax(model_folder, **EXIT_ARGS)
        evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))
        files = [*tmp_path.iterdir()]
        before = [file.read_bytes() for file in files]
        lm.use_policy(replace(lm.args, threshold=(0.2,)))
        evaluate(lm, manager, "tiny_group")
        assert [file.read_bytes() for file in files] == before
        with pytest.raises(UserError, match="differs in policy"):
            evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))

    def test_what_really_ran_is_reported_beside_the_logical_counts(
        self, model_folder: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 4)
        tasks = ("tiny_group", "tiny_rolling")
        shared = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, *tasks)["compute"]
        apart = evaluate(dynamax(model_folder, prefix_caching=False, logits_cache=False, **EXIT_ARGS), manager, *tasks)
        assert shared["by_task"] == apart["compute"]["by_task"]
        overall = apart["compute"]["overall"]
        assert overall["physical"] == {"fed_tokens": overall["tokens"]["fed"], "macs": overall["macs"]["total"]}
        assert 0 < shared["overall"]["physical"]["fed_tokens"] < overall["tokens"]["fed"]
        assert 0 < shared["overall"]["physical"]["macs"] < overall["macs"]["total"]

    def test_speed_counts_only_what_ran(self, model_folder: Path, manager: TaskManager, tmp_path: Path) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        second = self.run(model_folder, manager, tmp_path / "c", **EXIT_ARGS)
        assert first["compute"]["overall"]["fed_tokens_in_seconds"] > 0
        assert second["compute"]["overall"]["fed_tokens_in_seconds"] == 0
