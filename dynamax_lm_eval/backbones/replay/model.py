"""A model of transformers whose blocks somebody else calls: it makes their arguments, and reads out.

The arguments of all blocks come from one forward in which every block hands its hidden states on; the read-out is one
in which the last block returns given ones. So embeddings, rotary angles, masks, inputs per block, the final norm, the
head, its soft-cap and its scale are the model's own.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from dynamax_lm_eval.backbones.forwards import replaced_forwards
from dynamax_lm_eval.backbones.replay.arguments import Call
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.models.placement import execution_device

#: Names that models, blocks and modules give the argument for their cache.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "layer_past", "past_key_value")


class _Captured(Exception):  # noqa: N818 (a signal)
    """The last block has been called, and nothing after it need run."""


class ReplayModel:
    """A causal LM of transformers and its blocks."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.device = execution_device(model.get_input_embeddings())
        #: For each block the length of the tuple that it returns; None: it returns hidden states alone.
        self.arities: list[int | None] = [None] * len(self.blocks)
        #: For each block the places in its arguments where parts of what the block before returned are handed on.
        self.handed_on: list[dict[int | str, int]] = [{} for _ in self.blocks]
        self._parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        self._takes_positions = "position_ids" in self._parameters or takes_any
        self.cache_argument = next((name for name in _CACHE_ARGUMENTS if name in self._parameters), None)
        found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [c for c in found.values() if hasattr(c, "_attn_implementation")]
        self.cache_names = frozenset(_CACHE_ARGUMENTS)
        self._own: dict[nn.Module, Any] = {}

    @staticmethod
    def is_cache(value: Any) -> bool:
        """Returns whether an argument is a cache of transformers."""
        return isinstance(value, Cache)

    def remember_forward(self, module: nn.Module) -> None:
        """Notes the forward of a module before it is replaced."""
        self._own[module] = vars(module).get("forward")

    def own_forward(self, module: nn.Module) -> Any:
        """Returns the forward of a module before anything replaced it; None where it is that of its class."""
        return self._own.get(module)

    def watch_outputs(self) -> None:
        """Notes what blocks return, and what of it the next block is called with, in a forward of a few tokens."""
        last: list[Any] = [()]

        def before(number: int) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
                for index, value in enumerate(last[0]):
                    if index and isinstance(value, Tensor):
                        self.handed_on[number] |= {place: index for place, given in named if given is value}

            return hook

        def after(number: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                last[0] = parts_of(output)
                self.arities[number] = arity_of(output)

            return hook

        hooks = []
        for number, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(before(number), with_kwargs=True))
            hooks.append(block.register_forward_hook(after(number)))
        try:
            self.run(torch.arange(3, device=self.device), None, None)
        finally:
            for hook in hooks:
                hook.remove()

    def capture(self, ids: Tensor, positions: Tensor | None, cache: Any) -> list[Call]:
        """Returns what the model calls its blocks with for tokens (N,) at positions (N,).

        Args:
            ids: (N,)
            positions: (N,); None: the tokens are a whole row.
            cache: what blocks are to take for their cache; None: they keep nothing.
        """
        calls: list[Call] = []

        def record(number: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append(Call(args, kwargs))
                if number == len(self.blocks) - 1:
                    raise _Captured
                return self._shaped(number, calls[-1].hidden)

            return forward

        with self._replaced([record(number) for number in range(len(self.blocks))]):
            try:
                self.run(ids, positions, cache)
            except _Captured:
                return calls
        raise UserError(f"{type(self.model).__name__} does not call its blocks one after the other")

    def readout(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """Returns the logits (T, V) of hidden states of T tokens in the model's own form."""

        def hand_on(number: int) -> Any:
            last = number == len(self.blocks) - 1

            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._shaped(number, hidden if last else Call(args, kwargs).hidden)

            return forward

        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        with self._replaced([hand_on(number) for number in range(len(self.blocks))]):
            logits: Tensor = self.run(ids, None, None).logits[0]
        return logits

    def call(self, block: int, call: Call) -> Tensor:
        """Returns what block ``block`` (1-based) makes of its hidden states."""
        result: Tensor = self.outputs(block, call)[0]
        return result

    def outputs(self, block: int, call: Call) -> tuple[Any, ...]:
        """Returns all that block ``block`` (1-based) returns, hidden states first."""
        return parts_of(self.blocks[block - 1](*call.args, **call.kwargs))

    @contextmanager
    def attention(self, name: str, experts: str | None = None) -> Iterator[None]:
        """Runs the model with the attention (and experts) that transformers knows by this name."""
        before = [(config, config._attn_implementation) for config in self._configs]
        attributes = [c for c in self._configs if experts and hasattr(c, "_experts_implementation_internal")]
        experts_before = [(config, config._experts_implementation_internal) for config in attributes]
        for config in self._configs:
            config._attn_implementation_internal = name
        for config in attributes:
            config._experts_implementation_internal = experts
        try:
            yield
        finally:
            for config, value in before:
                config._attn_implementation_internal = value
            for config, value in experts_before:
                config._experts_implementation_internal = value

    def run(self, ids: Tensor, positions: Tensor | None, cache: Any) -> Any:
        """Returns what the model makes of tokens (N,) of one row at positions (N,); arguments as of :meth:`capture`."""
        arguments: dict[str, Any] = {"input_ids": ids.unsqueeze(0)}
        if positions is not None and self._takes_positions:
            arguments["position_ids"] = positions.unsqueeze(0)
        if "use_cache" in self._parameters:
            arguments["use_cache"] = cache is not None
        if cache is not None and self.cache_argument is not None:
            arguments[self.cache_argument] = cache
        return self.model(**arguments)

    def _shaped(self, number: int, hidden: Tensor) -> Any:
        """Returns hidden states in the form in which a block returns them."""
        return in_form(hidden, self.arities[number])

    @contextmanager
    def _replaced(self, forwards: Sequence[Any]) -> Iterator[None]:
        """Runs the model with other functions in place of its blocks'."""
        with replaced_forwards(list(zip(self.blocks, forwards, strict=True))):
            yield


def parts_of(output: Any) -> tuple[Any, ...]:
    """Returns all that a block or module returned, hidden states first."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def arity_of(output: Any) -> int | None:
    """Returns the length of the tuple that a block or module returned; None: it returned hidden states alone."""
    return len(output) if isinstance(output, (tuple, list)) else None


def in_form(hidden: Tensor, arity: int | None) -> Any:
    """Returns hidden states in the form of a block or module that returns ``arity`` (:func:`arity_of`)."""
    return hidden if arity is None else (hidden, *[None] * (arity - 1))


class HiddenShape:
    """The form of a model's hidden states, which the engine knows as (1, N, D) whatever it is."""

    def __init__(self, shape: tuple[int, ...], token_axis: int) -> None:
        """``shape``: for some number of tokens; ``token_axis``: where they stand in it."""
        self._axis = token_axis
        self._rest = (*shape[:token_axis], *shape[token_axis + 1 :])
        self._is_plain = len(shape) == 3 and token_axis == 1
        self.size = math.prod(self._rest)

    @property
    def is_plain(self) -> bool:
        """Whether the model's form is the engine's."""
        return self._is_plain

    def flat(self, hidden: Tensor) -> Tensor:
        """Returns the model's hidden states as (1, N, D)."""
        return hidden if self._is_plain else hidden.movedim(self._axis, 0).flatten(1).unsqueeze(0)

    def of_model(self, hidden: Tensor) -> Tensor:
        """Returns hidden states (1, N, D) in the model's form."""
        if self._is_plain:
            return hidden
        shaped: Tensor = hidden[0].unflatten(-1, self._rest)
        return shaped.movedim(0, self._axis).contiguous()
