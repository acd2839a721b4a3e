"""``hybrid``: a Mamba-2 mixer carries the state of the text, and a feed-forward layer decides.

T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dynamax_lm_eval.backbones.mamba.ssm import MixerShape
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import width
from dynamax_lm_eval.exits.classifiers.mamba import MixerClassifier, mixer_shape


class HybridClassifier(MixerClassifier):
    """The mixer's output beside the normalised hidden state -> hybrid_expand * D -> 2, with the backbone's activation.

    What the mixer remembers of the text thus reaches the decision together with all that the token itself shows.
    """

    sizes = (*MixerClassifier.sizes, "hybrid_expand")

    def __init__(
        self, hidden_size: int, shape: MixerShape, inner: int, activation: str, normalize: bool = True
    ) -> None:
        """``inner``: width of the feed-forward layer."""
        super().__init__(hidden_size, shape, normalize)
        self.hidden_proj = nn.Linear(shape.inner + hidden_size, inner)
        self.out_proj = nn.Linear(inner, 2)
        self.activation = ACT2FN[activation]

    @classmethod
    def make(cls, hidden_size: int, activation: str, options: ClassifierOptions) -> HybridClassifier:
        shape = mixer_shape(hidden_size, options)
        return cls(hidden_size, shape, width(options.hybrid_expand, hidden_size), activation, options.normalize)

    @property
    def macs(self) -> int:
        return self.mixer_macs + self.hidden_proj.weight.numel() + self.out_proj.weight.numel()

    def decide(self, output: Tensor, normalised: Tensor) -> Tensor:
        both = torch.cat([output, normalised], dim=-1)
        logits: Tensor = self.out_proj(self.activation(self.hidden_proj(both)))
        return logits
