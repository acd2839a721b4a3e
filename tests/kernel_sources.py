"""The kernels of mamba-ssm and causal-conv1d as they are released, without their compiled parts, on a CPU.

Triton's interpreter runs those of mamba-ssm. Those of causal-conv1d are CUDA: its Python runs as released, and what it
calls of its compiled module is its own reference in torch. ``KERNEL_SOURCES`` names the folder in which the source
distributions are unpacked (``make kernels`` fetches them).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_engine import KernelsOnCpu
from torch import Tensor

from dynamax_lm_eval.backbones.mamba.kernels import ConvKernels


class _OneConfiguration:
    """A kernel with the first of the configurations that it would try on a GPU."""

    def __init__(self, kernel: Any, configurations: Any) -> None:
        self.kernel = kernel
        self.configs = configurations
        self.sizes = configurations[0].kwargs

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            shape = (lambda meta: grid({**meta, **self.sizes})) if callable(grid) else grid
            return self.kernel.run(*args, grid=shape, warmup=False, **kwargs, **self.sizes)

        return launch

    def run(self, *args: Any, grid: Any, **kwargs: Any) -> Any:
        return self.kernel.run(*args, grid=grid, **kwargs, **self.sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


def load() -> KernelsOnCpu:
    """Returns the kernels.

    The packages are made without their ``__init__``, which wants compiled extensions. Autotuning wants a GPU, and the
    interpreter multiplies bfloat16 as bit patterns; both are replaced.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1"
    triton: Any = importlib.import_module("triton")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils", "causal_conv1d"):
        root, *folders = name.split(".")
        (sources,) = Path(os.environ["KERNEL_SOURCES"]).glob(f"{root}-*/{root}")
        package = types.ModuleType(name)
        package.__path__ = [str(sources.joinpath(*folders))]
        sys.modules[name] = package

    def autotune(configs: Any, key: Any, **_: Any) -> Any:
        return lambda kernel: _OneConfiguration(kernel, configs)

    def product(_: Any, a: Any, b: Any, c: Any, *__: Any) -> Any:
        values = np.matmul(_decoded(triton, a), _decoded(triton, b), dtype=c.data.dtype) + c.data
        return interpreter.TensorHandle(values, c.dtype.scalar)

    triton.autotune = autotune
    interpreter.InterpreterBuilder.create_dot = product
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment,misc]
    names = ("ssd_combined", "selective_state_update", "layernorm_gated")
    combined, update, norm = (importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in names)
    compiled: Any = types.ModuleType("causal_conv1d_cuda")
    sys.modules[compiled.__name__] = compiled
    conv = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    compiled.causal_conv1d_fwd = _forward_by(conv.causal_conv1d_ref)
    compiled.causal_conv1d_update = _update_by(conv.causal_conv1d_update_ref)
    compiled.causal_conv1d_bwd = None
    return KernelsOnCpu(
        combined.mamba_chunk_scan_combined,
        update.selective_state_update,
        norm.rmsnorm_fn,
        ConvKernels(conv.causal_conv1d_fn, conv.causal_conv1d_update),
    )


def _decoded(triton: Any, handle: Any) -> Any:
    values = handle.data
    if handle.dtype.scalar == triton.language.bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _forward_by(reference: Any) -> Any:
    """Returns the compiled module's forward: its checks (csrc/causal_conv1d.cpp), then the package's reference."""

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Any, states: Any, out: Tensor, last: Any, silu: bool
    ) -> None:
        assert seq_idx is not None and states is None and last is None
        assert x.stride(1) == 1 and x.stride(2) > 1  # channels last
        assert x.shape[1] % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0 and out.stride(1) == 1  # it reads and writes 16 bytes at once
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (len(x), x.shape[2])
        _check_weights(x, weight, bias)
        out.copy_(reference(x, weight, bias, activation="silu" if silu else None, seq_idx=seq_idx))

    return forward


def _update_by(reference: Any) -> Any:
    """Returns the compiled module's update, in the same way; the reference takes no indices."""

    def update(
        x: Tensor, state: Tensor, weight: Tensor, bias: Any, out: Tensor, silu: bool, seqlens: Any, indices: Any
    ) -> None:
        assert seqlens is None and state.dtype == x.dtype
        assert state.shape[1:] == (x.shape[1], weight.shape[1] - 1)
        _check_weights(x, weight, bias)
        lines = torch.arange(len(state))
        if indices is not None:
            assert indices.dtype == torch.int32 and indices.stride(0) == 1 and len(indices) == len(x)
            lines = indices.long()
        own = state[lines]
        out.copy_(reference(x, own, weight, bias, "silu" if silu else None))
        state[lines] = own

    return update


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert 2 <= weight.shape[1] <= 4 and weight.shape[0] == x.shape[1]
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
