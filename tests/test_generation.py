"""Every generation argument of transformers does what it does with ``--model hf``, or is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB
from helpers_harness import dynamax, generation_requests
from lm_eval.models.huggingface import HFLM
from transformers import CompileConfig, GenerationConfig

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness import generation
from dynamax_lm_eval.harness.generation import HONOURED, INERT, REFUSED
from dynamax_lm_eval.lm import DynamaxLM

#: One is a single token, which forced_bos_token_id needs.
CONTEXTS = ["Question: who wrote Hamlet?", "The quick", "Paris is", "T"]
_ENDS = {"eos_token_id": list(range(40, VOCAB))}
_SAMPLES = {"do_sample": True, "temperature": 1.0}
_TWO_TOKENS = {**_SAMPLES, "sequence_bias": [[[17], 50.0], [[18], 49.0]]}
_MIDDLE = list(range(20, 60))
#: A value of each honoured field that changes hf's texts, and what is given with it and without it. Those of sampling
#: leave one token to draw: hf and dynamax draw from streams of their own.
VALUES: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_length": (12, {}),
    "max_new_tokens": (3, {}),
    "min_length": (16, _ENDS),
    "min_new_tokens": (4, _ENDS),
    "eos_token_id": (_ENDS["eos_token_id"], {}),
    "do_sample": (True, {"do_sample": False, "temperature": 1.0, "typical_p": 1e-6}),
    "temperature": (1e-5, _SAMPLES),
    "top_k": (1, _SAMPLES),
    "top_p": (1e-6, _SAMPLES),
    "min_p": (1.0, _SAMPLES),
    "top_h": (1e-6, _SAMPLES),
    "typical_p": (1e-6, _SAMPLES),
    "epsilon_cutoff": (0.9999, _SAMPLES),
    "eta_cutoff": (0.9999, _TWO_TOKENS),
    "repetition_penalty": (3.0, {}),
    "encoder_repetition_penalty": (3.0, {}),
    "no_repeat_ngram_size": (1, {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[i] for i in _MIDDLE], {}),
    "sequence_bias": ([[[17], 50.0]], {}),
    "forced_bos_token_id": (40, {}),
    "forced_eos_token_id": (40, {}),
    "suppress_tokens": (_MIDDLE, {}),
    "begin_suppress_tokens": (list(range(20, VOCAB)), {}),
    "exponential_decay_length_penalty": ([1, 50.0], {}),
    "renormalize_logits": (True, {}),
    "remove_invalid_values": (True, {}),
}
#: These cannot change which token is drawn from finite logits.
NEVER_SEEN = {"renormalize_logits", "remove_invalid_values"}
#: The harness names these with every request, so that a model's own come to nothing.
HARNESS_DECIDES = {"max_length", "do_sample", "temperature"}
INERT_VALUES: dict[str, Any] = {
    **{"early_stopping": True, "length_penalty": 2.0, "num_beam_groups": 2, "diversity_penalty": 0.5},
    **{"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9},
    **{"max_matching_ngram_size": 3, "assistant_lookbehind": 3, "target_lookbehind": 3},
    **{"assistant_ensemble_weight": 0.5, "speculation_type": "dflash", "low_memory": True},
    **{"cache_config": {"nbits": 4}, "max_cache_len": 500, "prefill_chunk_size": 2},
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), True),
    **{"compile_config": CompileConfig(), "use_cache": False, "pad_token_id": 5},
    **{"bos_token_id": 5, "decoder_start_token_id": 5, "transformers_version": "4.0.0", "_from_model_config": True},
}
REFUSED_VALUES: dict[str, list[Any]] = {
    "assistant_early_exit": [1, 3],
    "cache_implementation": ["quantized"],
    "constraints": [[1]],
    "continuous_batching_config": [1],
    "dola_layers": ["high", 1, True],
    "force_words_ids": [[[5]]],
    "guidance_scale": [2.0, True],
    "is_assistant": [True, 1],
    "max_time": [1, 1.0, True, 2],
    "num_beams": [3, True, 1.0],
    "num_return_sequences": [2, True],
    "penalty_alpha": [0.6, True, 1],
    "prompt_lookup_num_tokens": [1, 3],
    "return_dict_in_generate": [True, 1],
    "stop_strings": [1, "a", ["a"], []],
    "token_healing": [True, 1],
    "use_mtp": [True, 1],
    "watermarking_config": [{"bias": 2.5}, True],
}
FIELDS = {*GenerationConfig().to_dict(), *vars(GenerationConfig())}  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> DynamaxLM:
    return dynamax(model_folder)


@pytest.fixture(scope="module")
def hf(model_folder: Path) -> Any:
    return HFLM(str(model_folder), device="cpu", batch_size=1)


def texts(lm: Any, contexts: list[str] | None = None, **kwargs: Any) -> list[str]:
    torch.manual_seed(0)
    requests = generation_requests(contexts or CONTEXTS, **{"until": [], **kwargs})
    found: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return found


def test_every_field_has_its_place() -> None:
    assert set(VALUES) == HONOURED
    assert FIELDS >= HONOURED
    assert set(INERT_VALUES) | {"disable_compile"} == set(INERT)
    assert set(REFUSED_VALUES) == set(REFUSED)
    assert not (HONOURED & set(INERT) or HONOURED & set(REFUSED) or set(INERT) & set(REFUSED))


@pytest.mark.parametrize("name", sorted(FIELDS - HONOURED - set(INERT) - set(REFUSED)))
def test_no_field_is_unknown(name: str) -> None:
    """Such a field is refused (below); decide what it is to be."""
    pytest.fail(f"transformers has a field {name!r} that dynamax_lm_eval/generation.py does not know")


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_honoured_as_a_request_asks(ours: Any, hf: Any, name: str) -> None:
    value, base = VALUES[name]
    given = {**base, **({"max_gen_toks": None} if name == "max_new_tokens" else {}), name: value}
    theirs = texts(hf, **given)
    assert texts(ours, **given) == theirs
    assert (theirs != texts(hf, **base)) == (name not in NEVER_SEEN)


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_honoured_as_the_model_says(ours: Any, hf: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value, base = VALUES[name]
    if name in HARNESS_DECIDES:
        base = {}
    before = texts(hf, **base)
    for lm in (ours, hf):
        monkeypatch.setattr(lm.model.generation_config, name, value)
    theirs = texts(hf, **base)
    assert texts(ours, **base) == theirs
    assert (theirs != before) == (name not in NEVER_SEEN | HARNESS_DECIDES)


@pytest.mark.parametrize("name", sorted(INERT_VALUES))
def test_without_effect(ours: Any, hf: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A model may carry it, with hf too; who asks for it is told."""
    value = INERT_VALUES[name]
    with pytest.raises(UserError, match=rf"generation argument {name}=.*(has no effect|the harness sets it)"):
        texts(ours, **{name: value})
    plain = texts(ours)
    for lm in (ours, hf):
        monkeypatch.setattr(lm.model.generation_config, name, value)
    assert texts(ours) == texts(hf) == plain


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in REFUSED_VALUES.items() for v in values])
def test_refused_wherever_it_comes_from(ours: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"generation argument {name}=.* is not supported") as caught:
        texts(ours, **{name: value})
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(ours.model.generation_config, name, value)
    with pytest.raises(UserError, match=rf"generation_config.*{name}"):
        texts(ours)


def test_what_asks_for_nothing_is_taken(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = texts(ours)
    neutral = {**dict.fromkeys(REFUSED), **{name: INERT[name] and None for name in INERT}}
    neutral = {name: value for name, value in neutral.items() if name not in ("use_cache", "pad_token_id")}
    assert texts(ours, **neutral) == plain
    for given in (
        {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0, "length_penalty": 1.0},
        {"guidance_scale": 1.0, "token_healing": False, "return_dict_in_generate": False, "output_scores": False},
        {"cache_implementation": "static", "disable_compile": True, "early_stopping": False, "logits_processor": None},
    ):
        assert texts(ours, **given) == plain
    # What a request says takes the place of what the model says.
    monkeypatch.setattr(ours.model.generation_config, "num_beams", 4)
    assert texts(ours, num_beams=1) == plain
    # Entries that are no fields are for the model's own code.
    monkeypatch.setattr(ours.model.generation_config, "chat_format", "chatml", raising=False)
    assert texts(ours, num_beams=1) == plain


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": True}, "use_cache=True cannot be given: the harness sets it"),
        ({"assistant_model": "x"}, "assistant_model='x' is not supported"),
        (
            {"repetition_penality": 2.0},
            "unknown generation argument 'repetition_penality'; did you mean 'repetition_pen",
        ),
        ({"temperature": "warm"}, "temperature"),
        ({"max_gen_toks": "many"}, "max_gen_toks"),
        ({"until": [3]}, r"until must be a text or a list of texts, got \[3\]"),
        ({"repetition_penalty": -1}, "repetition_penalty.*not valid"),
        ({"eos_token_id": "x"}, "eos_token_id.*not valid"),
        ({"max_length": "x"}, "not valid"),
        ({"max_length": 3}, "max_length=3 leaves no room"),
        ({"bad_words_ids": [[VOCAB + 5]]}, "cannot be followed for document 0 of task 't': ValueError"),
        ({"forced_eos_token_id": VOCAB + 5}, "cannot be followed for document 0 of task 't': IndexError"),
        ({**_SAMPLES, "suppress_tokens": list(range(VOCAB))}, "they rule out every token"),
    ],
)
def test_values_that_are_none(ours: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        texts(ours, CONTEXTS[:1], **kwargs)
    assert "document 0 of task 't'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_of_a_later_transformers(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = generation._fields() | {"new_field"}
    monkeypatch.setattr(generation, "_fields", lambda: fields)
    own = ours.model.generation_config
    monkeypatch.setattr(own, "new_field", None, raising=False)
    assert texts(ours) == texts(ours, new_field=None)
    with pytest.raises(UserError, match=r"generation argument new_field=True is not supported.*newer than dynamax"):
        texts(ours, new_field=True)
    monkeypatch.setattr(own, "new_field", 1)
    with pytest.raises(UserError, match=r"generation_config sets new_field=1.*newer than dynamax"):
        texts(ours)
    monkeypatch.setattr(GenerationConfig, "_get_default_generation_params", staticmethod(lambda: {"new_field": 1}))
    assert generation._changes_nothing("new_field", 1)
    assert not generation._changes_nothing("new_field", True)


def test_forced_end_with_the_models_own_limit(ours: Any, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token that a model's max_new_tokens allows is the forced one, whatever the task's limit is."""
    for lm in (ours, hf):
        monkeypatch.setattr(lm.model.generation_config, "max_new_tokens", 4)
        monkeypatch.setattr(lm.model.generation_config, "forced_eos_token_id", 40)
    theirs = texts(hf)
    assert texts(ours) == theirs
    assert all(text.endswith("y") for text in theirs[:3])  # token 40
