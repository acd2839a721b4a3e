"""The arguments of ``--model hf`` that are passed on to the harness's ``HFLM``: checked by name before weights load.

Knows names, types and ranges. Knows nothing of torch, transformers or the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from dynamax_lm_eval import values
from dynamax_lm_eval.errors import UserError, unknown_name

Backend = Literal["default", "causal"]

#: Arguments that make a bitsandbytes configuration.
QUANTIZATION_ARGUMENTS = frozenset(
    {
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "load_in_4bit",
        "load_in_8bit",
    }
)
#: Arguments of ``from_pretrained`` that reach it through the harness's ``**kwargs``.
FROM_PRETRAINED_ARGUMENTS = QUANTIZATION_ARGUMENTS | frozenset(
    {
        "cache_dir",
        "device_map",
        "force_download",
        "local_files_only",
        "low_cpu_mem_usage",
        "token",
        "use_safetensors",
        "variant",
    }
)

#: Arguments of ``--model hf``, or of earlier versions, that cannot be honoured, with the reason.
REFUSED_ARGUMENTS = {
    "certificate": "write threshold=FILE, or threshold=calibrated",
    "attn_implementation": "dynamax runs its own attention over ragged batches; remove attn_implementation",
    "torch_dtype": "it was renamed in transformers 5; write dtype= instead",
}


def check(args: Mapping[str, Any], harness_arguments: Collection[str], own: Collection[str]) -> dict[str, Any]:
    """The arguments that are passed on, parsed.

    Args:
        args: model_args that are not ours.
        harness_arguments: names that ``HFLM.__init__`` takes.
        own: names of our arguments, for the error about an unknown one.

    Raises:
        UserError: a name is unknown, a value is out of range, or an argument cannot be honoured.
    """
    known = {*own, *harness_arguments, *FROM_PRETRAINED_ARGUMENTS}
    for name, value in args.items():
        if name in REFUSED_ARGUMENTS and _is_set(value):
            raise UserError(f"{name}={value!r} cannot be honoured: {REFUSED_ARGUMENTS[name]}")
        if name not in known and name not in REFUSED_ARGUMENTS:
            raise UserError(unknown_name("model argument", name, known, "dynamax's own are", own))
    passed_on = {name: value for name, value in args.items() if name not in REFUSED_ARGUMENTS}
    if passed_on.get("backend", "default") == "seq2seq":
        raise UserError("backend=seq2seq cannot be honoured: early exit needs a decoder-only (causal) backbone")
    _check_batch_size(passed_on.get("batch_size", 1))
    for name, parse in _PARSERS.items():
        if passed_on.get(name) is not None:
            passed_on[name] = parse(name, passed_on[name])
    _check_combinations(passed_on)
    _spread(passed_on)
    return passed_on


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and str(value).lower() not in ("false", "none")


def _check_batch_size(value: Any) -> None:
    size, _, schedule = str(value).partition(":")
    is_auto = size == "auto" and (not schedule or schedule.replace(".", "", 1).isdigit())
    if isinstance(value, bool) or not (is_auto or (str(value).isdecimal() and int(value) >= 1)):
        raise UserError(f"batch_size must be a whole number of at least 1, or auto, got {value!r}")


def _check_combinations(args: Mapping[str, Any]) -> None:
    """What ``HFLM`` would only notice after the weights have been loaded."""
    for first, second in (("peft", "delta"), ("autogptq", "gptqmodel")):
        if args.get(first) and args.get(second):
            raise UserError(f"{first} and {second} exclude each other; give one")
    if args.get("tp_plan") is not None:
        _check_tensor_parallel(args)
    if args.get("enable_thinking") and args.get("think_end_token") is None:
        raise UserError("enable_thinking=true needs think_end_token=, the token after which the answer begins; add it")
    if not isinstance(device := args.get("device", "cuda"), str):
        raise UserError(f"device must be a name such as cpu or cuda:0, got {device!r}")


def _check_tensor_parallel(args: Mapping[str, Any]) -> None:
    """What would set the processes apart that compute together, or that no plan of transformers covers."""
    others = [name for name in ("parallelize", "device_map", "peft", "delta", "gguf_file") if args.get(name)]
    if others:
        raise UserError(f"tp_plan and {others[0]} exclude each other; remove one of them")
    if str(args.get("batch_size", 1)).startswith("auto"):
        raise UserError("tp_plan needs batch_size=N: with auto, its processes might choose different numbers")


def _tp_plan(name: str, value: Any) -> str | Mapping[str, Any]:
    if (isinstance(value, str) and value == "auto") or (isinstance(value, Mapping) and value):
        return value
    raise UserError(f"{name} must be auto, or from Python a mapping of modules to styles, got {value!r}")


def _spread(args: dict[str, Any]) -> None:
    """Decides whether the model is spread over devices; ``HFLM`` drops a device_map without parallelize silently.

    Raises:
        UserError: an argument acts on models only that are spread, and this one is not.
    """
    if args.get("device_map") is not None:
        if args.get("parallelize") is False:
            raise UserError("device_map spreads the model, and parallelize=false forbids it; remove one of them")
        args["parallelize"] = True
    if args.get("parallelize"):
        return
    for name in ("max_memory_per_gpu", "max_cpu_memory", "offload_folder"):
        if args.get(name) is not None:
            raise UserError(f"{name} only acts on a model that is spread over devices; add parallelize=True")


def _memory(name: str, value: Any) -> int | str:
    """Bytes, or a number with a unit as accelerate knows it."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        if value.isdecimal() and int(value):
            return int(value)
        unit = next((unit for unit in _MEMORY_UNITS if value.upper().endswith(unit)), None)
        if unit is not None and value[: -len(unit)].strip().replace(".", "", 1).isdecimal():
            return value
    raise UserError(f"{name} must be a number of bytes or a size such as 10GiB or 500MB, got {value!r}")


def _device_map(name: str, value: Any) -> str | Mapping[str, Any]:
    if isinstance(value, Mapping) or (isinstance(value, str) and value):
        return value
    raise UserError(
        f"{name} must be auto, balanced, balanced_low_0, sequential, a device, or a mapping of modules to devices, "
        f"got {value!r}"
    )


def _whole(least: int) -> Callable[[str, Any], int]:
    """A parser of whole numbers, also in text; unlike ``values.count`` it refuses 64.0, which is no length."""

    def parse(name: str, value: Any) -> int:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not (is_number or (isinstance(value, str) and value.strip().isdecimal())) or int(value) < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        return int(value)

    return parse


def _dtype(name: str, value: Any) -> Any:
    """A torch dtype (known by its name: torch is not imported here) or its name, as text without ``torch.``."""
    text = str(value).removeprefix("torch.")
    if text not in _DTYPES and not (text == "auto" and name == "dtype"):
        auto = "auto, " if name == "dtype" else ""
        raise UserError(f"{name} must be one of {auto}{', '.join(_DTYPES)}, got {value!r}")
    return text if isinstance(value, str) else value


def _think_end_token(name: str, value: Any) -> str | int:
    if isinstance(value, str) and value:
        return int(value) if value.isdecimal() else value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(f"{name} must be a token's text or its id, got {value!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a mapping of names to values, got {value!r}")
    return value


def _location(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be a file, a folder or a Hub id, got {value!r}")
    return value


#: dtypes of weights and of a softmax, by the names that torch has for them.
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")

#: Units of memory that accelerate knows.
_MEMORY_UNITS = ("GIB", "MIB", "KIB", "GB", "MB", "KB")

#: How arguments of ``HFLM`` that it takes as they come are checked; None is left to it.
_PARSERS: dict[str, Any] = {
    "backend": values.choice(Backend),
    "max_length": _whole(1),
    "max_batch_size": _whole(1),
    "prefix_token_id": _whole(0),
    "think_end_token": _think_end_token,
    "chat_template_args": _mapping,
    **dict.fromkeys(("dtype", "softmax_dtype", "mixed_precision_dtype"), _dtype),
    "device_map": _device_map,
    "tp_plan": _tp_plan,
    **dict.fromkeys(("max_memory_per_gpu", "max_cpu_memory"), _memory),
    **dict.fromkeys(("subfolder", "peft", "delta", "gguf_file", "offload_folder"), _location),
    **dict.fromkeys(
        ("truncation", "logits_cache", "trust_remote_code", "use_fast_tokenizer", "gptqmodel", "parallelize"),
        values.flag,
    ),
    **dict.fromkeys(("add_bos_token", "enable_thinking"), values.flag),
}


def known() -> list[str]:
    """The arguments of ``HFLM`` that are checked here, by name; it takes others."""
    return sorted({"batch_size", "device", "revision", "tokenizer", *_PARSERS, *FROM_PRETRAINED_ARGUMENTS})
