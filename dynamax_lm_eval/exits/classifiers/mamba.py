"""``mamba``: a Mamba-2 block without its skip connection, recurrent over the tokens that reach it.

T tokens, R rows, D hidden size; H heads, P head dim, N SSM state, K kernel, C channels of the mixer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamax_lm_eval.backbones.mamba.by_kernels import KernelScan
from dynamax_lm_eval.backbones.mamba.constants import ScanConstants, ScanParameters
from dynamax_lm_eval.backbones.mamba.groups import KernelRows
from dynamax_lm_eval.backbones.mamba.kernels import ScanKernels
from dynamax_lm_eval.backbones.mamba.rows import RaggedRows
from dynamax_lm_eval.backbones.mamba.ssm import MixerShape, MixerState, causal_conv, selective_scan
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import EPS, Classifier, RmsNorm, width

#: Time steps that a fresh mixer starts with, log-uniform (Mamba's own initialisation).
_FIRST_STEPS = (1e-3, 1e-1)


class MixerClassifier(Classifier):
    """A classifier around a Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060).

    Training and scoring run the mixer in parallel, decoding token by token; both give the same.
    """

    recurrent = True
    sizes: ClassVar[tuple[str, ...]] = ("mamba_state", "mamba_expand", "mamba_kernel")

    def __init__(self, hidden_size: int, shape: MixerShape, normalize: bool = True) -> None:
        super().__init__(hidden_size, normalize)
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
        self.gate_norm = RmsNorm(shape.inner)
        self._parameters_of_scan = ScanParameters()

    @property
    def mixer_macs(self) -> int:
        """MACs of the mixer for one token: in_proj, convolution, and 3 * H * P * N of the recurrence."""
        recurrence = 3 * self.shape.inner * self.shape.state
        return self.in_proj.weight.numel() + self.conv_weight.numel() + recurrence

    def forward(
        self, hidden: Tensor, rows: RaggedRows | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        assert rows is not None
        normalised = self.norm(hidden)
        shape, constants = self.shape, self._constants()
        gate, update = self._projected(normalised)
        mixed, dt = update.split([shape.channels, shape.heads], dim=-1)
        conv, ssm = (None, None) if state is None else state
        mixed, conv = causal_conv(mixed.float(), constants.conv_weight, constants.conv_bias, rows, conv)
        steps = F.softplus(dt.float() + constants.dt_bias)
        mixed = F.silu(mixed)
        output, ssm = selective_scan(mixed, steps, constants.decay, shape, rows, ssm)  # (T, H, P)
        x = mixed[:, : shape.inner].unflatten(-1, (shape.heads, shape.head_dim))
        output = (output + x * constants.skip.unsqueeze(-1)).flatten(1)
        after = None if ssm is None else MixerState(conv, ssm)
        return self.decide(self.gate_norm(output * F.silu(gate)), normalised), after

    def forward_in_place(self, hidden: Tensor, rows: KernelRows, table: MixerState, kernels: ScanKernels) -> Tensor:
        """Returns the logits (T, 2) by kernels; the lines of the table in which the rows' states are are moved on."""
        normalised = self.norm(hidden)
        gate, update = self._projected(normalised)
        conv = kernels.conv_for(self.shape.channels, self.shape.kernel, "silu")
        scanned = KernelScan(kernels, conv, F.silu, self._constants(), rows, table).heads(update, self.shape)
        return self.decide(kernels.norm(scanned, gate, self.gate_norm.weight, EPS, self.shape.inner), normalised)

    @abstractmethod
    def decide(self, output: Tensor, normalised: Tensor) -> Tensor:
        """Returns logits (T, 2) of the mixer's output, gated and normalised, (T, H * P), and its inputs (T, D)."""

    def _projected(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gate (T, H * P), and x, B and C with raw step sizes behind them, (T, C + H)."""
        projected = self.in_proj(normalised)
        return projected[:, : self.shape.inner], projected[:, self.shape.inner :]

    def _constants(self) -> ScanConstants:
        return self._parameters_of_scan.constants(self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D)

    def new_state(self, num_rows: int, device: torch.device) -> MixerState:
        shape = self.shape
        return MixerState(
            torch.zeros(num_rows, shape.kernel - 1, shape.channels, device=device),
            torch.zeros(num_rows, shape.heads, shape.head_dim, shape.state, device=device),
        )


class MambaClassifier(MixerClassifier):
    """A mixer whose output has two channels."""

    def __init__(self, hidden_size: int, shape: MixerShape, normalize: bool = True) -> None:
        super().__init__(hidden_size, shape, normalize)
        self.out_proj = nn.Linear(shape.inner, 2)

    @classmethod
    def make(cls, hidden_size: int, activation: str, options: ClassifierOptions) -> MambaClassifier:
        return cls(hidden_size, mixer_shape(hidden_size, options), options.normalize)

    @property
    def macs(self) -> int:
        return self.mixer_macs + self.out_proj.weight.numel()

    def decide(self, output: Tensor, normalised: Tensor) -> Tensor:
        logits: Tensor = self.out_proj(output)
        return logits


def mixer_shape(hidden_size: int, options: ClassifierOptions) -> MixerShape:
    """The shape of a classifier's mixer: heads as wide as divides its inner width, at most 64."""
    inner = width(options.mamba_expand, hidden_size)
    head_dim = max(size for size in range(1, 65) if inner % size == 0)
    return MixerShape(inner // head_dim, head_dim, 1, options.mamba_state, options.mamba_kernel)
