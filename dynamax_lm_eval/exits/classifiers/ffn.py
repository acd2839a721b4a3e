"""``ffn``: one hidden layer, with the backbone's activation. T tokens, D hidden size."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import Classifier, width


class FfnClassifier(Classifier):
    """D -> ffn_expand * D -> 2."""

    sizes = ("ffn_expand",)
    narrowed = ("in_proj",)

    def __init__(self, hidden_size: int, inner: int, activation: str, normalize: bool = True) -> None:
        """``inner``: width of the hidden layer."""
        super().__init__(hidden_size, normalize)
        self.in_proj = nn.Linear(hidden_size, inner)
        self.out_proj = nn.Linear(inner, 2)
        self.activation = ACT2FN[activation]

    @classmethod
    def make(cls, hidden_size: int, activation: str, options: ClassifierOptions) -> FfnClassifier:
        return cls(hidden_size, width(options.ffn_expand, hidden_size), activation, options.normalize)

    @property
    def macs(self) -> int:
        return self.in_proj.weight.numel() + self.out_proj.weight.numel()

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        normed = self.norm(hidden).to(self.in_proj.weight.dtype)
        inner = self.activation(self.in_proj(normed))
        return self.out_proj(inner.to(self.out_proj.weight.dtype)), None
