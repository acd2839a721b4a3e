"""What a scan needs of a mixer's parameters, cast once for all passes.

Knows parameters; knows no modules, rows or states.

C channels of the convolution, K its kernel, H heads, P head dim, I inner width of Mamba-1, N SSM state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class ScanConstants(NamedTuple):
    """Constants of a scan in float32; those of Mamba-2 are (H,) or (H, P, N), of Mamba-1 (I,) or (I, N)."""

    conv_weight: Tensor  # (C, K)
    conv_bias: Tensor | None  # (C,)
    dt_bias: Tensor  # (H,) or (I,)
    decay: Tensor  # (H,) or (I, N), negative
    skip: Tensor  # (H,) or (I,), D


class ScanParameters:
    """The parameters that the constants are made of, and the constants as long as the parameters are the same.

    Under gradients they are cast anew at every call. Otherwise other parameters, other memory (``.to()``), every change
    in place that torch counts and every step of an optimizer make them anew; only changes through ``.data`` do not.
    """

    def __init__(self) -> None:
        self._parameters: tuple[Tensor | None, ...] = ()
        self._versions: tuple[tuple[int, int, int] | None, ...] = ()
        self._constants: ScanConstants | None = None

    def constants(
        self, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a_log: Tensor, skip: Tensor
    ) -> ScanConstants:
        """Returns the constants of these parameters; ``conv_weight``: (C, 1, K) or (C, K)."""
        if torch.is_grad_enabled():
            return _cast(conv_weight, conv_bias, dt_bias, a_log, skip)
        parameters = (conv_weight, conv_bias, dt_bias, a_log, skip)
        versions = tuple(map(_version, parameters))
        if (
            self._constants is None
            or versions != self._versions
            or any(known is not given for known, given in zip(self._parameters, parameters, strict=True))
        ):
            self._constants = _cast(*parameters)
            self._parameters, self._versions = parameters, versions
        return self._constants


class _OptimizerSteps:
    """The steps of all optimizers: fused ones change parameters without torch's counting it."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


_steps = _OptimizerSteps()


def _version(parameter: Tensor | None) -> tuple[int, int, int] | None:
    """Returns what tells apart the values that a parameter has had."""
    if parameter is None:
        return None
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, _steps.count


def _cast(conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a_log: Tensor, skip: Tensor) -> ScanConstants:
    return ScanConstants(
        conv_weight=(conv_weight.squeeze(1) if conv_weight.ndim == 3 else conv_weight).float(),
        conv_bias=None if conv_bias is None else conv_bias.float(),
        dt_bias=dt_bias.float(),
        decay=-a_log.float().exp(),
        skip=skip.float(),
    )
