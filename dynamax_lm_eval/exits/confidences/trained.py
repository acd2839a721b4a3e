"""``classifier``: what a trained exit classifier says. T tokens."""

from __future__ import annotations

from torch import Tensor

from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.classifiers import CLASSIFIERS, ExitClassifiers, exit_probability
from dynamax_lm_eval.exits.confidences.base import Confidence, ExitInputs
from dynamax_lm_eval.types import ClassifierKind


class TrainedConfidence(Confidence):
    """A classifier's probability of "exit"."""

    def __init__(self, kind: ClassifierKind) -> None:
        self.name: ClassifierKind = kind
        self.recurrent = CLASSIFIERS[kind].recurrent

    @classmethod
    def make(cls, classifier: ClassifierKind | None, vocab_subset: int | None) -> TrainedConfidence:
        assert classifier is not None, "confidence=classifier goes with a kind"
        return cls(classifier)

    def score(self, inputs: ExitInputs) -> Tensor:
        return exit_probability(self.logits(inputs))

    def logits(self, inputs: ExitInputs) -> Tensor:
        """Returns the classifier's logits (T, 2) of "stay" and "exit"."""
        return inputs.classifiers.run(self.name, inputs.layer, inputs.after, inputs.slots)

    def cost(self, layer: int, classifiers: ExitClassifiers | None, hidden_size: int) -> EvaluationCost:
        assert classifiers is not None, "there is a classifier to evaluate"
        return classifiers.at(self.name, layer).cost
