"""Exit classifiers: small networks on the hidden state at an exit layer, each giving the probability of "exit".

``calm`` is a linear layer, ``ffn`` one hidden layer of four times the width, ``mamba`` a Mamba-2 block without
its skip connection, recurrent over the tokens that reach it. All begin with a normalisation of their own.
Knows hidden states of flat ragged rows; knows no thresholds, policies or files.

T tokens, R rows, D hidden size; H heads, P head dim, G groups, N SSM state, K kernel, C channels of the mixer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, MixerState, RaggedRows, causal_conv, selective_scan
from dynamax_lm_eval.compute.cost import ClassifierCost
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.adapters import Adapter, make_adapters

#: Time steps that a fresh Mamba classifier starts with, log-uniform (Mamba's own initialisation).
_FIRST_STEPS = (1e-3, 1e-1)
_EPS = 1e-5


@dataclass(frozen=True)
class ClassifierOptions:
    """Sizes that the user may choose; all of them decide what an evaluation costs."""

    #: N, the SSM state of the Mamba classifier.
    mamba_state: int = 16
    #: Its inner width in units of D. Wider ones detect a little better and cost more than that gains (docs/search.md).
    mamba_expand: float = 0.25
    #: K, tokens that its convolution sees.
    mamba_kernel: int = 4
    #: Width of the FFN classifier's hidden layer in units of D.
    ffn_expand: float = 4.0

    def __post_init__(self) -> None:
        for name, least in (("mamba_state", 1), ("mamba_kernel", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("mamba_expand", "ffn_expand"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a finite number above 0, got {getattr(self, name)}")


class _RmsNorm(nn.RMSNorm):
    """In plain operations: torch's own takes several times as long on a few tokens on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * self.weight


class Classifier(nn.Module, ABC):
    """A classifier at one exit layer."""

    #: Whether it carries a state from token to token.
    recurrent = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = _RmsNorm(hidden_size, eps=_EPS)

    @property
    @abstractmethod
    def macs(self) -> int:
        """MACs of one evaluation for one token; norms and activations are left out."""

    @property
    def cost(self) -> ClassifierCost:
        """Cost of one evaluation, also in the paper's table, where the linear classifier costs nothing."""
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        return ClassifierCost(self.macs, weights if len(linears) > 1 else 0)

    @abstractmethod
    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Logits (T, 2) of "stay" and "exit" for hidden states (T, D), and the rows' new state if it has one.

        ``rows`` and ``state`` matter to recurrent classifiers only; a state of None is that of a new row.
        """

    def new_state(self, num_rows: int, device: torch.device) -> MixerState | None:
        """The state of rows that have seen nothing."""
        return None


class CalmClassifier(Classifier):
    """One linear layer (CALM, Schuster et al. 2022, section 3.4)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.out_proj = nn.Linear(hidden_size, 2)

    @property
    def macs(self) -> int:
        return self.out_proj.weight.numel()

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        return self.out_proj(self.norm(hidden)), None


class FfnClassifier(Classifier):
    """D -> ffn_expand * D -> 2 with the backbone's activation."""

    def __init__(self, hidden_size: int, width: int, activation: str) -> None:
        super().__init__(hidden_size)
        self.in_proj = nn.Linear(hidden_size, width)
        self.out_proj = nn.Linear(width, 2)
        self.activation = ACT2FN[activation]

    @property
    def macs(self) -> int:
        return self.in_proj.weight.numel() + self.out_proj.weight.numel()

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        return self.out_proj(self.activation(self.in_proj(self.norm(hidden)))), None


class MambaClassifier(Classifier):
    """A Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060) without skip connection, whose output has two channels.

    Training and scoring run it in parallel, decoding token by token; both give the same.
    """

    recurrent = True

    def __init__(self, hidden_size: int, shape: MixerShape) -> None:
        super().__init__(hidden_size)
        self.shape = shape
        self.in_proj = nn.Linear(hidden_size, shape.inner + shape.channels + shape.heads, bias=False)
        bound = 1 / math.sqrt(shape.kernel)
        self.conv_weight = nn.Parameter(torch.empty(shape.channels, shape.kernel).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.zeros(shape.channels))
        low, high = (math.log(step) for step in _FIRST_STEPS)
        steps = torch.empty(shape.heads).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(shape.heads))
        self.gate_norm = _RmsNorm(shape.inner, eps=_EPS)
        self.out_proj = nn.Linear(shape.inner, 2)

    @property
    def macs(self) -> int:
        """Projections, convolution, and 3 * H * P * N of the recurrence."""
        shape = self.shape
        recurrence = 3 * shape.inner * shape.state
        return self.in_proj.weight.numel() + self.conv_weight.numel() + recurrence + self.out_proj.weight.numel()

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        assert rows is not None
        shape = self.shape
        projected = self.in_proj(self.norm(hidden))
        gate, mixed, dt = projected.split([shape.inner, shape.channels, shape.heads], dim=-1)
        conv, ssm = (None, None) if state is None else state
        mixed, conv = causal_conv(mixed.float(), self.conv_weight, self.conv_bias, rows, conv)
        steps = F.softplus(dt.float() + self.dt_bias)
        mixed = F.silu(mixed)
        output, ssm = selective_scan(mixed, steps, -self.A_log.exp(), shape, rows, ssm)  # (T, H, P)
        x = mixed[:, : shape.inner].unflatten(-1, (shape.heads, shape.head_dim))
        output = (output + x * self.D.unsqueeze(-1)).flatten(1)
        after = None if ssm is None else MixerState(conv, ssm)
        return self.out_proj(self.gate_norm(output * F.silu(gate))), after

    def new_state(self, num_rows: int, device: torch.device) -> MixerState:
        shape = self.shape
        return MixerState(
            torch.zeros(num_rows, shape.kernel - 1, shape.channels, device=device),
            torch.zeros(num_rows, shape.heads, shape.head_dim, shape.state, device=device),
        )


def make_classifier(kind: str, hidden_size: int, activation: str, options: ClassifierOptions) -> Classifier:
    """A freshly initialised classifier; the global random stream decides its weights."""
    if kind == "calm":
        return CalmClassifier(hidden_size)
    if kind == "ffn":
        return FfnClassifier(hidden_size, max(1, round(options.ffn_expand * hidden_size)), activation)
    if kind == "mamba":
        return MambaClassifier(hidden_size, _mixer_shape(hidden_size, options))
    raise UserError(f"classifier must be one of calm, ffn, mamba, got {kind!r}")


def confidence_of(logits: Tensor) -> Tensor:
    """Probability of "exit" (T,) in float32, from logits (T, 2)."""
    logits = logits.float()
    return torch.sigmoid(logits[:, 1] - logits[:, 0])


def _mixer_shape(hidden_size: int, options: ClassifierOptions) -> MixerShape:
    inner = max(1, round(options.mamba_expand * hidden_size))
    head_dim = max(size for size in range(1, 65) if inner % size == 0)
    return MixerShape(inner // head_dim, head_dim, 1, options.mamba_state, options.mamba_kernel)


class ExitClassifiers(nn.Module):
    """Classifiers of one or more kinds at the exit layers of one backbone, and the adapters of its read-outs."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        exit_layers: tuple[int, ...],
        hidden_size: int,
        activation: str,
        options: ClassifierOptions,
        seed: int = 0,
        adapter: str = "none",
    ) -> None:
        """``seed`` decides the initial weights of each kind, whichever others there are."""
        super().__init__()
        self.exit_layers = exit_layers
        self.kinds = kinds
        self.adapters = make_adapters(adapter, exit_layers, hidden_size)
        self.by_kind = nn.ModuleDict()
        for kind in kinds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.by_kind[kind] = nn.ModuleDict(
                    {str(layer): make_classifier(kind, hidden_size, activation, options) for layer in exit_layers}
                )

    def at(self, kind: str, layer: int) -> Classifier:
        """The classifier of a kind at an exit layer."""
        classifiers: Any = self.by_kind[kind]
        found: Classifier = classifiers[str(layer)]
        return found

    def adapter(self, layer: int) -> Adapter | None:
        """The adapter at an exit layer, if these exits have any."""
        adapters: Any = self.adapters
        return adapters[str(layer)] if len(adapters) else None

    def adapter_macs(self) -> dict[int, int]:
        """MACs of one read-out's correction at each exit layer; empty without adapters."""
        found = {layer: self.adapter(layer) for layer in self.exit_layers}
        return {layer: adapter.macs for layer, adapter in found.items() if adapter is not None}

    def costs(self, kind: str) -> dict[int, ClassifierCost]:
        """Cost of one evaluation at each exit layer."""
        return {layer: self.at(kind, layer).cost for layer in self.exit_layers}
