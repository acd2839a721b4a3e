"""The model inside the harness: the answers of ``--model hf`` with exits off, and what it refuses."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from helpers import LAYERS, save_model, tiny_model, train_tokenizer
from helpers_harness import EXIT_ARGS, dynamax, evaluate, generation_requests, instance, numbers, responses
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dynamax_lm_eval.engine import prefixes
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness import rows
from dynamax_lm_eval.lm import DynamaxLM


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
        rolling = [instance("loglikelihood_rolling", (text,), 0, ("t", 0, 1))]
        pair = [instance("loglikelihood", (text, " Paris is"), 0, ("t", 0, 1))]
        theirs = HFLM(str(model_folder), device="cpu", batch_size=1, max_length=24)
        ours = dynamax(model_folder, max_length=24)
        assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)
        assert numbers(ours.loglikelihood_rolling(rolling)) == pytest.approx(
            numbers(theirs.loglikelihood_rolling(rolling)), abs=1e-3
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
        pairs = [instance("loglikelihood", (text, " Paris is"), i, ("t", i, 1)) for i, text in enumerate(texts)]
        rolling = [instance("loglikelihood_rolling", (text,), i, ("t", i, 1)) for i, text in enumerate(texts)]
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
                instances = [instance(kind, args, 0) for args in arguments]
                mixed = [*bare[:2], instance(kind, arguments[2], 2, ("t", 5, 1)), *instances[3:]]
                expected = getattr(hf, kind)(instances, disable_tqdm=True)
                for requests in (bare, instances, mixed):
                    found = getattr(lm, kind)(requests, disable_tqdm=True)
                    if kind == "loglikelihood":
                        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
                        found, expected_values = [score for score, _ in found], [score for score, _ in expected]
                    elif kind == "loglikelihood_rolling":
                        found, expected_values = numbers(found), numbers(expected)
                    else:
                        expected_values = expected
                    assert found == (expected if kind == "generate_until" else pytest.approx(expected_values, abs=1e-4))
                assert getattr(lm, kind)([], disable_tqdm=True) == []

    def test_calls_after_one_that_failed(self, model_folder: Path) -> None:
        lm = dynamax(model_folder, logits_cache=False, **EXIT_ARGS)
        pairs = [instance("loglikelihood", (text, " is"), i, ("t", i, 1)) for i, text in enumerate("abc")]
        generations = generation_requests(["The quick", "Paris"])
        expected = lm.loglikelihood(pairs), lm.generate_until(generations), lm.loglikelihood(pairs[:1])
        lengths = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            lengths.append(len(args[0]))
            if len(lengths) > 2:
                raise KeyboardInterrupt
            return advance(*args, **kwargs)

        advance, lm.engine.advance = lm.engine.advance, fail  # type: ignore[method-assign]
        for call in (lambda: lm.generate_until(generations), lambda: lm.loglikelihood(pairs)):
            with pytest.raises(KeyboardInterrupt):
                call()
        lm.engine.advance = advance  # type: ignore[method-assign]
        with pytest.raises(UserError, match="empty continuation"):
            lm.loglikelihood([*pairs, SimpleNamespace(args=("a", ""))])
        assert lm._loglikelihood_tokens([(("a", " is"), [5], [6])], disable_tqdm=True)
        assert (lm.loglikelihood(pairs), lm.generate_until(generations), lm.loglikelihood(pairs[:1])) == expected

    @pytest.mark.parametrize("confidence", ["softmax", "entropy", "state"])
    def test_confidences_that_are_not_finite_name_the_document(
        self, model_folder: Path, confidence: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefixes, "MIN_SAVED_TOKENS", 1)
        lm = dynamax(model_folder, threshold=0.9, confidence=confidence, exit_layers=[3], exit_scope="all")
        texts = ["The quick", "on the river", "on the river Seine"]  # the last two share what is broken
        poisoned = set(lm.tokenizer.encode(texts[1])) - set(lm.tokenizer.encode("The quick Paris is"))
        lm.model.get_input_embeddings().weight.data[list(poisoned)] = float("nan")
        pairs = [instance("loglikelihood", (text, " Paris is"), i, ("t", i, 1)) for i, text in enumerate(texts)]
        message = f"computed {confidence} confidences at exit layer 3 that are not finite for document [12] of task"
        for method, requests in (("generate_until", generation_requests(texts)), ("loglikelihood", pairs)):
            with pytest.raises(UserError, match=message):
                getattr(lm, method)(requests, disable_tqdm=True)

    def test_names_the_result_folder_after_the_backbone(self, model_folder: Path) -> None:
        args = {"backbone": str(model_folder), "threshold": 1}
        lm = get_model("dynamax").create_from_arg_obj(args, {"device": "cpu", "batch_size": 1})
        assert isinstance(lm, DynamaxLM)
        assert args == {"pretrained": str(model_folder), "threshold": 1}

    @pytest.mark.parametrize("name", ["backbone", "pretrained"])
    def test_the_harness_shows_arguments_as_they_were_typed(
        self, model_folder: Path, manager: TaskManager, name: str
    ) -> None:
        """It prints the very dictionary above the results."""
        args = {"threshold": 1, name: str(model_folder)}
        results = lm_eval.simple_evaluate(
            "dynamax",
            model_args=args,
            device="cpu",
            batch_size=1,
            tasks=["tiny_generate"],
            task_manager=manager,
            limit=1,
            bootstrap_iters=0,
        )
        assert args == {name: str(model_folder), "threshold": 1}
        assert results is not None and results["config"]["model_args"]["backbone"] == str(model_folder)

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
        monkeypatch.setattr(rows, "_free_memory", lambda _: 3 * per_token * 100 * 7)
        assert rows.batch_rows(lm, 100) == 7
        assert rows.batch_rows(lm, 1) == 32
        assert rows.batch_rows(lm, 10**6) == 1
        lm.use_policy(replace(lm.args, prefix_caching=False))
        assert rows.batch_rows(lm, 100) == 10

    def test_rows_in_flight_follow_exits_and_memory(self, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = dynamax(model_folder, batch_size=4, **EXIT_ARGS)
        exiting, full = lm.policy, ExitPolicy(LAYERS)
        assert rows.rows_in_flight(lm, [full, exiting], 4, 100) == 16
        assert rows.rows_in_flight(lm, [full], 4, 100) == 4
        assert rows.rows_in_flight(lm, [exiting], 1, 100) == 1
        monkeypatch.setattr(rows, "_free_memory", lambda _: 3 * LAYERS * 2 * 2 * 8 * 4 * 100 * 6)
        assert rows.rows_in_flight(lm, [exiting], 4, 100) == 6
        assert rows.rows_in_flight(lm, [exiting], 4, 10**6) == 4
        lm.use_policy(replace(lm.args, rows_in_flight=50))
        assert rows.rows_in_flight(lm, [exiting], 4, 100) == 50
        lm.use_policy(replace(lm.args, rebatch=False, rows_in_flight=None))
        assert rows.rows_in_flight(lm, [exiting], 4, 100) == 4

    def test_rows_wait_on_blocks_that_are_replayed(self, tmp_path: Path) -> None:
        lm = dynamax(save_model("gpt_neox", tmp_path), batch_size=2, rows_in_flight=6, **EXIT_ARGS)
        assert lm.engine.backbone.rung == "flat"
        assert rows.rows_in_flight(lm, [lm.policy], 2, 100) == 6

    def test_answers_do_not_depend_on_rows_that_wait(self, model_folder: Path) -> None:
        requests = generation_requests(["The quick", "A lazy", "The", "brown fox jumps"])
        found = [
            dynamax(model_folder, **EXIT_ARGS, **changes).generate_until(requests, disable_tqdm=True)
            for changes in ({"batch_size": 1}, {"batch_size": 2}, {"batch_size": 2, "rebatch": False})
        ]
        assert found[0] == found[1] == found[2]

    def test_repetition_penalty_argument(self, model_folder: Path) -> None:
        by_argument = dynamax(model_folder, repetition_penalty=1.7)
        by_task = generation_requests(["The quick"], repetition_penalty=1.7)
        plain = generation_requests(["The quick"])
        expected = dynamax(model_folder).generate_until(by_task, disable_tqdm=True)
        assert by_argument.generate_until(plain, disable_tqdm=True) == expected
