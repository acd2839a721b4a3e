"""``cascade``: a classifier proposes, and the read-out that an exit needs anyway confirms. T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.confidences.base import Confidence, ExitInputs
from dynamax_lm_eval.exits.confidences.trained import TrainedConfidence
from dynamax_lm_eval.types import ClassifierKind


class CascadeConfidence(Confidence):
    """The probability of the best token, read out only where a classifier is sure enough.

    A proposal that the read-out confirms costs nothing more, for that read gives the token; one that it refuses costs
    a read.
    """

    def __init__(self, kind: ClassifierKind, propose: float, vocab_subset: int | None = None) -> None:
        """
        Args:
            kind: of the classifier.
            propose: its confidence from which on the read-out is asked.
            vocab_subset: so many tokens are read; None: all.
        """
        self.name = "cascade"
        self.propose = propose
        self.vocab_subset = vocab_subset
        self.classifier = TrainedConfidence(kind)
        self.recurrent = self.classifier.recurrent

    def score(self, inputs: ExitInputs) -> Tensor:
        assert inputs.logits is not None, "proposals are read out"
        return torch.softmax(inputs.logits.float(), dim=-1).amax(dim=-1)

    def cost(self, layer: int, classifiers: ExitClassifiers | None, hidden_size: int) -> EvaluationCost:
        return self.classifier.cost(layer, classifiers, hidden_size)
