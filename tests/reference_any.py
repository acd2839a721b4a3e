"""Early exit written a third time, for any architecture: the model's own forward, one row, one token at a time.

Independent of the engine and of how it finds out what blocks do: transformers' own forward drives, with its own cache
and eager attention, and blocks are told of a token whether to run, to run for their states only, or not at all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from reference import Decisions, reference_generate, reference_score
from torch import Tensor
from transformers import DynamicCache, cache_utils

from dynamax_lm_eval.exits.policy import ExitPolicy


class AnyReference(Decisions):
    """Feeds one row token by token under a policy, with ``confidence=state`` or classifiers."""

    def __init__(self, model: Any, policy: ExitPolicy, *args: Any) -> None:
        super().__init__(model, policy, *args)
        depth = policy.num_layers
        self.blocks = next(
            list(m)
            for m in model.modules()
            if isinstance(m, torch.nn.ModuleList) and len(m) == depth and any(m[0].children())
        )
        names = model.forward.__code__.co_varnames + tuple(model.forward.__annotations__)
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.cache: Any = DynamicCache(config=model.config)
        # A window is the mask's business; a cache that forgets would shift positions.
        self.cache.layers = [
            cache_utils.DynamicLayer() if type(layer) is cache_utils.DynamicSlidingWindowLayer else layer
            for layer in self.cache.layers
        ]
        self.masked: list[set[int]] = [set() for _ in range(depth + 1)]

    @torch.no_grad()
    def feed(self, token: int) -> Tensor:
        """Runs one token, keeps its states, returns its logits (V,)."""
        position, depth = len(self.row.layers), self.policy.num_layers
        first = 1 if self.policy.exit_scope == "all" else self.prompt_length
        state: dict[str, Any] = {"exit": depth, "last": 0}
        originals = [block.forward for block in self.blocks]

        def run(number: int, hidden: Tensor, args: Any, kwargs: Any) -> Any:
            policy = self.policy
            if self._prunes(number, position):
                return hidden
            after_exit = state["exit"] < depth and not (policy.final_block and number == depth)
            if after_exit and policy.state_mode == "skip":
                kept = self._recurrent_states(number)
                self._run(originals[number - 1], number, args, kwargs)  # K and V that nobody looks at
                self._restore(number, kept)
                self.masked[number].add(position)
                return hidden
            output = self._run(originals[number - 1], number, args, kwargs)
            new = output[0] if isinstance(output, (tuple, list)) else output
            if after_exit:
                if policy.state_mode == "copy":
                    for source, target in zip(self._layers(state["last"]), self._layers(number), strict=True):
                        target.keys[..., -1, :] = source.keys[..., -1, :]
                        target.values[..., -1, :] = source.values[..., -1, :]
                return hidden
            state["last"] = number
            if state["exit"] == depth:
                self._show_classifier(number, new, position, first)
                if position >= first and self._exits(number, hidden, new, position - first):
                    state["exit"] = number
            return new

        self._with(run, token)
        self.row.layers.append(state["exit"])
        self.row.logits.append(state_logits := self.last_logits)
        return state_logits

    def _with(self, run: Any, token: int) -> None:
        """Runs the model's forward on one token with its blocks under control."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        hooked = []
        try:
            for number, block in enumerate(self.blocks, start=1):
                original = block.forward

                def forward(*args: Any, _n: int = number, _o: Any = original, **kwargs: Any) -> Any:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    new = run(_n, hidden, args, kwargs)
                    size = self._size(_n)
                    return new if size is None else (new, *[None] * (size - 1))

                block.forward = forward
                hooked.append(block)
            position = torch.tensor([[len(self.row.layers)]])
            names = {self.cache_name: self.cache, "use_cache": True, "position_ids": position}
            self.last_logits = self.model(torch.tensor([[token]]), **names).logits[0, -1].float()
        finally:
            for block in hooked:
                del block.forward
            self.model.set_attn_implementation(before)

    def _size(self, number: int) -> int | None:
        """How long the tuple is that a block returns; None: it returns a tensor."""
        if not hasattr(self.model, "_reference_sizes"):
            sizes: list[int | None] = []
            hooks = [
                block.register_forward_hook(
                    lambda _, __, o: sizes.append(len(o) if isinstance(o, (tuple, list)) else None)
                )
                for block in self.blocks
            ]
            inside = [vars(block).pop("forward") for block in self.blocks]
            self.model(torch.tensor([[3]]), use_cache=False)
            for block, forward, hook in zip(self.blocks, inside, hooks, strict=True):
                block.forward = forward
                hook.remove()
            self.model._reference_sizes = sizes
        size: int | None = self.model._reference_sizes[number - 1]
        return size

    def _run(self, forward: Any, number: int, args: Any, kwargs: Any) -> Any:
        """Runs a block under a mask that leaves out the tokens which left nothing behind for it."""
        length = len(self.row.layers) + 1

        def masked(value: Any) -> Any:
            if not self.masked[number] or not (isinstance(value, Tensor) and value.shape == (1, 1, 1, length)):
                return value
            mask = value.clone()
            mask[..., sorted(self.masked[number])] = torch.finfo(mask.dtype).min
            return mask

        return forward(*map(masked, args), **{name: masked(value) for name, value in kwargs.items()})

    def _layers(self, number: int) -> list[Any]:
        """The layers of the cache that a block uses."""
        each = max(1, len(self.cache.layers) // len(self.blocks))
        layers: list[Any] = self.cache.layers[(number - 1) * each : number * each]
        return layers

    def _recurrent_states(self, number: int) -> Any:
        layer = self.cache.layers[number - 1] if number <= len(self.cache.layers) else None
        kept = {}
        for name in ("conv_states", "recurrent_states"):
            for index, state in (getattr(layer, name, None) or {}).items():
                if state is not None:
                    kept[name, index] = state.clone()
        return kept

    def _restore(self, number: int, kept: Any) -> None:
        for (name, index), state in kept.items():
            getattr(self.cache.layers[number - 1], name)[index] = state


any_generate = functools.partial(reference_generate, kind=AnyReference)
any_score = functools.partial(reference_score, kind=AnyReference)
