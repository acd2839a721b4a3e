"""The arguments that a model calls its blocks with, and where tokens stand in them.

N tokens, n of them chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class AmbiguousAxisError(Exception):
    """An argument has more than one axis of tokens, so it cannot be cut to some of them."""


def token_axes(shorter: Any, longer: Any, lengths: tuple[int, int], masks: bool = False) -> Any:
    """Returns the axis of tokens in every tensor of some arguments, None where there is none, in their structure.

    Args:
        shorter: the arguments for a number of tokens.
        longer: the same for another number.
        lengths: these numbers.
        masks: attention masks, which have two, are no error; whoever calls makes them anew.

    Raises:
        AmbiguousAxisError: a tensor has several.
    """
    if isinstance(shorter, Tensor) and isinstance(longer, Tensor):
        pairs = list(enumerate(zip(shorter.shape, longer.shape, strict=False)))
        axes = [axis for axis, sizes in pairs if sizes == lengths]
        if masks and len(axes) == 2 and shorter.ndim == 4:
            return None
        if len(axes) > 1:
            raise AmbiguousAxisError(f"shape {tuple(shorter.shape)} for {lengths[0]} tokens")
        return axes[0] if axes else None
    if type(shorter) in (tuple, list):
        return tuple(token_axes(a, b, lengths, masks) for a, b in zip(shorter, longer, strict=True))
    if type(shorter) is dict:
        return {key: token_axes(value, longer[key], lengths, masks) for key, value in shorter.items()}
    return None


def map_tokens(value: Any, axes: Any, change: Any) -> Any:
    """Returns arguments with ``change(tensor, axis)`` in place of every tensor that has an axis of tokens."""
    if isinstance(value, Tensor):
        return value if axes is None else change(value, axes)
    if type(value) in (tuple, list) and axes is not None:
        return type(value)(map_tokens(part, axis, change) for part, axis in zip(value, axes, strict=True))
    if type(value) is dict and axes and any(axis is not None for axis in axes.values()):
        return {key: map_tokens(part, axes.get(key), change) for key, part in value.items()}
    return value  # the same object: blocks may hand things on in it


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, of which the first is what runs through the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states (1, N, D)."""
        found = self.args[0] if self.args else self.kwargs[self._name]
        assert isinstance(found, Tensor)
        return found

    def with_values(self, values: dict[int | str, Any]) -> Call:
        """Returns the call with other arguments at some places."""
        args = tuple(values.get(place, value) for place, value in enumerate(self.args))
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        return Call(args, {**self.kwargs, **named})

    @property
    def _name(self) -> str:
        return "hidden_states" if "hidden_states" in self.kwargs else next(iter(self.kwargs))

    def hidden_axis(self, axes: CallAxes) -> int:
        """Returns where tokens stand in the hidden states."""
        axis = axes.args[0] if self.args else axes.kwargs[self._name]
        assert isinstance(axis, int), "hidden states have tokens"
        return axis

    def axes(self, longer: Call, lengths: tuple[int, int], masks: bool = False) -> CallAxes:
        """Returns where tokens stand in it, by comparison with a call for another number of them.

        ``masks``: as of :func:`token_axes`.
        """
        return CallAxes(
            token_axes(self.args, longer.args, lengths, masks), token_axes(self.kwargs, longer.kwargs, lengths, masks)
        )

    def replaced(self, hidden: Tensor) -> Call:
        """Returns the call with other hidden states."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, self._name: hidden})


@dataclass(frozen=True)
class CallAxes:
    """Where tokens stand in the arguments of a module."""

    args: Any
    kwargs: Any

    def map(self, call: Call, change: Any) -> Call:
        """Returns the call with ``change(tensor, axis)`` for every tensor that has an axis of tokens."""
        return Call(map_tokens(call.args, self.args, change), map_tokens(call.kwargs, self.kwargs, change))

    def select(self, call: Call, tokens: Tensor) -> Call:
        """Returns the call for some of its tokens (n,)."""
        return self.map(call, lambda tensor, axis: tensor.index_select(axis, tokens))

    def joined(self, first: Call, second: Call) -> Call:
        """Returns the call for the tokens of two calls, one after the other."""
        following = iter(self.tensors(second))
        return self.map(first, lambda tensor, axis: torch.cat([tensor, next(following)], dim=axis))

    def tensors(self, call: Call) -> list[Tensor]:
        """Returns the tensors of a call that have an axis of tokens."""
        found: list[Tensor] = []

        def note(tensor: Tensor, _: int) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(call, note)
        return found

    def by_row(self, call: Call) -> Call:
        """Returns the call for N tokens of one row as one for a token in each of N rows."""
        return self.map(call, lambda tensor, axis: tensor.transpose(0, axis))
