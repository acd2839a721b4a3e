"""``calm``: one linear layer (CALM, Schuster et al. 2022, section 3.4). T tokens, D hidden size."""

from __future__ import annotations

from torch import Tensor, nn

from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import Classifier


class CalmClassifier(Classifier):
    """A linear layer D -> 2."""

    def __init__(self, hidden_size: int, normalize: bool = True) -> None:
        super().__init__(hidden_size, normalize)
        self.out_proj = nn.Linear(hidden_size, 2)

    @classmethod
    def make(cls, hidden_size: int, activation: str, options: ClassifierOptions) -> CalmClassifier:
        return cls(hidden_size, options.normalize)

    @property
    def macs(self) -> int:
        return self.out_proj.weight.numel()

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        return self.out_proj(self.norm(hidden)), None
