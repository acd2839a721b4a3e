"""From the harness's generation arguments to what the engine needs: limits, processors, stops.

transformers' own generation code decides (through the model's generation_config), so that texts equal those
of ``--model hf``; what cannot be honoured here is refused.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from dynamax_lm_eval.config import UserError

#: Arguments of ``generate`` that the engine cannot follow.
_REFUSED = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "guidance_scale",
    "logits_processor",
    "max_time",
    "negative_prompt_ids",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prefix_allowed_tokens_fn",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "stop_strings",
    "stopping_criteria",
    "streamer",
    "token_healing",
    "watermarking_config",
)
#: Settings that change what is generated and that a model's own generation_config may carry.
_REFUSED_IN_CONFIG = ("guidance_scale", "max_time", "penalty_alpha", "stop_strings", "watermarking_config")
#: Harmless values of refused or beam-search settings.
_NEUTRAL = (None, False, 1, 1.0)


class GenerationSettings:
    """One set of generation arguments, merged with the model's generation_config as ``generate`` does."""

    def __init__(self, model: Any, kwargs: Mapping[str, Any], pad_token_id: int | None) -> None:
        """
        Args:
            model: the transformers model.
            kwargs: what ``--model hf`` would pass to ``generate`` besides inputs, lengths and stops.
            pad_token_id: the tokenizer's.

        Raises:
            UserError: an argument is unknown or cannot be honoured.
        """
        for name in _REFUSED:
            if kwargs.get(name) not in _NEUTRAL:
                raise UserError(f"generation argument {name}={kwargs[name]!r} is not supported by dynamax; remove it")
        self._model = model
        try:
            config, unused = model._prepare_generation_config(
                None, use_cache=True, pad_token_id=pad_token_id, **_as_hf_passes(kwargs)
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"generation arguments {dict(kwargs)!r} are not valid: {error}") from error
        if unused:
            raise UserError(f"unknown generation argument(s): {', '.join(sorted(unused))}")
        self.config: GenerationConfig = config
        self._check_mode()
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
        eos = config._eos_token_tensor
        self.eos_ids: frozenset[int] = frozenset() if eos is None else frozenset(eos.tolist())

    @property
    def do_sample(self) -> bool:
        return bool(self.config.do_sample)

    def max_new_tokens(self, prompt_length: int, max_length: int) -> int:
        """How many tokens may follow a prompt; a model's own max_new_tokens precedes, as in ``generate``."""
        if self.config.max_new_tokens is not None:
            return int(self.config.max_new_tokens)
        if max_length <= prompt_length:
            raise UserError(
                f"max_length={max_length} leaves no room after a prompt of {prompt_length} tokens; "
                "use max_gen_toks instead"
            )
        return max_length - prompt_length

    def processors(self, prompt_length: int, max_length: int) -> LogitsProcessorList:
        """transformers' logits processors and warpers for a prompt of this length."""
        config = copy.copy(self.config)
        config.max_length = max_length
        processors: LogitsProcessorList = self._model._get_logits_processor(
            config, input_ids_seq_length=prompt_length, device=self._model.device
        )
        return processors

    def _check_mode(self) -> None:
        mode = self.config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UserError(
                f"generation by {mode.value} is not supported by dynamax: tokens leave one by one; "
                "use greedy decoding or sampling (num_beams=1)"
            )
        if self.config.num_return_sequences not in _NEUTRAL:
            raise UserError("num_return_sequences must be 1; use the task's repeats instead")
        for name in _REFUSED_IN_CONFIG:
            if getattr(self.config, name, None) not in _NEUTRAL:
                raise UserError(f"the model's generation_config sets {name}, which dynamax does not support")


class StopStrings:
    """Tells when a generation is over: an end token, or a stop string among the last tokens.

    A stop string of k tokens is looked for in the text of the last k + 2 tokens, as the harness does. What was not
    there before ends in the last token, so nothing is decoded unless that token has the last character of a
    stop string. Stateless, for any number of requests.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._by_length: dict[int, list[str]] = defaultdict(list)
        for stop in stops:
            length = len(tokenizer.encode(stop, add_special_tokens=False)) + 2
            self._by_length[length].append(stop)
        # Bytes of other characters, and spaces, can belong to text that a token alone does not show.
        self._last_characters = {stop[-1:] for stop in stops}
        self._every_token_may_end = not all(stop.isascii() and stop[-1:].strip(" ") for stop in stops)
        self._may_end: dict[int, bool] = {}

    def __call__(self, generated: list[int]) -> bool:
        """Whether the generation ends with the last of these tokens."""
        last = generated[-1]
        if last in self._eos_ids:
            return True
        if last not in self._may_end:
            text = "" if self._every_token_may_end else self._tokenizer.decode([last])
            self._may_end[last] = self._every_token_may_end or any(c in text for c in self._last_characters)
        if not self._may_end[last]:
            return False
        for length, stops in self._by_length.items():
            text = self._tokenizer.decode(generated[-length:])
            if any(stop in text for stop in stops):
                return True
        return False


def ends_in_repetition(tokens: Sequence[int], max_ngram: int, min_tokens: int) -> bool:
    """Whether generated tokens end in an n-gram that repeats.

    The last tokens, or those before the very last one (a stop string's, say), are one n-gram of 1 to ``max_ngram``
    tokens at least three times in a row, over at least ``min_tokens`` tokens; the first of them may be cut. Lists
    whose items are longer, and texts that repeat with changes, are not found. ``max_ngram`` 0 finds nothing.
    """
    for end in (len(tokens), len(tokens) - 1):
        for n in range(1, max_ngram + 1):
            span = max(min_tokens, 3 * n)
            if end >= span and all(tokens[i] == tokens[i - n] for i in range(end - span + n, end)):
                return True
    return False


def _as_hf_passes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the harness's HFLM hands them to ``generate``: without a temperature, greedy."""
    passed = dict(kwargs)
    temperature = passed.setdefault("temperature", 0.0)
    if temperature == 0.0 and passed.get("do_sample") is None:
        passed["do_sample"] = False
    if temperature == 0.0:
        if passed["do_sample"] is not False:
            raise UserError("do_sample=True needs a temperature above 0; add temperature= to the generation arguments")
        del passed["temperature"]
    return passed
