"""What exits show on held-out text: confidences and whether they would have been right."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dynamax_lm_eval.exits.classifiers import ExitClassifiers, exit_probability
from dynamax_lm_eval.frozen.passes import FrozenPass

AnyRow = TypeVar("AnyRow", bound=Sized)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Observations:
    """What each of T held-out tokens showed at each of E exits."""

    lengths: tuple[int, ...]  # of the rows, T in all
    within_k: BoolArray  # (E, T) label
    agrees: BoolArray  # (E, T) the full model's best token
    confidences: dict[str, FloatArray]  # kind -> (E, T)
    two_best: FloatArray | None = None  # (2, E, T) probabilities of the two best tokens of each read-out

    @property
    def row(self) -> IntArray:
        """Number (T,) of the row that each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def may_exit(self) -> BoolArray:
        """Whether each token (T,) may leave early: all may but the first of each row."""
        allowed = np.ones(sum(self.lengths), dtype=np.bool_)
        allowed[np.cumsum([0, *self.lengths[:-1]])] = False
        return allowed

    @property
    def agrees_or_stays(self) -> BoolArray:
        """Agreement (E + 1, T) by the exit at which a token leaves; index E, no exit, always agrees."""
        return np.vstack([self.agrees, np.ones((1, self.agrees.shape[1]), dtype=np.bool_)])


@torch.no_grad()
def observe(
    frozen: FrozenPass,
    classifiers: ExitClassifiers,
    rows: Sequence[Sequence[int]],
    tokens_at_once: int,
    two_best: bool = False,
) -> Observations:
    """Runs held-out rows through the backbone and all classifiers; ``two_best``: keep what read-outs are sure of."""
    within, agrees, surest = [], [], []
    confidences: dict[str, list[FloatArray]] = {kind: [] for kind in classifiers.kinds}
    for part in in_parts(rows, tokens_at_once):
        batch = frozen.run(part)
        positions = torch.arange(batch.rows.num_tokens, device=frozen.backbone.device)
        labels = frozen.label(batch, positions, classifiers, two_best=two_best)
        if labels.two_best is not None:
            surest.append(labels.two_best.permute(2, 0, 1).double().cpu().numpy())
        within.append(labels.within_k.cpu().numpy())
        agrees.append(labels.agrees.cpu().numpy())
        for kind in classifiers.kinds:
            probabilities = [
                exit_probability(classifiers.at(kind, layer)(batch.exits[layer].float(), batch.rows)[0])
                for layer in frozen.exit_layers
            ]
            confidences[kind].append(torch.stack(probabilities).double().cpu().numpy())
    return Observations(
        tuple(len(row) for row in rows),
        np.concatenate(within, axis=1),
        np.concatenate(agrees, axis=1),
        {kind: np.concatenate(parts, axis=1) for kind, parts in confidences.items()},
        np.concatenate(surest, axis=2) if two_best else None,
    )


def in_parts(rows: Sequence[AnyRow], tokens_at_once: int) -> list[list[AnyRow]]:
    """Returns rows, whose length is their number of tokens, in batches of at most so many tokens, or of one row."""
    parts: list[list[AnyRow]] = []
    tokens_left = 0
    for row in rows:
        if not parts or len(row) > tokens_left:
            parts.append([])
            tokens_left = tokens_at_once
        parts[-1].append(row)
        tokens_left -= len(row)
    return parts
