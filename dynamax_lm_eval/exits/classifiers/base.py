"""What every kind of exit classifier is: a normalisation of its own, two logits, a cost, and what it is made of.

T tokens, R rows, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerState
from dynamax_lm_eval.compute.cost import EvaluationCost
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions

EPS = 1e-5


class RmsNorm(nn.RMSNorm):
    """Root-mean-square normalisation; on a CPU torch's own takes several times as long as these operations."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return F.rms_norm(x, self.normalized_shape, self.weight, EPS)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight


class Classifier(nn.Module, ABC):
    """A classifier at one exit layer."""

    #: Whether it carries a state from token to token.
    recurrent: ClassVar[bool] = False
    #: The sizes of :class:`ClassifierOptions` that decide how it is made.
    sizes: ClassVar[tuple[str, ...]] = ()
    #: Linear layers with nearly all of its weights, which on a GPU are read in the backbone's dtype.
    narrowed: ClassVar[tuple[str, ...]] = ()
    #: Its last layer, which gives the two logits.
    out_proj: nn.Linear

    def __init__(self, hidden_size: int, normalize: bool = True) -> None:
        """``normalize``: False takes hidden states as they come."""
        super().__init__()
        self.norm = RmsNorm(hidden_size) if normalize else nn.Identity()

    @classmethod
    def make(cls, hidden_size: int, activation: str, options: ClassifierOptions) -> Classifier:
        """Returns a freshly initialised classifier of these sizes; the global random stream decides its weights.

        Every kind of the table has this. ``activation``: transformers' name of the backbone's.
        """
        raise NotImplementedError(f"{cls.__name__} is no kind of the table")

    @property
    @abstractmethod
    def macs(self) -> int:
        """MACs of one evaluation for one token; norms and activations are left out."""

    @property
    def cost(self) -> EvaluationCost:
        """Cost of one evaluation, also in the paper's table, where the linear classifier costs nothing."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        return EvaluationCost(self.macs, weights if len(linears) > 1 else 0)

    @abstractmethod
    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Returns logits (T, 2) of "stay" and "exit" for hidden states (T, D), and the rows' new state if it has one.

        ``rows`` and ``state`` matter to recurrent classifiers only; a state of None is that of a new row.
        """

    @torch.no_grad()
    def rescale(self, scale: float, shift: float) -> None:
        """Lets the log-odds of "exit", z, be ``scale`` * z + ``shift`` from now on."""
        self.out_proj.weight.mul_(scale)
        self.out_proj.bias.mul_(scale)
        self.out_proj.bias.add_(self.out_proj.bias.new_tensor([-shift / 2, shift / 2]))

    def new_state(self, num_rows: int, device: torch.device) -> MixerState | None:
        """Returns the state of rows that have seen nothing; None without recurrence."""
        return None


def width(expand: float, hidden_size: int) -> int:
    """A width that is given in hidden sizes, in channels; at least one."""
    return max(1, round(expand * hidden_size))


def exit_probability(logits: Tensor) -> Tensor:
    """Probability of "exit" (T,) in float32, from logits (T, 2)."""
    logits = logits.float()
    return torch.sigmoid(logits[:, 1] - logits[:, 0])
