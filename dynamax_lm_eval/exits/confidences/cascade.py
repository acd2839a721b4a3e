"""``cascade``: a classifier proposes, and the read-out that an exit needs anyway confirms. T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.confidences.base import Confidence, ExitInputs
from dynamax_lm_eval.exits.confidences.trained import TrainedConfidence
from dynamax_lm_eval.exits.confirmers import best_two
from dynamax_lm_eval.types import ClassifierKind, Confirm


class CascadeConfidence(Confidence):
    """How sure an exit is of its token, which is read out only where a classifier is sure enough.

    A proposal that the read-out confirms costs nothing more, for that read gives the token; one that it refuses costs
    a read. What confirms is the probability of the best token, or what the exits have fitted to it and the classifier.
    """

    def __init__(
        self, kind: ClassifierKind, propose: float, vocab_subset: int | None = None, confirm: Confirm = "read_out"
    ) -> None:
        """
        Args:
            kind: of the classifier.
            propose: its confidence from which on the read-out is asked.
            vocab_subset: so many tokens are read; None: all.
            confirm: ``read_out``, or ``fitted``, by the confirmer of the exits.
        """
        self.name = "cascade"
        self.propose = propose
        self.vocab_subset = vocab_subset
        self.confirm = confirm
        self.classifier = TrainedConfidence(kind)
        self.recurrent = self.classifier.recurrent

    def score(self, inputs: ExitInputs) -> Tensor:
        assert inputs.logits is not None, "proposals are read out"
        if self.confirm == "read_out":
            return torch.softmax(inputs.logits.float(), dim=-1).amax(dim=-1)
        assert inputs.log_odds is not None, "proposals were made by the classifier"
        confirmer = inputs.classifiers.confirmer(self.classifier.name, inputs.layer)
        sure: Tensor = confirmer(inputs.log_odds.to(inputs.logits.device), best_two(inputs.logits))
        return sure

    def cost(self, layer: int, classifiers: ExitClassifiers | None, hidden_size: int) -> EvaluationCost:
        return self.classifier.cost(layer, classifiers, hidden_size)
