"""Samplers: what is drawn, from which seed, and that a sample does not depend on the batch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers_harness import EXIT_ARGS, dynamax, evaluate, generation_requests
from lm_eval.tasks import TaskManager
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from dynamax_lm_eval.engine.sampling import Sampler, request_seed
from dynamax_lm_eval.harness.requests import PreparedGeneration


def test_sampling_follows_the_distribution_and_reproduces() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    sampler = Sampler(do_sample=True, seed=3)
    draws = [sampler.next_token([1], probabilities.log()) for _ in range(4000)]
    counts = torch.bincount(torch.tensor(draws), minlength=6) / len(draws)
    assert counts[probabilities == 0].sum() == 0
    assert torch.allclose(counts, probabilities, atol=0.03)
    again = Sampler(do_sample=True, seed=3)
    assert [again.next_token([1], probabilities.log()) for _ in range(50)] == draws[:50]


def test_request_seeds_differ_by_run_request_and_repeat() -> None:
    seeds = {request_seed(*key) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(seeds) == 4
    assert request_seed(0, "a", 0) == request_seed(0, "a", 0)


def test_processors_see_prompt_and_generated_tokens() -> None:
    sampler = Sampler(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(100.0)]))
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])
    assert not sampler.is_plain_greedy
    assert sampler.next_token([1, 2], logits) == 3


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
        lm = dynamax(model_folder, batch_size=4, **EXIT_ARGS)
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
