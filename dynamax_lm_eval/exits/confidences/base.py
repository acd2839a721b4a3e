"""What every confidence is, and what it may look at.

T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from dynamax_lm_eval.backbones.base import IntArray
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.states import ClassifierStates
from dynamax_lm_eval.types import ClassifierKind


class ExitInputs(NamedTuple):
    """What is known of T tokens at an exit layer, row by row and in the order of their positions.

    Attributes:
        layer: the exit layer.
        before: (T, D) hidden states before its block; those after it for confidences that do not look at them.
        after: (T, D) hidden states after it.
        slots: (T,) the place of each token's row in the states.
        classifiers: the trained exits with what they carry of the rows.
        logits: (T, V), read out at the exit; only for confidences that read the LM head.
    """

    layer: int
    before: Tensor
    after: Tensor
    slots: IntArray
    classifiers: ClassifierStates
    logits: Tensor | None = None

    def part(self, tokens: slice, logits: Tensor) -> ExitInputs:
        """Returns what is known of some of the tokens, with their logits."""
        before, after, slots = self.before[tokens], self.after[tokens], self.slots[tokens]
        return self._replace(before=before, after=after, slots=slots, logits=logits)


class Confidence(ABC):
    """How sure an exit is that a token may leave there; a token leaves where this reaches its threshold."""

    #: What policies call it; the kind of a trained one.
    name: str
    #: Whether an evaluation reads the LM head.
    reads_lm_head: ClassVar[bool] = False
    #: Whether it looks at the hidden states before the block.
    reads_before: ClassVar[bool] = False
    #: Whether it carries a state from token to token of a row.
    recurrent: bool = False

    @classmethod
    def make(cls, classifier: ClassifierKind | None) -> Confidence:
        """Returns the confidence of a policy; ``classifier`` is the kind of a trained one."""
        return cls()

    @abstractmethod
    def score(self, inputs: ExitInputs) -> Tensor:
        """Returns the confidence of each token, (T,) in [0, 1], float32."""

    def cost(self, layer: int, classifiers: ExitClassifiers | None) -> EvaluationCost:
        """Returns what one evaluation at an exit layer costs, without the LM head.

        ``classifiers``: the trained exits of the backbone, if there are any.
        """
        return EvaluationCost()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
