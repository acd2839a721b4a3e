"""From the harness's generation arguments to what the engine needs: limits, processors, stops.

transformers' own generation code decides (through the model's generation_config), so that texts equal those
of ``--model hf``; what cannot be honoured here is refused.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from dynamax_lm_eval.errors import UserError, unknown_name

#: Fields of transformers' GenerationConfig that do here what they do in ``generate``.
HONOURED = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values"),
    }
)
_BEAMS = "it only acts on beam search"
_ASSISTANT = "it only acts on assisted generation"
_CACHE = "it only acts on the cache of transformers"
_OUTPUT = "texts are all that is returned"
_NOT_CHOSEN_BY_LOGITS = "tokens are chosen from the logits of one row at a time"
#: Fields without effect on what ``generate`` chooses one token at a time, and why. A model's generation_config may
#: carry them, for other ways to generate; who asks for one is told.
INERT = {
    **dict.fromkeys(("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"), _BEAMS),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule"), _ASSISTANT),
    **dict.fromkeys(("assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind"), _ASSISTANT),
    **dict.fromkeys(("target_lookbehind", "assistant_ensemble_weight", "speculation_type"), _ASSISTANT),
    **dict.fromkeys(("cache_config", "max_cache_len", "prefill_chunk_size"), _CACHE),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _OUTPUT),
    **dict.fromkeys(("compile_config", "disable_compile"), "nothing is compiled"),
    **dict.fromkeys(("use_cache", "pad_token_id"), "the harness sets it"),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), "prompts are never empty"),
    **dict.fromkeys(("_from_model_config", "transformers_version"), "it only describes a file"),
    "low_memory": "it only acts on contrastive search",
}
#: Fields that the engine cannot follow, and why.
REFUSED = {
    **dict.fromkeys(("constraints", "force_words_ids", "num_beams"), "beam_search is not supported"),
    **dict.fromkeys(
        ("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant"), "nothing is drafted"
    ),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "guidance_scale", "watermarking_config"), _NOT_CHOSEN_BY_LOGITS),
    **dict.fromkeys(("continuous_batching_config",), "the engine has its own batches"),
    "cache_implementation": "K and V are kept as they are, neither quantised nor in pages",
    "max_time": "answers must not depend on the machine",
    "num_return_sequences": "num_return_sequences must be 1; use the task's repeats instead",
    "return_dict_in_generate": _OUTPUT,
    "stop_strings": "stops are named by until",
    "token_healing": "the prompt is fed as the task has it",
}
#: Values that change nothing, beside None and transformers' own default.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Where transformers keeps K and V is not what they are.
    "cache_implementation": (
        *("dynamic", "offloaded", "static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked"),
        *("offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
    "disable_compile": (False, True),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits"), (False,)),
    **dict.fromkeys(("is_assistant", "low_memory", "token_healing", "use_mtp"), (False,)),
}
#: What the harness itself passes to ``generate``.
_SET_BY_HARNESS = ("attention_mask", "context", "input_ids", "pad_token_id", "stop", "stopping_criteria", "use_cache")
#: Arguments of ``generate`` that are no fields of its configuration.
_OF_GENERATE = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"} | {
    "assistant_tokenizer",
    "tokenizer",
    "trust_remote_code",
}


class GenerationSettings:
    """One set of generation arguments, merged with the model's generation_config as ``generate`` does."""

    def __init__(self, model: Any, kwargs: Mapping[str, Any], pad_token_id: int | None, device: torch.device) -> None:
        """Merges the arguments, and refuses what cannot be honoured.

        Args:
            model: the transformers model.
            kwargs: what ``--model hf`` would pass to ``generate`` besides inputs, lengths and stops.
            pad_token_id: the tokenizer's.
            device: where logits are.

        Raises:
            UserError: an argument, or a setting of the model's generation_config, is unknown or cannot be honoured.
        """
        kwargs = _known_arguments(kwargs)
        self._model = model
        self._device = device
        self._arguments = kwargs
        try:
            config, _ = model._prepare_generation_config(
                None, use_cache=True, pad_token_id=pad_token_id, **_as_hf_passes(kwargs)
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise self._not_valid(error) from error
        _check_merged(config, kwargs)
        self.config: GenerationConfig = config
        try:
            model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device, batch_size=1)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._not_valid(error) from error
        eos = config._eos_token_tensor
        self.eos_ids: frozenset[int] = frozenset() if eos is None else frozenset(eos.tolist())

    @property
    def do_sample(self) -> bool:
        """Says whether tokens are sampled."""
        return bool(self.config.do_sample)

    def for_prompt(self, prompt: Sequence[int], max_length: int) -> tuple[int, LogitsProcessorList]:
        """Returns how many tokens may follow a prompt, and transformers' logits processors and warpers for it.

        As ``generate`` prepares them: a model's own max_new_tokens precedes ``max_length`` (tokens of prompt and
        text), and what penalises or bans a prompt's tokens gets them.

        Raises:
            UserError: there is no room after the prompt, or a value is not valid.
        """
        config = copy.copy(self.config)
        config.max_length = max_length
        ids = torch.tensor([list(prompt)], device=self._device)
        try:
            config = self._model._prepare_generated_length(
                generation_config=config,
                # True silences a warning where max_new_tokens decides; otherwise max_length would be added to.
                has_default_max_length=config.max_new_tokens is not None,
                has_default_min_length=True,
                model_input_name="input_ids",
                input_ids_length=len(prompt),
                inputs_tensor=ids,
            )
            room = math.ceil(config.max_length) - len(prompt)
            processors: LogitsProcessorList = self._model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=ids,
                prefix_allowed_tokens_fn=None,
                logits_processor=LogitsProcessorList(),
                device=ids.device,
                model_kwargs={"attention_mask": None, "use_cache": True},
                negative_prompt_ids=None,
                negative_prompt_attention_mask=None,
            )
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise self._not_valid(error) from error
        if room < 1:
            raise UserError(
                f"max_length={config.max_length} leaves no room after a prompt of {len(prompt)} tokens; "
                "use max_gen_toks instead"
            )
        return room, processors

    def _not_valid(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        own = self._model.generation_config.to_diff_dict()
        return UserError(
            f"generation arguments {dict(self._arguments)!r}, with the model's generation_config {own!r}, are not "
            f"valid: {reason}"
        )


def _known_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns generation arguments without those that ask for nothing; UserError for names that cannot be honoured."""
    fields = _fields()
    honoured: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _SET_BY_HARNESS:
            raise UserError(f"generation argument {name}={value!r} cannot be given: the harness sets it; remove it")
        if name in fields:
            honoured[name] = value
        elif name not in _OF_GENERATE:
            raise UserError(
                unknown_name("generation argument", name, fields, "those of transformers' generate are", fields)
            )
        elif value is not None:
            raise UserError(f"generation argument {name}={value!r} is not supported by dynamax; remove it")
    for name, value in honoured.items():
        if name in INERT and not _changes_nothing(name, value):
            raise UserError(f"generation argument {name}={value!r} has no effect: {INERT[name]}; remove it")
        _check_supported(name, value, "generation argument {}={!r} is not supported by dynamax")
    return honoured


def _check_merged(config: GenerationConfig, kwargs: Mapping[str, Any]) -> None:
    """Refuses (UserError) what a model's generation_config asks for and cannot get, unless ``kwargs`` override it."""
    for name in sorted(_fields() - kwargs.keys()):  # a model's entries of other names are not read by generate
        shown = "the model's generation_config sets {}={!r}, which is not supported by dynamax"
        _check_supported(name, getattr(config, name, None), shown)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(
            f"generation by {mode.value} is not supported by dynamax: tokens leave one by one; "
            "use greedy decoding or sampling (num_beams=1)"
        )


def _fields() -> frozenset[str]:
    """Returns the names that the installed transformers has in its GenerationConfig."""
    configuration: Any = GenerationConfig
    return frozenset(configuration().to_dict())


def _check_supported(name: str, value: Any, shown: str) -> None:
    """Refuses (UserError) a field that cannot be honoured, or that is of a later transformers and not known here."""
    if name in HONOURED or name in INERT or _changes_nothing(name, value):
        return
    why = REFUSED.get(name, "it is newer than dynamax")
    raise UserError(f"{shown.format(name, value)}: {why}; remove it, or override it: {name}={_harmless(name)!r}")


def _changes_nothing(name: str, value: Any) -> bool:
    """Says whether a field's value is as good as none: of the same type as a neutral one, so that True is not 1."""
    return value is None or any(
        value == neutral and (type(value) is type(neutral) or (type(value), type(neutral)) == (int, float))
        for neutral in (*_NEUTRAL.get(name, ()), _harmless(name))
    )


def _harmless(name: str) -> Any:
    """Returns transformers' own default of a field."""
    return GenerationConfig._get_default_generation_params().get(name)


def _as_hf_passes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments as the harness's HFLM hands them to ``generate``: without a temperature, greedy."""
    passed = dict(kwargs)
    temperature = passed.setdefault("temperature", 0.0)
    if temperature == 0.0 and passed.get("do_sample") is None:
        passed["do_sample"] = False
    if temperature == 0.0:
        if passed["do_sample"] is not False:
            raise UserError("do_sample=True needs a temperature above 0; add temperature= to the generation arguments")
        del passed["temperature"]
    return passed
