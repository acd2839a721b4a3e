"""A ``generate_until`` request of the harness, as the engine takes it and as the harness gets it back.

Follows what ``HFLM`` does around ``generate``: normalised arguments, stop strings, left truncation,
post-processing. Knows texts and one tokenizer; does not run anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from dynamax_lm_eval.engine.requests import GenerationRequest
from dynamax_lm_eval.engine.sampling import Sampler
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.harness.generation import GenerationSettings
from dynamax_lm_eval.harness.stopping import StopStrings


@dataclass(frozen=True)
class RequestSettings:
    """The settings that decide how a request is answered, beside the request itself."""

    policy: ExitPolicy
    repetition_penalty: float | None


class PreparedArguments:
    """Generation arguments with their stop strings, prepared once for all requests of a call that share them."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._prepared: dict[str, tuple[GenerationSettings, StopStrings]] = {}

    def of(self, kwargs: dict[str, Any], stops: list[str]) -> tuple[GenerationSettings, StopStrings]:
        """Returns the settings that ``generate`` would follow, and what tells that a generation is over."""
        key = json.dumps([kwargs, stops], sort_keys=True, default=repr)
        if key not in self._prepared:
            device = self._lm.engine.backbone.output_device
            settings = GenerationSettings(self._lm.model, kwargs, self._lm.tokenizer.pad_token_id, device)
            self._prepared[key] = settings, StopStrings(self._lm.tokenizer, stops, settings.eos_ids)
        return self._prepared[key]


class PreparedGeneration:
    """One request: its prompt and limits as HFLM would set them, and its text at the end."""

    def __init__(
        self, lm: Any, settings: RequestSettings, request: Any, eos: str | None, arguments: PreparedArguments
    ) -> None:
        """Tokenises the prompt and works out the request's limits.

        Args:
            lm: the model, for its tokenizer and limits.
            settings: when the request's tokens exit, and the penalty that it gets unless it names its own.
            request: the harness's instance with ``args`` (context, generation arguments).
            eos: text of the end token, always a stop; None where the tokenizer has none.
            arguments: what earlier requests of the call were prepared with.

        Raises:
            UserError: the prompt or an argument cannot be honoured.
        """
        self._lm = lm
        #: What the request is, for seeding: equal documents at different places are different requests.
        place = [getattr(request, name, None) for name in ("task_name", "doc_id", "idx")]  # none if made by hand
        self.key = json.dumps([*place, request.args], default=str)
        context, gen_kwargs = request.args
        # A deep copy: `until` must not be changed in place, it is part of the cache's key.
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, lm.max_gen_toks))
        except (TypeError, ValueError) as error:
            raise UserError(f"generation arguments {gen_kwargs!r} are not valid: {error}") from error
        until = kwargs.pop("until", None)
        if not all(isinstance(stop, str) for stop in until):
            raise UserError(f"until must be a text or a list of texts, got {until!r}")
        self._stops = handle_stop_sequences(until, eos=eos)
        max_gen_toks = kwargs.pop("max_gen_toks")
        if not 1 <= max_gen_toks < lm.max_length:
            raise UserError(
                f"max_gen_toks={max_gen_toks} must be at least 1 and less than the model's max_length={lm.max_length}"
            )
        room = lm.max_length - max_gen_toks
        ids, _ = lm.tok_batch_encode([context], left_truncate_len=room, truncation=lm.truncation)
        prompt: list[int] = ids[0].tolist()
        if not prompt:
            raise UserError("cannot generate after an empty prompt; add a few-shot example or a system instruction")
        lm.engine.backbone.check_ids(prompt)
        max_length = kwargs.pop("max_length", len(prompt) + max_gen_toks)
        if settings.repetition_penalty is not None:
            kwargs.setdefault("repetition_penalty", settings.repetition_penalty)
        generation, is_finished = arguments.of(kwargs, self._stops)
        max_new_tokens, processors = generation.for_prompt(prompt, max_length)
        self.request = GenerationRequest(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            policy=settings.policy,
            sampler=Sampler(processors, generation.do_sample),
            is_finished=is_finished,
        )

    def text(self, tokens: list[int]) -> str:
        """Returns the text for the harness, without what follows a stop string or precedes the end of thinking."""
        think_end = self._lm.think_end_token
        if isinstance(think_end, int) and think_end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think_end) :]
        text = self._lm.tok_decode(tokens)
        if isinstance(think_end, int):
            text = text.lstrip()
        finished: str = postprocess_generated_text(
            generation=text,
            stop=self._stops,
            think_end_token=think_end if isinstance(think_end, str) else None,
        )
        return finished
