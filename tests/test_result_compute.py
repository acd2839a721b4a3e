"""Compute in the harness's results: rows, breakdowns and samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers import LAYERS, TASKS
from helpers_harness import EXIT_ARGS, dynamax, evaluate, instance, responses
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.harness.ledger import request_keys


class TestCompute:
    def test_a_group_without_an_aggregate_metric(self, model_folder: Path, tmp_path: Path) -> None:
        """The harness writes no ``groups`` then; the group's compute is where the documentation says."""
        (tmp_path / "own_group.yaml").write_text("group: own_group\ntask: [tiny_generate, tiny_choice]\n")
        tasks = TaskManager(include_path=[str(TASKS), str(tmp_path)], include_defaults=False)
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), tasks, "own_group", limit=2)
        assert "groups" not in results
        row, entry = results["results"]["own_group"], results["compute"]["by_task"]["own_group"]
        assert row["compute_reduction,none"] == entry["compute_reduction"]
        assert not [key for key in row if key.startswith(("exact_match", "acc"))]

    def test_every_place_of_the_results(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_group", "tiny_rolling")
        for task in ("tiny_generate", "tiny_choice", "tiny_rolling", "tiny_group"):
            row = results["results"][task]
            assert row["compute_reduction,none"] > 0
            assert isinstance(row["compute_reduction_stderr,none"], float)
            shown = {key.partition(",")[0] for key in row if "," in key and "_stderr" not in key}
            assert set(results["higher_is_better"][task]) >= shown, "every row says whether more is better"
            assert results["higher_is_better"][task]["compute_reduction"] is True
            assert results["higher_is_better"][task].get("mean_exit_layer") is None
            keys = list(row)
            own = [key for key in keys if key.startswith(("exact_match", "acc", "bits_per_byte"))]
            assert all(keys.index(key) < keys.index("compute_reduction,none") for key in own)
        assert results["groups"]["tiny_group"] == results["results"]["tiny_group"]
        compute = results["compute"]
        assert set(compute) == {"schema_version", "accounting", "by_task", "overall"}
        # Groups and totals come from sums, not from averages of ratios.
        parts = [compute["by_task"][task]["macs"] for task in ("tiny_generate", "tiny_choice")]
        full = sum(part["eligible_full"] for part in parts)
        spent = sum(part["eligible_blocks"] + sum(part["exits"].values()) for part in parts)
        assert results["results"]["tiny_group"]["compute_reduction,none"] == full / spent
        for name in ("eligible_full", "total_full", "total"):
            leaves = ("tiny_generate", "tiny_choice", "tiny_rolling")
            assert compute["overall"]["macs"][name] == sum(compute["by_task"][t]["macs"][name] for t in leaves)
            assert compute["by_task"]["tiny_group"]["macs"][name] == sum(part[name] for part in parts)
        assert set(compute["overall"]["seconds"]) == {
            "generate_until",
            "loglikelihood",
            "loglikelihood_rolling",
        }
        json.dumps(results["compute"])
        from lm_eval.utils import make_table

        assert "compute_reduction" in make_table(results)
        section = results["config"]["dynamax"]
        assert results["config"]["model_name"] == f"local/{model_folder.name}@{section['label']}"
        assert results["config"]["model_args"]["exit_layers"] == [2, 4]
        assert section["policy"]["thresholds"] == [0.1, 0.1]
        assert (section["policy"]["confidence"], section["confidence_chosen_by"]) == ("softmax", "default")

    def test_totals_equal_the_sum_of_samples(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_generate")
        samples = results["samples"]["tiny_generate"]
        breakdown = results["compute"]["by_task"]["tiny_generate"]
        layers = [layer for sample in samples for response in sample["exit_layers"] for layer in response]
        assert len(layers) == breakdown["tokens"]["eligible_tokens"]
        assert sum(layers) / len(layers) == pytest.approx(breakdown["mean_exit_layer"])
        assert {str(layer): layers.count(layer) for layer in sorted(set(layers))} == breakdown["exit_histogram"]
        assert set(layers) >= {2, LAYERS}
        assert samples[0]["compute_reduction"] == samples[-1]["compute_reduction"], "the same document twice"
        assert breakdown["documents"] == len(samples) == 8
        for sample in samples:
            own = [layer for response in sample["exit_layers"] for layer in response]
            assert sample["mean_exit_layer"] == pytest.approx(sum(own) / len(own))
            assert sample["metrics"][-2:] == ["compute_reduction", "mean_exit_layer"]

    def test_batch_size_changes_nothing(self, model_folder: Path, manager: TaskManager) -> None:
        one, five = (
            evaluate(dynamax(model_folder, batch_size=n, **EXIT_ARGS), manager, "tiny_group", "tiny_rolling")
            for n in (1, 5)
        )
        assert one["compute"]["by_task"] == five["compute"]["by_task"]
        assert responses(one, "tiny_generate") == responses(five, "tiny_generate")

    def test_filters_and_repeats(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXIT_ARGS), manager, "tiny_filters")
        row = results["results"]["tiny_filters"]
        assert row["compute_reduction,first"] == row["compute_reduction,stripped"]
        assert results["compute"]["by_task"]["tiny_filters"]["responses"] == 16
        assert results["compute"]["by_task"]["tiny_filters"]["documents"] == 8
        assert all(len(sample["exit_layers"]) == 2 for sample in results["samples"]["tiny_filters"])

    def test_predict_only_and_chosen_samples(self, model_folder: Path, manager: TaskManager) -> None:
        lm = dynamax(model_folder, **EXIT_ARGS)
        whole = evaluate(lm, manager, "tiny_generate")["samples"]["tiny_generate"]
        predicted = evaluate(lm, manager, "tiny_generate", predict_only=True, samples={"tiny_generate": [2, 5]})
        assert [sample["doc_id"] for sample in predicted["samples"]["tiny_generate"]] == [2, 5]
        for sample in predicted["samples"]["tiny_generate"]:
            assert sample["exit_layers"] == whole[sample["doc_id"]]["exit_layers"]
        assert "compute_reduction,none" in predicted["results"]["tiny_generate"]

    def test_single_token_continuations_have_nothing_to_save(
        self, model_folder: Path, manager: TaskManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        lm = dynamax(model_folder, **EXIT_ARGS)
        pairs = [instance("loglikelihood", ("The quick", text), i, ("t", i, 1)) for i, text in enumerate("ab")]
        lm.loglikelihood(pairs, disable_tqdm=True)
        record = lm.response_ledger.find(*request_keys([("loglikelihood", pairs[0].args)]))
        assert (record.eligible_tokens, record.compute_reduction) == (0, 1.0)
        single = {
            "task": "single",
            "custom_dataset": lambda **_: manager.load(["tiny_choice"])["tasks"]["tiny_choice"].dataset,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "question",
            "doc_to_choice": ["a", "b"],
            "target_delimiter": "",
            "doc_to_target": 0,
        }
        with caplog.at_level(logging.WARNING, "dynamax_lm_eval"):
            results = evaluate(lm, manager, single)  # type: ignore[arg-type]
        assert results["results"]["single"]["compute_reduction,none"] == 1.0
        assert results["compute"]["by_task"]["single"]["tokens"]["eligible_tokens"] == 0
        assert sum("No token was eligible" in message for message in caplog.messages) == 1

    def test_choices_of_one_token_share_a_row_but_not_with_another_split(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, **EXIT_ARGS)
        rows: list[int] = []
        forward = lm.engine.forward
        lm.engine.forward = lambda batch, *rest: rows.append(len(batch.policies)) or forward(batch, *rest)  # type: ignore[assignment, func-returns-value]
        requests = [(("c", str(i)), [5, 6, 7], [8, i]) for i in (9, 10, 11)]
        requests += [(("d", "x"), [5, 6], [7, 8, 9])]  # type: ignore[list-item]
        shared = lm._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[arg-type]
        assert sum(rows) == 2
        apart = dynamax(model_folder, logits_cache=False, **EXIT_ARGS)._loglikelihood_tokens(
            requests, disable_tqdm=True
        )  # type: ignore[arg-type]
        assert [score for score, _ in shared] == pytest.approx([score for score, _ in apart], abs=1e-4)
