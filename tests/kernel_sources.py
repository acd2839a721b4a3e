"""The Triton sources of mamba-ssm as they are released, without its compiled parts, for Triton's interpreter on a CPU.

``KERNEL_SOURCES`` names the folder in which the source distribution is unpacked (``make kernels`` fetches it).
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


def load() -> tuple[Any, Any]:
    """Returns the modules ``ssd_combined`` and ``selective_state_update`` of mamba-ssm.

    Its packages are made without their ``__init__``, which wants compiled extensions. Autotuning wants a GPU, and the
    interpreter multiplies bfloat16 as bit patterns; both are replaced.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1"
    triton: Any = importlib.import_module("triton")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    (root,) = Path(os.environ["KERNEL_SOURCES"]).glob("mamba_ssm-*/mamba_ssm")
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package

    def autotune(configs: Any, key: Any, **_: Any) -> Any:
        return lambda kernel: _OneConfiguration(kernel, configs)

    def product(_: Any, a: Any, b: Any, c: Any, *__: Any) -> Any:
        values = np.matmul(_decoded(triton, a), _decoded(triton, b), dtype=c.data.dtype) + c.data
        return interpreter.TensorHandle(values, c.dtype.scalar)

    triton.autotune = autotune
    interpreter.InterpreterBuilder.create_dot = product
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment,misc]
    modules = ("ssd_combined", "selective_state_update")
    combined, update = (importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in modules)
    return combined, update


def _decoded(triton: Any, handle: Any) -> Any:
    values = handle.data
    if handle.dtype.scalar == triton.language.bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
