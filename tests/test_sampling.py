"""Samplers: what is drawn, from which seed, and that a sample does not depend on the batch."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cudalike import counting, cuda_like
from helpers import VOCAB, random_ids
from helpers_harness import EXIT_ARGS, dynamax, evaluate, generation_requests
from lm_eval.tasks import TaskManager
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dynamax_lm_eval.engine.sampling import RowToChoose, Sampler, choose, request_seed
from dynamax_lm_eval.errors import NotFiniteError
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


def processors_of(**settings: float) -> LogitsProcessorList:
    """The usual processors in transformers' order."""
    kinds = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([kind(settings[name]) for name, kind in kinds.items() if name in settings])


PENALTY = {"repetition_penalty": 1.4}
ALL = {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}


@pytest.mark.parametrize(
    "settings",
    [
        [({}, False)] * 5,
        [(PENALTY, False)] * 5,
        [(ALL, True)] * 5,
        [({}, True), (ALL, True), (PENALTY, False), ({}, False), (ALL, True)],
        [({"no_repeat_ngram_size": 2}, True), (ALL, True), (PENALTY, False), ({"top_k": 3}, True), (PENALTY, False)],
    ],
)
def test_rows_together_get_what_each_gets_alone(settings: list[tuple[dict[str, float], bool]]) -> None:
    """Step by step, bit by bit: the same tokens as the processors and the random stream give a row by itself."""
    prompts = [random_ids(length, length) for length in (1, 9, 30, 4, 17)]

    def samplers() -> list[Sampler]:
        return [Sampler(processors_of(**given), draws, seed) for seed, (given, draws) in enumerate(settings)]

    together, alone = samplers(), samplers()
    generated: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(5)
    for _ in range(12):
        logits = 3 * torch.randn(5, VOCAB, generator=generator)
        choices = choose([RowToChoose(*row) for row in zip(together, prompts, generated, strict=True)], logits)
        assert not choices.errors
        for i, sampler in enumerate(alone):
            assert choices.tokens[i] == sampler.next_token([*prompts[i], *generated[i]], logits[i])
            generated[i].append(choices.tokens[i])


def test_rows_without_a_choice_are_named_and_the_others_have_theirs() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = math.nan
    samplers = [Sampler(processors_of(top_k=5), do_sample=True, seed=seed) for seed in range(3)]
    samplers.append(Sampler(LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(VOCAB)))]), do_sample=True))
    expected = [Sampler(processors_of(top_k=5), True, seed).next_token([1], logits[seed]) for seed in (0, 2)]
    choices = choose([RowToChoose(sampler, [1], []) for sampler in samplers], logits)
    assert [choices.tokens[0], choices.tokens[2]] == expected
    assert [type(choices.errors[row]) for row in (1, 3)] == [NotFiniteError, ValueError]
    assert len(choices.errors) == 2


@pytest.mark.parametrize("settings", [{}, PENALTY, ALL])
def test_one_value_is_read_per_step_whatever_is_asked(settings: dict[str, float]) -> None:
    rows = [RowToChoose(Sampler(processors_of(**settings), settings is ALL, i), [1, 2, 3], [4]) for i in range(16)]
    logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = choose([RowToChoose(replace(row.sampler), row.prompt, row.generated) for row in rows], logits).tokens
    with cuda_like():
        on_cuda = logits.to("cuda:0")
        with counting() as counts:
            assert choose(rows, on_cuda).tokens == expected
    assert counts.read_backs.total() == 1
    assert counts.blocking_uploads.total() == 0
