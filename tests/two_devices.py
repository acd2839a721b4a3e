"""Two devices on a CPU, ``twin:0`` and ``twin:1``: operations are computed, and raise where tensors on both are mixed.

A process that imports this has them for good, so a test runs this file as a program: models whose blocks lie on both
devices, and whose other weights are offloaded, against the same models on one.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from helpers import FAMILIES, LAYERS, random_ids, tiny_model
from helpers_architectures import architecture
from helpers_engine import (
    CLASSIFIERS,
    KINDS,
    PROMPTS,
    classifier_policy,
    run_generate,
    run_score,
    separated_policy,
)
from reference import reference_generate
from reference_any import any_generate
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dynamax_lm_eval.backbones import make_backbone
from dynamax_lm_eval.engine.engine import Engine
from dynamax_lm_eval.engine.parity import checked_engine
from dynamax_lm_eval.exits.policy import ExitPolicy
from dynamax_lm_eval.types import StateMode


class _Module:
    """What torch asks of the module of a kind of device."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


register: Any = backend_registration._setup_privateuseone_for_python_backend
register("twin", backend_module=_Module())
#: Operations whose indices may be on the CPU, as they may on real devices.
_TAKE_CPU_INDICES = ("index", "index_put_", "index_put", "_index_put_impl_")


class Twin(torch.Tensor):
    """A tensor that says it is on one of the devices."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes parameters of the class that they had
            return torch.nn.Parameter(elem, requires_grad=False)
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: Twin = make(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=device,
        )  # fmt: skip
        made.elem = elem
        return made

    # torch makes tensors of lists of indices below its dispatcher.
    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(torch.as_tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(torch.as_tensor(index) if isinstance(index, list) else index, value)

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        return self.elem.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Twin({self.elem}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_twin(device: Any) -> bool:
    return device is not None and torch.device(device).type == "twin"


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return device if device.index is not None else torch.device("twin", 0)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Twin)}
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Twin) and tensor.ndim]
    asked = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
    if name not in ("_to_copy", "to", "copy_"):
        mixed = len(devices) > 1 or (devices and on_cpu and name not in _TAKE_CPU_INDICES)
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} and cpu in {func}")
    target = _numbered(asked) if _is_twin(asked) else None if asked is not None else next(iter(devices), None)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    if name == "histc" and devices:  # of whole numbers on GPUs only
        plain_args = (plain_args[0].float(), *plain_args[1:])
    result = func(*plain_args, **plain_kwargs)
    if not func._schema.returns:
        return None
    if func._schema.is_mutable:
        written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
        return args[written[0]] if written[0] < len(args) else kwargs[func._schema.arguments[written[0]].name]
    if target is None:
        return result
    # What views belong to the mode of their base.
    is_view = func._schema.returns and func._schema.returns[0].alias_info is not None
    mode = tensors[0].is_inference() if is_view else torch.is_inference_mode_enabled()
    with torch.inference_mode(mode):
        return tree_map(lambda value: Twin(value, target) if isinstance(value, Tensor) else value, result)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "twin":
        return torch.device("cpu")
    return value.elem if isinstance(value, Twin) else value


class Devices(TorchDispatchMode):
    """Operations on sizes alone, and copies from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        return _run(func, args, kwargs or {})


def _replace_functions() -> None:
    """Replaces those functions of torch that look below its dispatcher."""
    make, as_tensor, attend = torch.tensor, torch.as_tensor, F.scaled_dot_product_attention

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_twin(device):
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    def as_tensor_on(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_twin(device):
            return as_tensor(data, *args, device=device, **kwargs)
        return as_tensor(data, *args, **kwargs).to(device)

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        parts = [part for part in (query, key, value, attn_mask) if part is not None]
        if not isinstance(query, Twin):
            return attend(query, key, value, attn_mask, *args, **kwargs)
        assert len({part.device for part in parts}) == 1, "attention over several devices"
        with torch._C._DisableTorchDispatch():
            result = attend(*map(_plain, (query, key, value, attn_mask)), *args, **kwargs)
        return Twin(result, query.device)

    torch.tensor, torch.as_tensor = tensor, as_tensor_on  # type: ignore[assignment]
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


#: By family: its decoder, embeddings, final norm, and rotary embeddings.
PARTS: dict[str, tuple[str, str, str, str | None]] = {
    "llama": ("model", "embed_tokens", "norm", "rotary_emb"),
    "gpt_neox": ("gpt_neox", "embed_in", "final_layer_norm", "rotary_emb"),
    "gemma3": ("model", "embed_tokens", "norm", "rotary_emb"),
    "mamba2": ("backbone", "embeddings", "norm_f", None),
    "mamba": ("backbone", "embeddings", "norm_f", None),
    "attention or Mamba-2": ("model", "embed_tokens", "final_layernorm", "rotary_emb"),
    "linear attention and experts": ("model", "embed_tokens", "norm", "rotary_emb"),
}


def places(family: str) -> dict[str, str]:
    """Blocks 1 and 2 on the first device, 5 on the CPU until it runs, the others and the final norm on the second."""
    decoder, embeddings, norm, rotary = PARTS[family]
    found = {f"{decoder}.layers.{i}": f"twin:{int(i > 1)}" for i in range(LAYERS)}
    found |= {f"{decoder}.layers.4": "cpu", f"{decoder}.{embeddings}": "twin:0", f"{decoder}.{norm}": "twin:1"}
    if rotary is not None:
        found[f"{decoder}.{rotary}"] = "twin:0"
    return {**found, "lm_head": "twin:0"}


def policies(family: str, model: Any) -> list[ExitPolicy]:
    generate = reference_generate if family in FAMILIES else any_generate

    def separated(**settings: Any) -> ExitPolicy:
        policy = ExitPolicy(LAYERS, thresholds=(0.5,) * len(settings["exit_layers"]), **settings)
        return separated_policy(model, policy, PROMPTS[0], generate=generate)

    modes: tuple[StateMode, ...] = (
        ("recompute", "skip", "copy") if family in ("llama", "gpt_neox") else ("recompute", "skip")
    )
    found = [separated(exit_layers=(1, 3, 4), confidence="state", state_mode=mode) for mode in modes]
    found += [ExitPolicy(LAYERS), replace(found[0], final_block=True)]
    if family in FAMILIES:
        found.append(separated(exit_layers=(2, 3), confidence="softmax"))
    if family == "llama":
        found += [classifier_policy(kind) for kind in KINDS]
    return found


def check(family: str) -> str:
    """Compares a family on two devices with itself on the CPU; returns how it runs."""
    model = tiny_model(family) if family in FAMILIES else architecture(family)
    one = Engine(make_backbone(model, max_length=256), copy.deepcopy(CLASSIFIERS))
    tried = policies(family, model)
    with Devices():
        spread = dispatch_model(copy.deepcopy(model), device_map=places(family), main_device="twin:0")
        two = checked_engine(spread, tried[0], 256, copy.deepcopy(CLASSIFIERS))
    devices = [str(place.device) for place in two.backbone.places]
    assert devices == ["twin:0", "twin:0", "twin:1", "twin:1", "twin:0", "twin:1"], devices
    ours, theirs = ((engine.backbone.rung, engine.backbone.cost) for engine in (two, one))
    assert ours == theirs, (ours, theirs)
    for policy in tried:
        expected = run_generate(one, [policy] * 3, PROMPTS[:3], 2)
        pairs = [(prompt, generation.tokens) for prompt, generation in zip(PROMPTS[:3], expected, strict=True)]
        scores = run_score(one, policy, pairs, 2)
        with Devices():
            assert run_generate(two, [policy] * 3, PROMPTS[:3], 2) == expected, policy
            found = run_score(two, policy, pairs, 2)
        for ours, theirs in zip(found, scores, strict=True):
            assert (ours.trace, ours.greedy_tokens) == (theirs.trace, theirs.greedy_tokens), policy
            for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
                assert a == pytest.approx(b, abs=1e-4), policy
    # Rows of all policies beside one another, with a prefix that is run once.
    prompts = [[*random_ids(70, 1), *random_ids(5, 2 + i)] for i in range(len(tried))]
    expected = run_generate(one, tried, prompts, 4)
    with Devices():
        assert run_generate(two, tried, prompts, 4) == expected
        # Rows wait at exits, which are on both devices, and to be read out.
        assert run_generate(two, tried, prompts, 2, rows_in_flight=len(tried)) == expected
    return two.backbone.rung


if __name__ == "__main__":
    _replace_functions()
    for name in sys.argv[1:] or PARTS:
        sys.stdout.write(f"{name}: {check(name)}\n")
