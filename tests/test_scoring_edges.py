"""Contexts and continuations at the edges: the scores of ``--model hf``, or one line that names document and cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import TEXT, train_tokenizer
from helpers_harness import dynamax, generation_requests, instance, numbers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.lm import DynamaxLM


def pairs(*texts: tuple[str, str]) -> list[Instance]:
    return [instance("loglikelihood", text, i, ("t", i, 1)) for i, text in enumerate(texts)]


def scores(lm: Any, *texts: tuple[str, str]) -> list[float]:
    return [score for score, _ in lm.loglikelihood(pairs(*texts), disable_tqdm=True)]


def spelling_tokenizer(*joined: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of characters, with tokens of two of them."""
    from tokenizers import Tokenizer, decoders, models

    characters = sorted({*TEXT, "_"})
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *characters, *joined]
    merges = [(text[0], text[1]) for text in joined]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> DynamaxLM:
    return dynamax(model_folder)


@pytest.fixture(scope="module")
def hf(model_folder: Path) -> Any:
    return HFLM(str(model_folder), device="cpu", batch_size=1)


class TestContextsWithoutTokens:
    def test_spaces_belong_to_the_continuation(self, plain: DynamaxLM, hf: Any) -> None:
        """Beside others in a pass; hf scores the same pair with an empty context."""
        found = scores(plain, ("The quick", " fox"), (" ", "Paris"), ("\n ", "Paris"), ("", " Paris"))
        expected = scores(hf, ("The quick", " fox"), ("", " Paris"), ("", "\n Paris"), ("", " Paris"))
        assert found == pytest.approx(expected, abs=1e-4)

    def test_a_trailing_space_alone_is_scored_as_hf_does(self, plain: DynamaxLM, hf: Any) -> None:
        assert scores(plain, ("The ", "")) == pytest.approx(scores(hf, ("The ", "")), abs=1e-4)

    def test_a_tokenizer_that_begins_every_text_needs_nothing(self, model_folder: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer = train_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        ours = dynamax(model_folder, tokenizer=tokenizer)
        theirs = HFLM(str(model_folder), tokenizer=tokenizer, device="cpu", batch_size=1)
        texts = ((" ", "Paris"), ("", "Paris"), ("The quick", " fox"))
        assert scores(ours, *texts) == pytest.approx(scores(theirs, *texts), abs=1e-4)

    def test_a_continuation_that_begins_with_the_prefix(self, plain: DynamaxLM, hf: Any) -> None:
        assert scores(plain, ("", "<s>Paris")) == pytest.approx(scores(hf, ("", "<s>Paris")), abs=1e-4)

    def test_longer_than_the_model(self, model_folder: Path) -> None:
        texts = (("The quick brown fox jumps over", " Paris"), ("", "Paris is"))
        theirs = HFLM(str(model_folder), device="cpu", batch_size=1, max_length=8)
        assert scores(dynamax(model_folder, max_length=8), *texts) == pytest.approx(scores(theirs, *texts), abs=1e-4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("The quick", ""), "cannot score an empty continuation; check the task's doc_to_choice"),
        (("", ""), "cannot score an empty continuation"),
        ((" ", ""), "cannot score an empty continuation"),
        (("", "<s>"), r"the continuation '<s>' after an empty context: it is the token.*prefix_token_id="),
        (("The quick", " fox" * 99), r"longer than max_length=256"),
        (("The Zanzibar", " fox"), r"only 97 embeddings"),
    ],
)
def test_documents_that_cannot_be_scored_are_named(model_folder: Path, pair: tuple[str, str], message: str) -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["Zanzibar"])
    lm = dynamax(model_folder, tokenizer=tokenizer)
    with pytest.raises(UserError, match=f"document 1 of task 't': .*{message}") as caught:
        scores(lm, ("The quick", " fox"), pair)
    assert "\n" not in str(caught.value)


def test_other_documents_that_cannot_be_answered_are_named(plain: DynamaxLM) -> None:
    for contexts, options, message in (
        (["The quick", ""], {}, "document 1 of task 't': cannot generate after an empty prompt"),
        (["The quick"], {"max_gen_toks": 256}, "document 0 of task 't': max_gen_toks=256"),
    ):
        with pytest.raises(UserError, match=message):
            plain.generate_until(generation_requests(contexts, **options), disable_tqdm=True)
    with pytest.raises(UserError, match="without a token before it"):
        plain._loglikelihood_tokens([(("", "a"), [], [4])], disable_tqdm=True)


class TestOneTokenAcrossTheJoin:
    def test_the_continuation_is_scored_alone(self, model_folder: Path) -> None:
        tokenizer = spelling_tokenizer("r_", "_P")
        ours = dynamax(model_folder, tokenizer=tokenizer)
        theirs = HFLM(str(model_folder), tokenizer=tokenizer, device="cpu", batch_size=1)
        context, continuation = "answer", "_"
        assert len(tokenizer.encode(context + continuation)) == len(tokenizer.encode(context))
        with pytest.raises(AssertionError):
            scores(theirs, (context, continuation))
        request = ((context, continuation), tokenizer.encode(context), tokenizer.encode(continuation))
        ((expected, _),) = theirs._loglikelihood_tokens([request], disable_tqdm=True)
        found = scores(ours, (context, continuation), ("answer", "Paris"))
        assert found == pytest.approx([expected, *scores(theirs, ("answer", "Paris"))], abs=1e-4)

    def test_where_hf_gives_a_score_it_is_that(self, model_folder: Path) -> None:
        tokenizer = spelling_tokenizer("r_", "_P")
        ours = dynamax(model_folder, tokenizer=tokenizer)
        theirs = HFLM(str(model_folder), tokenizer=tokenizer, device="cpu", batch_size=1)
        texts = ("answer", "_Paris"), ("answer_", "Paris")
        assert scores(ours, *texts) == pytest.approx(scores(theirs, *texts), abs=1e-4)


class TestWithoutBosAndEos:
    @pytest.fixture(scope="class")
    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer().backend_tokenizer)

    def test_contexts_need_no_prefix(self, model_folder: Path, tokenizer: Any) -> None:
        lm = dynamax(model_folder, tokenizer=tokenizer)
        theirs = HFLM(str(model_folder), tokenizer=tokenizer, prefix_token_id=7, device="cpu", batch_size=1)
        texts = ("The quick", " fox"), ("Paris is ", "the capital")
        assert scores(lm, *texts) == pytest.approx(scores(theirs, *texts), abs=1e-4)
        rolling = [instance("loglikelihood_rolling", ("",), 0, ("t", 0, 1))]
        assert numbers(lm.loglikelihood_rolling(rolling)) == [0.0]

    def test_empty_contexts_and_whole_texts_ask_for_one(self, model_folder: Path, tokenizer: Any) -> None:
        lm = dynamax(model_folder, tokenizer=tokenizer)
        message = "document 1 of task 't': the context is empty and the tokenizer has neither.*prefix_token_id="
        for pair in (("", "Paris"), (" ", "Paris")):
            with pytest.raises(UserError, match=message):
                scores(lm, ("The quick", " fox"), pair)
        rolling = [instance("loglikelihood_rolling", (text,), i, ("t", i, 1)) for i, text in enumerate(("", "Paris"))]
        with pytest.raises(UserError, match=message):
            lm.loglikelihood_rolling(rolling, disable_tqdm=True)
        given = dynamax(model_folder, tokenizer=tokenizer, prefix_token_id="7")
        theirs = HFLM(str(model_folder), tokenizer=tokenizer, prefix_token_id=7, device="cpu", batch_size=1)
        assert scores(given, ("", "Paris")) == pytest.approx(scores(theirs, ("", "Paris")), abs=1e-4)
        expected = numbers(theirs.loglikelihood_rolling(rolling, disable_tqdm=True))
        found = numbers(given.loglikelihood_rolling(rolling, disable_tqdm=True))
        assert found == pytest.approx(expected, abs=1e-3)

    def test_generations_end_at_their_stops(self, model_folder: Path, plain: DynamaxLM, tokenizer: Any) -> None:
        requests = generation_requests(["The quick", "Paris is"], until=["a"])
        lm = dynamax(model_folder, tokenizer=tokenizer)
        assert lm.generate_until(requests, disable_tqdm=True) == plain.generate_until(requests, disable_tqdm=True)


def test_a_part_of_the_requests_names_the_right_document(model_folder: Path) -> None:
    """Where an evaluation is answered in blocks, numbers in a block are not those of documents."""
    lm = dynamax(model_folder, threshold=None, target_reduction=1.2, confidence="state", logits_cache=False)
    poisoned = set(lm.tokenizer.encode("on the river")) - set(lm.tokenizer.encode("The quick Paris is"))
    lm.model.get_input_embeddings().weight.data[list(poisoned)] = float("nan")
    texts = [("The quick", " Paris is")] * 40 + [("on the river", " Paris is")]
    with pytest.raises(UserError, match="not finite for document 40 of task 't'"):
        lm.loglikelihood(pairs(*texts), disable_tqdm=True)
