"""The CUDA kernels of mamba-ssm and causal-conv1d, where they are installed: calls on flat ragged rows.

States stay where they are: the kernels of single tokens move lines of a table on. Knows tensors; knows no modules.

T tokens of R rows, C channels, K conv kernel, H heads, P head dim, G groups, N SSM state, I inner width.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.constants import ScanConstants
from dynamax_lm_eval.models.loading import described
from dynamax_lm_eval.types import MambaKernels

logger = logging.getLogger(__name__)

#: Tokens of a chunk, which is what the kernels were tuned for.
_CHUNK = 256
#: A raw step size whose softplus is 0 with any bias, also in float16.
_NO_STEP = -1e4


@dataclass(frozen=True)
class ConvKernels:
    """The two functions of causal-conv1d."""

    whole: Callable[..., Any]  # causal_conv1d_fn
    update: Callable[..., Tensor]  # causal_conv1d_update

    @staticmethod
    def take(channels: int, kernel: int, activation: str) -> bool:
        """Returns whether they are made for a convolution of C channels and kernel K."""
        return 2 <= kernel <= 4 and channels % 8 == 0 and activation in ("silu", "swish")

    def step(self, x: Tensor, table: Tensor, indices: Tensor | None, constants: ScanConstants) -> Tensor:
        """Returns silu of the convolution of one token per row, (R, C), and moves the windows on.

        Args:
            x: (R, C), in the dtype of the table.
            table: (lines, K - 1, C)
            indices: (R,) int32, the rows' lines; None: all, in order.
            constants: of the mixer.
        """
        weight, bias = constants.conv_weight, constants.conv_bias
        return self.update(x, table.transpose(1, 2), weight, bias, "silu", conv_state_indices=indices)

    def rows(self, x: Tensor, row_of: Tensor, constants: ScanConstants) -> Tensor:
        """Returns silu of the convolution of rows side by side, (T, C), which see nothing before their first tokens.

        Args:
            x: (T, C)
            row_of: (T,) int32, which row each token is in.
            constants: of the mixer.
        """
        if x.stride(0) % 8 or x.data_ptr() % 16:  # it reads 16 bytes at once
            x = x.contiguous()
        output: Tensor = self.whole(
            x.T.unsqueeze(0),
            constants.conv_weight,
            constants.conv_bias,
            seq_idx=row_of.unsqueeze(0),
            activation="silu",
        )
        return output.squeeze(0).T


@dataclass(frozen=True)
class ScanKernels:
    """The functions of mamba-ssm, and those of causal-conv1d where they are there too."""

    chunk_scan: Callable[..., Any]  # mamba_chunk_scan_combined
    state_update: Callable[..., Tensor]  # selective_state_update
    gated_norm: Callable[..., Tensor]  # rmsnorm_fn
    conv: ConvKernels | None = None

    def can_run(self, inputs: Tensor) -> bool:
        """Returns whether the kernels take these tensors."""
        return inputs.is_cuda and not inputs.requires_grad

    def conv_for(self, channels: int, kernel: int, activation: str) -> ConvKernels | None:
        """Returns the convolution's kernels, where they take one of C channels and kernel K."""
        return self.conv if self.conv is not None and self.conv.take(channels, kernel, activation) else None

    def step(
        self, table: Tensor, indices: Tensor | None, x: Tensor, steps: StepSizes, constants: ScanConstants, *bc: Tensor
    ) -> Tensor:
        """Returns the read-outs (R, H, P) of one token per row, with the skip term, and moves the states on.

        Args:
            table: (lines, H, P, N) float32; of Mamba-1 (lines, I, N).
            indices: (R,) int32, the rows' lines; None: all, in order.
            x: (R, H, P); of Mamba-1 (R, I).
            steps: (R, H); of Mamba-1 (R, I).
            constants: of the mixer.
            bc: B and C (R, G, N); of Mamba-1 (R, N).
        """
        dt, bias, decay, skip = steps.dt, steps.bias, constants.decay, constants.skip
        if table.ndim == 4:
            # The kernel knows by their strides of 0 that these are one number per head.
            dt, bias, skip = (v.unsqueeze(-1).expand(*v.shape, table.shape[2]) for v in (dt, bias, skip))
            decay = decay.view(-1, 1, 1).expand(table.shape[1:])
        # No released kernel runs without a bias and a skip term.
        return self.state_update(
            table, x, dt, decay, *bc, skip, dt_bias=bias, dt_softplus=steps.raw, state_batch_indices=indices
        )

    def new_rows(
        self, x: Tensor, steps: StepSizes, constants: ScanConstants, b: Tensor, c: Tensor, row_of: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs rows side by side that have seen nothing.

        Args:
            x: (T, H, P)
            steps: (T, H)
            constants: of the mixer.
            b: (T, G, N)
            c: (T, G, N)
            row_of: (T,) int32, which row each token is in.
            ends: (R + 1,) int32, where the rows end, from 0.

        Returns:
            (T, H, P) with the skip term, and the states after each row (R, H, P, N) in float32.
        """
        given = (values.unsqueeze(0) for values in (b, c))
        output, after = self._chunks(
            x.unsqueeze(0),
            steps._replace(dt=steps.dt.unsqueeze(0)),
            constants,
            *given,
            seq_idx=row_of.unsqueeze(0),
            cu_seqlens=ends,
            return_varlen_states=True,
        )
        return output.squeeze(0), after

    def go_on(
        self, x: Tensor, steps: StepSizes, constants: ScanConstants, b: Tensor, c: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs rows that have a past, padded to the longest: x (R, L, H, P), steps (R, L, H), states (R, H, P, N).

        Padded tokens have steps of 0, which leave a state as it is.

        Returns:
            (R, L, H, P) with the skip term, and the new states.
        """
        output, after = self._chunks(x, steps, constants, b, c, initial_states=states, return_final_states=True)
        return output, after

    def _chunks(
        self, x: Tensor, steps: StepSizes, constants: ScanConstants, b: Tensor, c: Tensor, **options: Any
    ) -> Any:
        with _float32_products("ieee" if x.dtype == torch.float32 else "tf32"):
            return self.chunk_scan(
                x,
                steps.dt,
                constants.decay,
                b,
                c.float(),  # the states after rows come back in its dtype
                chunk_size=_CHUNK,
                D=constants.skip,
                dt_bias=steps.bias,
                dt_softplus=steps.raw,
                **options,
            )

    def norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
        """Returns the root-mean-square norm of x * silu(gate), (T, I)."""
        options = {"eps": eps, "group_size": group_size, "norm_before_gate": False}
        return self.gated_norm(x, weight, None, z=gate, **options)


class StepSizes(NamedTuple):
    """Step sizes as a kernel takes them: raw ones whose bias and softplus it applies, or finished ones."""

    dt: Tensor  # (T, H), or (T, I) of Mamba-1
    bias: Tensor  # (H,) or (I,)
    raw: bool

    @classmethod
    def of(cls, dt: Tensor, bias: Tensor, limits: tuple[float, float] = (0.0, math.inf)) -> StepSizes:
        """Returns the step sizes of raw ones (T, H), which lie in ``limits`` after bias and softplus."""
        if limits == (0.0, math.inf):
            return cls(dt, bias, raw=True)
        # The kernel of single tokens knows no limits.
        return cls(F.softplus(dt.float() + bias).clamp(*limits), torch.zeros_like(bias), raw=False)

    def with_none(self) -> StepSizes:
        """Returns them with one more token behind them, (T + 1, H), which is without effect."""
        none = self.dt.new_full((1, self.dt.shape[1]), _NO_STEP if self.raw else 0.0)
        return self._replace(dt=torch.cat([self.dt, none]))

    def at(self, tokens: Tensor) -> StepSizes:
        """Returns those of tokens (t,)."""
        return self._replace(dt=self.dt.index_select(0, tokens))


def find(choice: MambaKernels, device: torch.device, dtype: torch.dtype) -> ScanKernels | None:
    """Returns the kernels, if they are asked for, installed and of use on ``device``; logs which are used.

    ``dtype``: of what they run on. Products of float32 keep their precision, also in the model's own forward, or there
    are no kernels.
    """
    if device.type != "cuda" or choice == "torch":
        return None
    kernels = _installed()
    if kernels is not None and dtype == torch.float32 and not _keep_float32():
        logger.info("Mamba runs on plain torch in float32: this Triton computes float32 products in TF32 only")
        return None
    return kernels


def packages(scans: ScanKernels | None) -> str:
    """Returns the packages that kernels, or None, are of, in words."""
    if scans is None:
        return "torch"
    return "mamba-ssm" if scans.conv is None else "mamba-ssm and causal-conv1d"


@functools.cache
def _installed() -> ScanKernels | None:
    """Returns the kernels that are installed; says once which are used, and why others are not."""
    try:
        combined, update, norm = (
            importlib.import_module(f"mamba_ssm.ops.triton.{name}")
            for name in ("ssd_combined", "selective_state_update", "layernorm_gated")
        )
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            logger.info("Mamba runs on plain torch: mamba-ssm is not installed")
        else:
            logger.warning("Mamba runs on plain torch: mamba-ssm cannot be imported (%s)", described(error))
        return None
    conv = _installed_conv()
    found = ScanKernels(combined.mamba_chunk_scan_combined, update.selective_state_update, norm.rmsnorm_fn, conv)
    logger.info("Mamba runs on the kernels of %s", packages(found))
    return found


def _installed_conv() -> ConvKernels | None:
    try:
        module = importlib.import_module("causal_conv1d")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "causal_conv1d":
            logger.info("Mamba's convolutions run on plain torch: causal-conv1d is not installed")
        else:
            reason = described(error)
            logger.warning("Mamba's convolutions run on plain torch: causal-conv1d cannot be imported (%s)", reason)
        return None
    return ConvKernels(module.causal_conv1d_fn, module.causal_conv1d_update)


@functools.cache
def _language_knobs() -> Any:
    """Returns where Triton reads how float32 products are computed; None where it has no such place."""
    try:
        language = importlib.import_module("triton.knobs").language
    except (ImportError, AttributeError):
        return None
    return language if hasattr(language, "fp32_default") else None


def _keep_float32() -> bool:
    """Makes Triton compute float32 products in float32 from now on; returns whether it can.

    For the process, because it compiles a kernel once for each kind of its inputs, and the model's own forward, with
    which everything is compared at load, may come first.
    """
    language = _language_knobs()
    if language is not None:
        language.fp32_default = "ieee"
    return language is not None


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Runs with float32 products computed so: a kernel that is compiled meanwhile keeps it."""
    language = _language_knobs()
    if language is None:
        yield
        return
    with language.scope():
        language.fp32_default = precision
        yield
