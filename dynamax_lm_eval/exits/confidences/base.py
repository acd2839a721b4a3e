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
        logits: (T, V), or (T, N) of a part of the vocabulary, read out at the exit; only for confidences made of them.
        log_odds: (T,) of "exit", by the classifier that proposed them; of cascades alone.
    """

    layer: int
    before: Tensor
    after: Tensor
    slots: IntArray
    classifiers: ClassifierStates
    logits: Tensor | None = None
    log_odds: Tensor | None = None

    def part(self, tokens: slice, logits: Tensor) -> ExitInputs:
        """Returns what is known of some of the tokens, with their logits."""
        before, after, slots = self.before[tokens], self.after[tokens], self.slots[tokens]
        log_odds = None if self.log_odds is None else self.log_odds[tokens]
        return self._replace(before=before, after=after, slots=slots, logits=logits, log_odds=log_odds)


class Confidence(ABC):
    """How sure an exit is that a token may leave there; a token leaves where this reaches its threshold."""

    #: What policies call it; the kind of a trained one.
    name: str
    #: Whether an evaluation reads all of the LM head, which gives the logits of a token that leaves, too.
    reads_lm_head: bool = False
    #: How many tokens of the vocabulary an evaluation reads, where that is a part of them.
    vocab_subset: int | None = None
    #: Whether it looks at the hidden states before the block.
    reads_before: ClassVar[bool] = False
    #: Whether it carries a state from token to token of a row.
    recurrent: bool = False

    @classmethod
    def make(cls, classifier: ClassifierKind | None, vocab_subset: int | None) -> Confidence:
        """Returns the confidence of a policy.

        Args:
            classifier: the kind of a trained one.
            vocab_subset: so many tokens are looked at, by one that is made of logits; None: all of the vocabulary.
        """
        return cls()

    @abstractmethod
    def score(self, inputs: ExitInputs) -> Tensor:
        """Returns the confidence of each token, (T,) in [0, 1], float32."""

    def cost(self, layer: int, classifiers: ExitClassifiers | None, hidden_size: int) -> EvaluationCost:
        """Returns what one evaluation at an exit layer costs, without a read of all of the LM head.

        Args:
            layer: the exit layer.
            classifiers: the trained exits of the backbone, if there are any.
            hidden_size: of the backbone.
        """
        return EvaluationCost()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class LogitsConfidence(Confidence):
    """A confidence that is made of logits."""

    def __init__(self, vocab_subset: int | None = None) -> None:
        """``vocab_subset``: of so many tokens; None: of all, which the token that leaves is chosen from as well."""
        self.vocab_subset = vocab_subset
        self.reads_lm_head = vocab_subset is None

    @classmethod
    def make(cls, classifier: ClassifierKind | None, vocab_subset: int | None) -> LogitsConfidence:
        return cls(vocab_subset)

    def cost(self, layer: int, classifiers: ExitClassifiers | None, hidden_size: int) -> EvaluationCost:
        return EvaluationCost(lm_head_macs=hidden_size * (self.vocab_subset or 0))
