"""Energy that was drawn while a model answered, read from counters of the hardware and never estimated.

NVIDIA GPUs count millijoules (NVML, package ``nvidia-ml-py``), Intel's processors microjoules (RAPL, files of the Linux
kernel that often only root may read). A GPU's counter is of the whole board, a processor's of the whole package,
whatever else runs there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Counters of the kernel: one folder per package, with its parts beside it.
_POWERCAP = Path("/sys/class/powercap")


@dataclass
class EnergyMeter:
    """Joules since it was made, of the times in which it was asked to count.

    Attributes:
        source: of the counters; None: there is none that can be read.
        reason: why, in a few words.
        joules: counted so far.
    """

    source: str | None
    reason: str | None
    joules: float = 0.0
    _counters: list[Any] = field(default_factory=list)

    @classmethod
    def on(cls, devices: list[torch.device]) -> EnergyMeter:
        """Returns the meter of what computes: GPUs, or else the processor."""
        gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        counters, reason = _nvml(gpus) if gpus else _rapl()
        if reason is not None:
            return cls(None, reason)
        return cls("nvml" if gpus else "rapl", None, _counters=counters)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is drawn meanwhile."""
        before = [counter.read() for counter in self._counters]
        try:
            yield
        finally:
            for counter, start in zip(self._counters, before, strict=True):
                self.joules += counter.since(start)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves out what is drawn meanwhile, whoever counts."""
        kept = self.joules
        try:
            yield
        finally:
            self.joules = kept

    def to_json(self, generated_tokens: int) -> dict[str, Any]:
        """Returns what a result file says; joules are null where nothing was counted, with the reason."""
        joules = self.joules if self.source is not None else None
        per_token = joules / generated_tokens if joules is not None and generated_tokens else None
        return {"joules": joules, "per_generated_token": per_token, "source": self.source, "reason": self.reason}


class _Rapl:
    """A package's counter, which begins anew at its largest value."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())

    def read(self) -> int:
        return int(self._file.read_text())

    def since(self, start: int) -> float:
        drawn = self.read() - start
        return (drawn if drawn >= 0 else drawn + self._range) / 1e6


class _Nvml:
    """A GPU's counter."""

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        # torch and NVML number GPUs in orders of their own (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER).
        uuid = torch.cuda.get_device_properties(index).uuid
        self._handle = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.read()  # older GPUs have none

    def read(self) -> int:
        millijoules: int = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return millijoules

    def since(self, start: int) -> float:
        return (self.read() - start) / 1e3


def _rapl() -> tuple[list[Any], str | None]:
    folders = sorted(path for path in _POWERCAP.glob("*:*") if path.name.count(":") == 1)
    if not folders:
        return [], "this machine has no RAPL counters"
    try:
        counters = [_Rapl(folder) for folder in folders]
        for counter in counters:
            counter.read()
    except (OSError, ValueError) as error:
        return [], f"RAPL counters cannot be read ({type(error).__name__})"
    return counters, None


def _nvml(indices: list[int]) -> tuple[list[Any], str | None]:
    try:
        import pynvml
    except ImportError:
        return [], "GPUs' counters need the package nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return [_Nvml(pynvml, index) for index in indices], None
    except pynvml.NVMLError as error:
        return [], f"NVML cannot be read ({error})"
