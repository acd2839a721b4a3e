"""Tries on a loaded model what verification needs: tokens that go on after an exit, and rows that are taken back.

N tokens of a text, t of a round, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.engine.batch import FlatBatch, RowInput
from dynamax_lm_eval.engine.engine import Engine, RowStates
from dynamax_lm_eval.exits.policy import NEVER, ExitPolicy

#: Tokens of a round that are right and, behind them, wrong.
_RIGHT, _WRONG = 3, 2

#: A token that left: the blocks that it has run, and its hidden state (1, 1, D).
_Left = tuple[int, Tensor]


def drafted_logits(engine: Engine, text: Sequence[int], prompt_length: int) -> Tensor:
    """Returns the logits of a text whose tokens are fed as drafts, among them wrong ones that are taken back.

    Tokens of a round leave at different exits, go on where a later one gets farther, and all together in the end.

    Args:
        engine: runs it; its backbone takes rows back.
        text: N token ids.
        prompt_length: so many of them are fed at once.

    Returns:
        (N - prompt_length + 1, V) from the last token of the prompt on.
    """
    trial = _Trial(engine, text, prompt_length)
    trial.feed(text[:prompt_length], 0, [])
    for start in range(prompt_length, len(text), _RIGHT):
        right = list(text[start : start + _RIGHT])
        ids = [*right, *((token + 1) % engine.backbone.vocab_size for token in right[:_WRONG])]
        left: list[_Left] = []
        for number in range(len(ids)):
            left = trial.feed(
                ids[: number + 1], start, left, 1 + (start + 2 * number) % (engine.backbone.num_layers - 1)
            )
        trial.feed(ids, start, left)
        trial.states.settle(trial.slot, len(right))
    trial.states.free_row(trial.slot)
    return torch.stack([trial.logits[position] for position in range(prompt_length - 1, len(text))])


class _Trial:
    """A row with its states, and what the full model said of its tokens."""

    def __init__(self, engine: Engine, text: Sequence[int], prompt_length: int) -> None:
        depth, capacity = engine.backbone.num_layers, len(text) + _WRONG
        layers = tuple(range(1, depth))
        self._engine = engine
        self._prompt_length = prompt_length
        self._policy = ExitPolicy(
            depth, layers, (0.0,) * len(layers), confidence="state", verify_tokens=_RIGHT + _WRONG
        )
        self.states: RowStates = engine.new_states(capacity, row_stride=capacity)
        slot = self.states.allocate_row(capacity)
        assert slot is not None, "states were made for it"
        self.slot: int = slot
        self.logits: dict[int, Tensor] = {}  # by position

    def feed(self, ids: Sequence[int], start: int, left: Sequence[_Left], leaves: int | None = None) -> list[_Left]:
        """Feeds tokens (t,) from position ``start`` on, of which the first have left before.

        ``leaves``: the last of them leaves after so many blocks; None: all run to the end.

        Returns:
            what has become of those that have left, this one included.
        """
        resumed = [layer for layer, _ in left]
        row = RowInput(ids, start, self.slot, self._prompt_length, 1, self._policy, resumed=resumed)
        batch = FlatBatch.build([row])
        table = {layer: np.full(len(batch), NEVER, dtype=np.float32) for layer in self._policy.exit_layers}
        if leaves is not None:
            table[leaves][-1] = 0.0
        collector = _Logits()
        hidden = [state for _, state in left]
        result = self._engine.advance(replace(batch, thresholds=table), self.states, collector, resumed=hidden)
        if leaves is None:
            self.logits |= {start + token: logits for token, logits in collector.by_token.items()}
        found = dict(enumerate(left))
        for stop in result.stopped:
            states = stop.hidden.split(1, dim=1)
            found |= {token: (stop.layer, state) for token, state in zip(stop.tokens.tolist(), states, strict=True)}
        return [found[token] for token in sorted(found)]


class _Logits:
    """A collector of logits by token."""

    def __init__(self) -> None:
        self.by_token: dict[int, Tensor] = {}

    def reduce(self, tokens: IntArray, logits: Tensor) -> Tensor:
        return logits

    def store(self, tokens: IntArray, reduced: Tensor) -> None:
        self.by_token |= dict(zip(tokens.tolist(), reduced, strict=True))
