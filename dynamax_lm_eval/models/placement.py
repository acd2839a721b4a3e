"""Where the modules of a loaded model compute, and weights that are elsewhere until then.

accelerate spreads a model over devices by hooks: each hooked module moves its inputs to its device, and where its
weights are offloaded (to the CPU beside GPUs, or to disk) it loads them before it runs and drops them afterwards. Who
brings tensors to the module's device, and loads the weights first, may read the weights instead of calling the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes; ``meta`` for one without weights."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
            device = torch.device(hook.execution_device)
            # Tensors always name the number of their device.
            return torch.empty(0, device=device).device if device.index is None else device
    # Quantised layers may have nothing but buffers.
    return next(chain(module.parameters(), module.buffers())).device


def is_only_placed(attributes: Mapping[str, Any]) -> bool:
    """Returns whether a module whose forward was replaced computes what its class does.

    Args:
        attributes: of the module, its ``vars``.
    """
    if not isinstance(attributes.get("_hf_hook"), AlignDevicesHook):
        return False
    own = attributes.get("_old_forward")
    its_class: Any = type(getattr(own, "__self__", None))
    return own is not None and getattr(own, "__func__", None) is getattr(its_class, "forward", None)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; without asking torch where it is there already, which is nearly always."""
    return tensor if tensor.device == device else tensor.to(device)


class Place:
    """Where a module computes."""

    def __init__(self, module: nn.Module) -> None:
        self.device = execution_device(module)
        self._offloaded = [(part, vars(part)["forward"]) for part in module.modules() if has_offloaded_params(part)]

    @property
    def is_offloaded(self) -> bool:
        """Whether some weights are elsewhere until the module runs."""
        return bool(self._offloaded)

    def weights(self) -> AbstractContextManager[None]:
        """Returns the context in which the module's weights are on its device; its parts do not load them again."""
        return self._loaded() if self._offloaded else nullcontext()

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        with ExitStack() as stack:
            bypassed = []
            for part, hooked in self._offloaded:
                stack.enter_context(align_module_device(part))
                attributes = vars(part)
                if attributes.get("forward") is hooked:  # else somebody has replaced it for now
                    attributes["forward"] = attributes["_old_forward"]
                    bypassed.append((attributes, hooked))
            try:
                yield
            finally:
                for attributes, hooked in bypassed:
                    attributes["forward"] = hooked


def in_memory(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Returns a parameter or buffer of a model, whole and loaded where it is split or offloaded.

    It is on ``meta`` where it is nowhere. What processes share all of them have to ask for, in the same order.
    """
    if (gathered := getattr(tensor.detach(), "full_tensor", None)) is not None:  # torch's DTensor
        return gathered()  # type: ignore[no-any-return]
    if tensor.device.type != "meta":
        return tensor
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        found: Tensor = getattr(module, own_name)
        return found.detach()
