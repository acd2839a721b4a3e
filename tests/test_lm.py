"""The model inside the harness: the answers of ``--model hf`` with exits off, and compute in the results."""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from conftest import LAYERS, tiny_model, train_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, processors

from dynamax_lm_eval.compute.accounting import ComputeRecord
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.ledger import request_keys
from dynamax_lm_eval.harness.requests import PreparedGeneration
from dynamax_lm_eval.lm import DynamaxLM

TASKS = Path(__file__).parent / "tasks"
EXITS = {"threshold": 0.1, "exit_layers": [2, 4]}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def dynamax(folder: Path, **args: Any) -> DynamaxLM:
    return DynamaxLM(str(folder), **{"threshold": 1, "batch_size": 3, "device": "cpu", **args})


def evaluate(lm: Any, manager: TaskManager, *tasks: str, **options: Any) -> Any:
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)


def responses(results: Any, task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def add_post_processor(folder: Path) -> None:
    """From now on the tokenizer in a model's folder puts a BOS before every text; its class and length stay."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def generation_requests(contexts: list[str], **kwargs: Any) -> list[Instance]:
    options = {"until": ["\n"], "max_gen_toks": 8, **kwargs}
    return [Instance("generate_until", {}, (context, options), i, ("t", i, 1)) for i, context in enumerate(contexts)]


class TestParity:
    """Exits off equals ``--model hf`` at batch 1."""

    @pytest.fixture(scope="class", params=["model_folder", "mamba_folder"])
    def folder(self, request: pytest.FixtureRequest) -> Path:
        found: Path = request.getfixturevalue(request.param)
        return found

    @pytest.fixture(scope="class")
    def hf(self, folder: Path, manager: TaskManager) -> Any:
        lm = HFLM(str(folder), device="cpu", batch_size=1)
        return evaluate(lm, manager, "tiny_generate", "tiny_choice", "tiny_rolling")

    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_answers(self, folder: Path, manager: TaskManager, hf: Any, batch_size: int) -> None:
        ours = evaluate(
            dynamax(folder, batch_size=batch_size),
            manager,
            "tiny_generate",
            "tiny_choice",
            "tiny_rolling",
        )
        assert responses(ours, "tiny_generate") == responses(hf, "tiny_generate")
        for mine, theirs in zip(responses(ours, "tiny_choice"), responses(hf, "tiny_choice"), strict=True):
            for ((score, greedy),), ((expected, expected_greedy),) in zip(mine, theirs, strict=True):
                assert score == pytest.approx(expected, abs=1e-4)
                assert greedy == expected_greedy
        for mine, theirs in zip(responses(ours, "tiny_rolling"), responses(hf, "tiny_rolling"), strict=True):
            assert mine[0][0] == pytest.approx(theirs[0][0], abs=1e-3)
        for task in ("tiny_generate", "tiny_choice", "tiny_rolling"):
            row = ours["results"][task]
            numbers = {key: value for key, value in hf["results"][task].items() if isinstance(value, (int, float))}
            assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
            assert row["compute_reduction,none"] == 1.0

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"repetition_penalty": 1.5},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 4, "bad_words_ids": [[17]]},
            {"until": []},
            {"max_gen_toks": 1},
        ],
    )
    def test_generation_arguments(self, model_folder: Path, kwargs: dict[str, Any]) -> None:
        requests = generation_requests(["Question: who wrote Hamlet?", "The quick", "Paris is"], **kwargs)
        expected = HFLM(str(model_folder), device="cpu", batch_size=1).generate_until(requests, disable_tqdm=True)
        assert dynamax(model_folder).generate_until(requests, disable_tqdm=True) == expected

    def test_own_generation_config_of_the_model_counts(self, model_folder: Path) -> None:
        lm = dynamax(model_folder)
        plain = lm.generate_until(generation_requests(["The quick"]), disable_tqdm=True)
        lm.model.generation_config.repetition_penalty = 3.0
        lm.model.generation_config.eos_token_id = [2, 40]
        reference = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=1)
        requests = generation_requests(["The quick", "nobody knows where"])
        theirs = reference.generate_until(requests, disable_tqdm=True)
        assert lm.generate_until(requests, disable_tqdm=True) == theirs
        assert theirs[0] != plain[0]

    def test_left_truncation_and_windows(self, model_folder: Path) -> None:
        text = "A stitch in time saves nine, and nobody knows where the time goes. " * 3
        requests = generation_requests([text, "The quick"])
        rolling = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))]
        pair = [Instance("loglikelihood", {}, (text, " Paris is"), 0, ("t", 0, 1))]
        theirs = HFLM(str(model_folder), device="cpu", batch_size=1, max_length=24)
        ours = dynamax(model_folder, max_length=24)
        assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)
        assert ours.loglikelihood_rolling(rolling)[0] == pytest.approx(
            theirs.loglikelihood_rolling(rolling)[0], abs=1e-3
        )
        assert ours.loglikelihood(pair)[0][0] == pytest.approx(theirs.loglikelihood(pair)[0][0], abs=1e-4)

    def test_think_end_token(self, model_folder: Path) -> None:
        for think_end in ("e", 40):
            requests = generation_requests(["The quick", "nobody knows"], until=[])
            expected = HFLM(str(model_folder), device="cpu", batch_size=1, think_end_token=think_end).generate_until(
                requests, disable_tqdm=True
            )
            assert (
                dynamax(model_folder, think_end_token=think_end).generate_until(requests, disable_tqdm=True) == expected
            )


class TestCompute:
    def test_every_place_of_the_results(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_group", "tiny_rolling")
        for task in ("tiny_generate", "tiny_choice", "tiny_rolling", "tiny_group"):
            row = results["results"][task]
            assert row["compute_reduction,none"] > 0
            assert isinstance(row["compute_reduction_stderr,none"], float)
            assert results["higher_is_better"][task]["compute_reduction"] is True
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
            assert compute["overall"]["macs"][name] == sum(t["macs"][name] for t in compute["by_task"].values())
        assert set(compute["overall"]["seconds"]) == {
            "generate_until",
            "loglikelihood",
            "loglikelihood_rolling",
        }
        json.dumps(results["compute"])
        from lm_eval.utils import make_table

        assert "compute_reduction" in make_table(results)
        assert results["config"]["model_name"] == str(model_folder)
        section = results["config"]["dynamax"]
        assert section["policy"]["thresholds"] == [0.1, 0.1]
        assert (section["policy"]["confidence"], section["confidence_chosen_by"]) == ("softmax", "default")

    def test_totals_equal_the_sum_of_samples(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_generate")
        samples = results["samples"]["tiny_generate"]
        breakdown = results["compute"]["by_task"]["tiny_generate"]
        layers = [layer for sample in samples for response in sample["exit_layers"] for layer in response]
        assert len(layers) == breakdown["tokens"]["eligible_tokens"]
        assert sum(layers) / len(layers) == pytest.approx(breakdown["mean_exit_layer"])
        assert {str(layer): layers.count(layer) for layer in sorted(set(layers))} == breakdown["exit_histogram"]
        assert set(layers) >= {2, LAYERS}
        assert samples[0]["compute_reduction"] == samples[-1]["compute_reduction"], "the same document twice"
        assert breakdown["documents"] == len(samples) == 8

    def test_batch_size_changes_nothing(self, model_folder: Path, manager: TaskManager) -> None:
        one, five = (
            evaluate(dynamax(model_folder, batch_size=n, **EXITS), manager, "tiny_group", "tiny_rolling")
            for n in (1, 5)
        )
        assert one["compute"]["by_task"] == five["compute"]["by_task"]
        assert responses(one, "tiny_generate") == responses(five, "tiny_generate")

    def test_filters_and_repeats(self, model_folder: Path, manager: TaskManager) -> None:
        results = evaluate(dynamax(model_folder, **EXITS), manager, "tiny_filters")
        row = results["results"]["tiny_filters"]
        assert row["compute_reduction,first"] == row["compute_reduction,stripped"]
        assert results["compute"]["by_task"]["tiny_filters"]["responses"] == 16
        assert results["compute"]["by_task"]["tiny_filters"]["documents"] == 8
        assert all(len(sample["exit_layers"]) == 2 for sample in results["samples"]["tiny_filters"])

    def test_predict_only_and_chosen_samples(self, model_folder: Path, manager: TaskManager) -> None:
        lm = dynamax(model_folder, **EXITS)
        whole = evaluate(lm, manager, "tiny_generate")["samples"]["tiny_generate"]
        predicted = evaluate(lm, manager, "tiny_generate", predict_only=True, samples={"tiny_generate": [2, 5]})
        assert [sample["doc_id"] for sample in predicted["samples"]["tiny_generate"]] == [2, 5]
        for sample in predicted["samples"]["tiny_generate"]:
            assert sample["exit_layers"] == whole[sample["doc_id"]]["exit_layers"]
        assert "compute_reduction,none" in predicted["results"]["tiny_generate"]

    def test_single_token_continuations_have_nothing_to_save(
        self, model_folder: Path, manager: TaskManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        lm = dynamax(model_folder, **EXITS)
        pairs = [Instance("loglikelihood", {}, ("The quick", text), i, ("t", i, 1)) for i, text in enumerate("ab")]
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
        lm = dynamax(model_folder, **EXITS)
        rows: list[int] = []
        forward = lm.engine.forward
        lm.engine.forward = lambda batch, *rest: rows.append(len(batch.policies)) or forward(batch, *rest)  # type: ignore[assignment, func-returns-value]
        requests = [(("c", str(i)), [5, 6, 7], [8, i]) for i in (9, 10, 11)]
        requests += [(("d", "x"), [5, 6], [7, 8, 9])]  # type: ignore[list-item]
        shared = lm._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[arg-type]
        assert sum(rows) == 2
        apart = dynamax(model_folder, logits_cache=False, **EXITS)._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[arg-type]
        assert [score for score, _ in shared] == pytest.approx([score for score, _ in apart], abs=1e-4)


class TestCache:
    def run(self, folder: Path, manager: TaskManager, cache: Path, **args: Any) -> Any:
        return evaluate(dynamax(folder, **args), manager, "tiny_group", "tiny_rolling", use_cache=str(cache))

    def test_a_cached_run_reports_the_same(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXITS)
        monkeypatch.setattr(
            "dynamax_lm_eval.harness.responder.generate", lambda *_: pytest.fail("not answered from the cache")
        )
        monkeypatch.setattr(
            "dynamax_lm_eval.harness.responder.score", lambda *_: pytest.fail("not answered from the cache")
        )
        second = self.run(model_folder, manager, tmp_path / "c", **EXITS)
        assert second["compute"]["by_task"] == first["compute"]["by_task"]
        assert second["results"] == first["results"]

    def test_another_policy_or_a_foreign_file_is_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        self.run(model_folder, manager, tmp_path / "c", **EXITS)
        with pytest.raises(UserError, match="differs in policy"):
            self.run(model_folder, manager, tmp_path / "c", **{**EXITS, "threshold": 0.2})
        hf = HFLM(str(model_folder), device="cpu", batch_size=1)
        evaluate(hf, manager, "tiny_generate", use_cache=str(tmp_path / "foreign"))
        with pytest.raises(UserError, match="no identity record"):
            self.run(model_folder, manager, tmp_path / "foreign", **EXITS)

    def test_another_configuration_or_way_of_counting_is_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(model_folder, manager, tmp_path / "c", **EXITS)
        edited = shutil.copytree(model_folder, tmp_path / model_folder.name)
        config = json.loads((edited / "config.json").read_text())
        config["rms_norm_eps"] = 1e-3
        (edited / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="differs in config"):
            self.run(edited, manager, tmp_path / "c", **EXITS)
        monkeypatch.setattr("dynamax_lm_eval.harness.cache.ACCOUNTING", "other")
        with pytest.raises(UserError, match="differs in accounting"):
            self.run(model_folder, manager, tmp_path / "c", **EXITS)

    def test_a_changed_tokenizer_is_refused_and_a_moved_one_is_not(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXITS)
        moved = shutil.copytree(model_folder, tmp_path / "moved" / "with another name")
        assert self.run(moved, manager, tmp_path / "c", **EXITS)["results"] == first["results"]
        add_post_processor(moved)
        with pytest.raises(UserError, match="differs in tokenizer"):
            self.run(moved, manager, tmp_path / "c", **EXITS)

    def test_another_release_of_transformers_is_not_another_run(
        self, model_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity = dynamax(model_folder, **EXITS).identity()
        monkeypatch.setattr("transformers.generation.configuration_utils.__version__", "9.9.9")
        monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9.9")
        lm = dynamax(model_folder, **EXITS)
        assert lm.model.generation_config.to_diff_dict()["transformers_version"] == "9.9.9"
        assert lm.identity() == identity

    def test_one_changed_weight_is_refused(self, model_folder: Path, manager: TaskManager, tmp_path: Path) -> None:
        lm = dynamax(model_folder, **EXITS)
        evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))
        lm.model.get_input_embeddings().weight.data[7, 3] += 1
        with pytest.raises(UserError, match="differs in weights"):
            evaluate(lm, manager, "tiny_generate", use_cache=str(tmp_path / "c"))

    def test_responses_that_another_model_added_are_refused(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        cache = str(tmp_path / "c")
        evaluate(dynamax(model_folder, **EXITS), manager, "tiny_generate", use_cache=cache)
        hf = HFLM(str(model_folder), device="cpu", batch_size=1)
        evaluate(hf, manager, "tiny_rolling", use_cache=cache)
        with pytest.raises(UserError, match="7 responses that another model wrote"):
            evaluate(dynamax(model_folder, **EXITS), manager, "tiny_generate", use_cache=cache)

    def test_another_policy_leaves_the_cache_of_the_first_alone(
        self, model_folder: Path, manager: TaskManager, tmp_path: Path
    ) -> None:
        lm = dynamax(model_folder, **EXITS)
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
        monkeypatch.setattr("dynamax_lm_eval.engine.prefixes.MIN_SAVED_TOKENS", 4)
        tasks = ("tiny_group", "tiny_rolling")
        shared = evaluate(dynamax(model_folder, **EXITS), manager, *tasks)["compute"]
        apart = evaluate(dynamax(model_folder, prefix_caching=False, logits_cache=False, **EXITS), manager, *tasks)
        assert shared["by_task"] == apart["compute"]["by_task"]
        overall = apart["compute"]["overall"]
        assert overall["physical"] == {"fed_tokens": overall["tokens"]["fed"], "macs": overall["macs"]["total"]}
        assert 0 < shared["overall"]["physical"]["fed_tokens"] < overall["tokens"]["fed"]
        assert 0 < shared["overall"]["physical"]["macs"] < overall["macs"]["total"]

    def test_speed_counts_only_what_ran(self, model_folder: Path, manager: TaskManager, tmp_path: Path) -> None:
        first = self.run(model_folder, manager, tmp_path / "c", **EXITS)
        second = self.run(model_folder, manager, tmp_path / "c", **EXITS)
        assert first["compute"]["overall"]["fed_tokens_in_seconds"] > 0
        assert second["compute"]["overall"]["fed_tokens_in_seconds"] == 0


class TestSampling:
    def test_samples_do_not_depend_on_the_batch(self, model_folder: Path) -> None:
        requests = generation_requests(["The quick", "Paris is", "nobody"], do_sample=True, temperature=0.9, top_k=20)
        torch.manual_seed(7)
        one = dynamax(model_folder, batch_size=1).generate_until(requests, disable_tqdm=True)
        torch.manual_seed(7)
        three = dynamax(model_folder, batch_size=3).generate_until(requests[::-1], disable_tqdm=True)
        assert one == three[::-1]
        torch.manual_seed(8)
        assert dynamax(model_folder).generate_until(requests, disable_tqdm=True) != one

    def test_records_belong_to_their_samples(self, model_folder: Path, manager: TaskManager) -> None:
        """Repeats and equal documents differ in length; each record must be that of its own text."""
        torch.manual_seed(3)
        lm = dynamax(model_folder, batch_size=4, **EXITS)
        lengths: dict[str, set[int]] = defaultdict(set)
        text_of = PreparedGeneration.text

        def remember(job: PreparedGeneration, tokens: list[int]) -> str:
            text = text_of(job, tokens)
            lengths[text].add(len(tokens))
            return text

        kwargs = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 20}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreparedGeneration, "text", remember)
            results = evaluate(lm, manager, "tiny_filters", gen_kwargs=kwargs)
        checked = 0
        for sample in results["samples"]["tiny_filters"]:
            texts = sample["resps"][0]
            for text, layers in zip(texts, sample["exit_layers"], strict=True):
                assert len(layers) + 1 in lengths[text]
                checked += 1
        assert checked == 32
        assert len(lengths) > 10

    def test_repeats_differ(self, model_folder: Path) -> None:
        request = generation_requests(["The quick"], do_sample=True, temperature=1.0)[0]
        torch.manual_seed(7)
        texts = dynamax(model_folder).generate_until([request] * 4, disable_tqdm=True)
        assert len(set(texts)) > 1


class TestArguments:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"num_beams": 3}, "beam_search is not supported"),
            (
                {"num_return_sequences": 2, "do_sample": True, "temperature": 1.0},
                "num_return_sequences must be 1",
            ),
            ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported"),
            ({"no_such_thing": 1}, "unknown generation argument"),
            ({"do_sample": True}, "needs a temperature"),
            ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
            ({"max_gen_toks": 256}, "less than the model's max_length=256"),
        ],
    )
    def test_generation_arguments_that_cannot_be_honoured(
        self, model_folder: Path, kwargs: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            dynamax(model_folder).generate_until(generation_requests(["The quick"], **kwargs), disable_tqdm=True)

    def test_logits_that_are_not_finite_name_the_document(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, logits_cache=False)
        texts = ["The quick", "on the river"]
        poisoned = set(lm.tokenizer.encode(texts[1])) - set(lm.tokenizer.encode("The quick Paris is"))
        lm.model.get_input_embeddings().weight.data[list(poisoned)] = float("nan")
        pairs = [Instance("loglikelihood", {}, (text, " Paris is"), i, ("t", i, 1)) for i, text in enumerate(texts)]
        rolling = [Instance("loglikelihood_rolling", {}, (text,), i, ("t", i, 1)) for i, text in enumerate(texts)]
        for method, requests in (
            ("generate_until", generation_requests(texts)),
            ("loglikelihood", pairs),
            ("loglikelihood_rolling", rolling),
        ):
            with pytest.raises(UserError, match="not finite for document 1 of task 't'"):
                getattr(lm, method)(requests, disable_tqdm=True)

    def test_requests_made_by_hand_are_answered(self, model_folder: Path) -> None:
        """They say nothing of tasks and documents, and may be no instances of the harness; HFLM asks for ``args``."""
        contexts = ["The quick", "Paris is", "", "nobody knows where"]
        asked = {
            "loglikelihood": [(context, " brown fox") for context in contexts],
            "loglikelihood_rolling": [(context,) for context in contexts],
            "generate_until": [(context or "a", {"until": ["\n"], "max_gen_toks": 5}) for context in contexts],
        }
        hf = HFLM(str(model_folder), device="cpu", batch_size=1)
        for lm in (dynamax(model_folder), dynamax(model_folder, batch_size=1, prefix_caching=False)):
            for kind, arguments in asked.items():
                bare = [SimpleNamespace(args=args) for args in arguments]
                instances = [Instance(kind, {}, args, 0) for args in arguments]  # type: ignore[arg-type]
                mixed = [*bare[:2], Instance(kind, {}, arguments[2], 2, ("t", 5, 1)), *instances[3:]]  # type: ignore[arg-type]
                expected = getattr(hf, kind)(instances, disable_tqdm=True)
                for requests in (bare, instances, mixed):
                    found = getattr(lm, kind)(requests, disable_tqdm=True)
                    if kind == "loglikelihood":
                        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
                        found, expected_values = [score for score, _ in found], [score for score, _ in expected]
                    else:
                        expected_values = expected
                    assert found == (expected if kind == "generate_until" else pytest.approx(expected_values, abs=1e-4))
                assert getattr(lm, kind)([], disable_tqdm=True) == []

    def test_calls_after_one_that_failed(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, logits_cache=False, **EXITS)
        pairs = [Instance("loglikelihood", {}, (text, " is"), i, ("t", i, 1)) for i, text in enumerate("abc")]
        generations = generation_requests(["The quick", "Paris"])
        expected = lm.loglikelihood(pairs), lm.generate_until(generations), lm.loglikelihood(pairs[:1])
        lengths = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            lengths.append(len(args[0]))
            if len(lengths) > 2:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        forward, lm.engine.forward = lm.engine.forward, fail  # type: ignore[method-assign]
        for call in (lambda: lm.generate_until(generations), lambda: lm.loglikelihood(pairs)):
            with pytest.raises(KeyboardInterrupt):
                call()
        lm.engine.forward = forward  # type: ignore[method-assign]
        with pytest.raises(UserError, match="empty continuation"):
            lm.loglikelihood([*pairs, SimpleNamespace(args=("a", ""))])
        assert lm._loglikelihood_tokens([(("a", " is"), [5], [6])], disable_tqdm=True)
        assert (lm.loglikelihood(pairs), lm.generate_until(generations), lm.loglikelihood(pairs[:1])) == expected

    @pytest.mark.parametrize("confidence", ["softmax", "entropy", "state"])
    def test_confidences_that_are_not_finite_name_the_document(
        self, model_folder: Path, confidence: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dynamax_lm_eval.engine.prefixes.MIN_SAVED_TOKENS", 1)
        lm = dynamax(model_folder, threshold=0.9, confidence=confidence, exit_layers=[3], exit_scope="all")
        texts = ["The quick", "on the river", "on the river Seine"]  # the last two share what is broken
        poisoned = set(lm.tokenizer.encode(texts[1])) - set(lm.tokenizer.encode("The quick Paris is"))
        lm.model.get_input_embeddings().weight.data[list(poisoned)] = float("nan")
        pairs = [Instance("loglikelihood", {}, (text, " Paris is"), i, ("t", i, 1)) for i, text in enumerate(texts)]
        message = f"computed {confidence} confidences at exit layer 3 that are not finite for document [12] of task"
        for method, requests in (("generate_until", generation_requests(texts)), ("loglikelihood", pairs)):
            with pytest.raises(UserError, match=message):
                getattr(lm, method)(requests, disable_tqdm=True)

    def test_names_the_result_folder_after_the_backbone(self, model_folder: Path) -> None:
        args = {"backbone": str(model_folder), "threshold": 1}
        lm = get_model("dynamax").create_from_arg_obj(args, {"device": "cpu", "batch_size": 1})
        assert isinstance(lm, DynamaxLM)
        assert args == {"pretrained": str(model_folder), "threshold": 1}

    def test_a_loaded_model_can_be_given(self) -> None:
        lm = DynamaxLM(tiny_model("qwen3"), tokenizer=train_tokenizer(), threshold=1, batch_size=2)
        assert lm.generate_until(generation_requests(["The quick"]), disable_tqdm=True)

    def test_softmax_is_announced_where_nothing_was_named(
        self, model_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "dynamax_lm_eval"):
            dynamax(model_folder, threshold=0.5)
            dynamax(model_folder, threshold=0.5, confidence="softmax")
            dynamax(model_folder, threshold=1)
        assert sum("uses confidence=softmax" in message for message in caplog.messages) == 1

    def test_default_exits_inside_pruned_blocks_are_left_out_and_noted(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, threshold=0.5, prune_layers=2, confidence="state")
        assert lm.policy.exit_layers == (3,)
        assert "left out" in lm.get_model_info()["dynamax"]["policy_note"]
        with pytest.raises(UserError, match=r"exit_layers \[4\]"):
            dynamax(model_folder, threshold=0.5, prune_layers=2, exit_layers=[3, 4])

    def test_automatic_batch_size_follows_memory(self, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = dynamax(model_folder, batch_size="auto", max_batch_size=32)
        per_token = LAYERS * 2 * 2 * 8 * 4
        monkeypatch.setattr("dynamax_lm_eval.harness.responder._free_memory", lambda _: 3 * per_token * 100 * 7)
        assert lm.responder._rows_in_flight(100) == 7
        assert lm.responder._rows_in_flight(1) == 32
        assert lm.responder._rows_in_flight(10**6) == 1
        lm.use_policy(replace(lm.args, prefix_caching=False))
        assert lm.responder._rows_in_flight(100) == 10

    def test_repetition_penalty_argument(self, model_folder: Path) -> None:
        by_argument = dynamax(model_folder, repetition_penalty=1.7)
        by_task = generation_requests(["The quick"], repetition_penalty=1.7)
        plain = generation_requests(["The quick"])
        expected = dynamax(model_folder).generate_until(by_task, disable_tqdm=True)
        assert by_argument.generate_until(plain, disable_tqdm=True) == expected


def test_records_are_plain_data() -> None:
    assert ComputeRecord.from_json(json.loads(json.dumps(ComputeRecord(exit_layers=[[1]]).to_json()))).exit_layers == [
        [1]
    ]
